"""DeepSeek-V4 in plain PyTorch: a writer of small checkpoints and the whole-model oracle.

Nothing here imports SGLang or an op of this package: the oracle is the second, independent reading of the
model. Import the parts from their modules (`config`, `layout`, `write`, `tokenizer`, `oracle`).
"""
