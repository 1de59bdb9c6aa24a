"""DeepSeek-V4's forward over all layers on the overlay's ops, with SGLang's weights where they lie and its metadata.

`target` (layers), `draft`, `attention` and `experts` are the model's equations. What else knows SGLang's classes is
here too, and nowhere else but in `plugin`: `weights` and `metadata` know how it names things, `prepare` what it
replaces of a loaded model, `reasons`, `passes` and `default_on` when the step serves, `cpu` and `cpu_speculation` the
settings and torch twins of kernels for a CPU.
"""
