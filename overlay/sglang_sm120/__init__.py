"""A step of our own for DeepSeek-V4 in SGLang: on consumer Blackwell (SM12x) behind its kernel plugin, and on a CPU.

SGLang comes in through `hooks`; `plugin` is its contract's spec, `step` the forward, `ops` and `formats` know bytes.

Environment variables (all of them):

| variable | values | meaning |
|---|---|---|
| `SGLANG_SM120` | `0` | the step is not turned on by default |
| `SGLANG_SM120_PROVIDER` | `torch`, or `op=provider,…` | provider for all ops, or for single ops |
| `SGLANG_SM120_FORCE` | `1` | non-torch providers first on any CUDA device, and the step on Hopper (tests) |
| `SGLANG_SM120_PREFILL` | `overlay` | the step takes prefill on a GPU too, which by default is SGLang's |
| `SGLANG_SM120_LOADER` | `1` | weights are read onto the card by safetensors' own threads, not from mapped files |
| `SGLANG_SM120_PDL` | `0` | no programmatic dependent launches |
"""

__version__ = "0.2.0"
