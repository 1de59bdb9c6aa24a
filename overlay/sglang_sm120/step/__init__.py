"""DeepSeek-V4's forward over all layers on the overlay's ops, with SGLang's weights where they lie and its metadata.

`target` (layers), `attention` and `experts` are the model's equations; `weights` and `metadata` are the only modules
that know how SGLang names things.
"""
