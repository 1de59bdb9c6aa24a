"""DeepSeek-V4's forward over all layers on the overlay's ops, with SGLang's weights where they lie and its metadata.

`target` (layers), `draft`, `attention` and `experts` are the model's equations. What else knows SGLang's classes is
here too, and nowhere else but in `plugin`; SGLang's own kernels are providers in the ops' folders.
"""
