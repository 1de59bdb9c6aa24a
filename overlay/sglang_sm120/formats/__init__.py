"""What the bytes mean: weight formats, cache pages and compressor plans.

One module per format. Each documents its exact bytes and offers `quantise` and `dequantise` (or `pack` and
`unpack`); the page formats add `store` and `load`, which address a pool by flat token slots.
"""
