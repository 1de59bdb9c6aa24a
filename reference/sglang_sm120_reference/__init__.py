"""DeepSeek-V4 in plain PyTorch: a writer of small checkpoints and the whole-model oracle.

Nothing here imports SGLang or an op of the overlay: the oracle is the second, independent reading of the model.
Import the parts from their modules (`write`, `packed`, `tokenizer`, `oracle`).
"""
