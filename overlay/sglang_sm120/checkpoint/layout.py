"""Which tensors a published DeepSeek-V4 checkpoint holds: names, shapes, dtypes.

Two views of the same list: `parameters` yields the model's weights (one entry per matrix), `entries` the tensors as the
files' headers have them (a quantised matrix is two tensors, the weight and its `.scale`, in NVFP4 four), and `stored`
the same with torch's dtypes. Only `stored` needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

from .config import FP8_BLOCK, HEAD_DIM, INDEX_HEAD_DIM, NVFP4_GROUP, DSparkConfig, ReferenceConfig

MXFP4_GROUP = 32
Entry = tuple[tuple[int, ...], str]
"""Shape and dtype of a tensor, the dtype as safetensors spells it."""
_TORCH = {
    "BF16": "bfloat16", "F32": "float32", "I32": "int32", "I8": "int8", "U8": "uint8", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
"""The names that torch has for them."""


class Storage(Enum):
    """How one weight is stored."""

    FP8 = "e4m3 with one e8m0 scale per 128 x 128 block"
    MXFP4 = "two e2m1 per int8, low nibble first, with one e8m0 scale per 32 along K"
    NVFP4 = "two e2m1 per uint8, low nibble first, with one e4m3 scale per 16 along K, a factor and an input's scale"
    BF16 = "bfloat16"
    FP32 = "float32"
    INT32 = "int32"


@dataclass(frozen=True)
class Parameter:
    """One weight of the model: its published name, its logical shape and how it is stored."""

    name: str
    shape: tuple[int, ...]
    storage: Storage

    def entries(self) -> dict[str, Entry]:
        """The tensors in the files: name -> (shape, dtype)."""
        if self.storage is Storage.FP8:
            n, k = self.shape
            blocks = (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK))
            return {self.name: (self.shape, "F8_E4M3"), self.scale_name: (blocks, "F8_E8M0")}
        if self.storage is Storage.MXFP4:
            n, k = self.shape
            return {self.name: ((n, k // 2), "I8"), self.scale_name: ((n, k // MXFP4_GROUP), "F8_E8M0")}
        if self.storage is Storage.NVFP4:
            n, k = self.shape
            return {
                self.name: ((n, k // 2), "U8"),
                f"{self.name}_scale": ((n, k // NVFP4_GROUP), "F8_E4M3"),
                f"{self.name}_scale_2": ((), "F32"),
                f"{self.name.removesuffix('.weight')}.input_scale": ((), "F32"),
            }
        dtype = {Storage.BF16: "BF16", Storage.FP32: "F32", Storage.INT32: "I32"}
        return {self.name: (self.shape, dtype[self.storage])}

    @property
    def scale_name(self) -> str:
        """Name of the scale tensor beside a quantised weight."""
        return self.name.removesuffix(".weight") + ".scale"


def parameters(config: ReferenceConfig, dspark: DSparkConfig | None = None) -> Iterator[Parameter]:
    """Every weight of the model, or of its DSpark drafter, in the order in which the writer stores them."""
    if dspark is not None:
        yield from _dspark(config, dspark)
        return
    hidden, vocab = config.hidden_size, config.vocab_size
    yield Parameter("embed.weight", (vocab, hidden), Storage.BF16)
    for layer in range(config.num_hidden_layers):
        hashed = layer < config.num_hash_layers
        yield from _layer(config, f"layers.{layer}.", config.compress_ratios[layer], hashed)
    yield Parameter("norm.weight", (hidden,), Storage.BF16)
    yield from _hc_head(config, "")
    yield Parameter("head.weight", (vocab, hidden), Storage.BF16)
    for layer in range(config.num_nextn_predict_layers):
        prefix = f"mtp.{layer}."
        yield Parameter(prefix + "e_proj.weight", (hidden, hidden), Storage.FP8)
        yield Parameter(prefix + "h_proj.weight", (hidden, hidden), Storage.FP8)
        yield Parameter(prefix + "enorm.weight", (hidden,), Storage.BF16)
        yield Parameter(prefix + "hnorm.weight", (hidden,), Storage.BF16)
        yield from _layer(config, prefix, 0, False)
        yield Parameter(prefix + "norm.weight", (hidden,), Storage.BF16)
        yield from _hc_head(config, prefix)


def entries(config: ReferenceConfig, dspark: DSparkConfig | None = None) -> dict[str, Entry]:
    """Every tensor of the checkpoint files, or of the drafter's: name -> (shape, dtype)."""
    return {name: entry for p in parameters(config, dspark) for name, entry in p.entries().items()}


def stored(
    config: ReferenceConfig, dspark: DSparkConfig | None = None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """`entries` with torch's dtypes."""
    import torch

    return {name: (shape, getattr(torch, _TORCH[dtype])) for name, (shape, dtype) in entries(config, dspark).items()}


def _dspark(config: ReferenceConfig, dspark: DSparkConfig) -> Iterator[Parameter]:
    """Embedding and head are the target's."""
    hidden, rank, last = config.hidden_size, dspark.markov_rank, f"mtp.{dspark.stages - 1}."
    yield Parameter("mtp.0.main_proj.weight", (hidden, dspark.stages * hidden), Storage.FP8)
    yield Parameter("mtp.0.main_norm.weight", (hidden,), Storage.BF16)
    for stage in range(dspark.stages):
        yield from _layer(dspark.stage(config), f"mtp.{stage}.", 0, False)
    yield Parameter(last + "norm.weight", (hidden,), Storage.BF16)
    yield from _hc_head(config, last)
    yield Parameter(last + "markov_head.markov_w1.weight", (config.vocab_size, rank), Storage.BF16)
    yield Parameter(last + "markov_head.markov_w2.weight", (config.vocab_size, rank), Storage.BF16)
    if dspark.confidence:
        yield Parameter(last + "confidence_head.proj.weight", (1, hidden + rank), Storage.FP32)


def _hc_head(config: ReferenceConfig, prefix: str) -> Iterator[Parameter]:
    streams = config.hc_mult
    yield Parameter(prefix + "hc_head_fn", (streams, streams * config.hidden_size), Storage.FP32)
    yield Parameter(prefix + "hc_head_base", (streams,), Storage.FP32)
    yield Parameter(prefix + "hc_head_scale", (1,), Storage.FP32)


def _layer(config: ReferenceConfig, prefix: str, ratio: int, hashed: bool) -> Iterator[Parameter]:
    hidden, streams, heads = config.hidden_size, config.hc_mult, config.num_attention_heads
    mixes = (2 + streams) * streams
    for block in ("attn", "ffn"):
        yield Parameter(f"{prefix}hc_{block}_fn", (mixes, streams * hidden), Storage.FP32)
        yield Parameter(f"{prefix}hc_{block}_base", (mixes,), Storage.FP32)
        yield Parameter(f"{prefix}hc_{block}_scale", (3,), Storage.FP32)
        yield Parameter(f"{prefix}{block}_norm.weight", (hidden,), Storage.BF16)
    attn = prefix + "attn."
    yield Parameter(attn + "wq_a.weight", (config.q_lora_rank, hidden), Storage.FP8)
    yield Parameter(attn + "q_norm.weight", (config.q_lora_rank,), Storage.BF16)
    yield Parameter(attn + "wq_b.weight", (heads * HEAD_DIM, config.q_lora_rank), Storage.FP8)
    yield Parameter(attn + "wkv.weight", (HEAD_DIM, hidden), Storage.FP8)
    yield Parameter(attn + "kv_norm.weight", (HEAD_DIM,), Storage.BF16)
    yield Parameter(attn + "attn_sink", (heads,), Storage.FP32)
    o_rank = config.o_groups * config.o_lora_rank
    yield Parameter(attn + "wo_a.weight", (o_rank, config.heads_per_group * HEAD_DIM), Storage.FP8)
    yield Parameter(attn + "wo_b.weight", (hidden, o_rank), Storage.FP8)
    if ratio:
        yield from _compressor(attn + "compressor.", hidden, ratio, HEAD_DIM)
    if ratio == 4:
        indexer = attn + "indexer."
        q_dim = config.index_n_heads * INDEX_HEAD_DIM
        yield Parameter(indexer + "wq_b.weight", (q_dim, config.q_lora_rank), Storage.FP8)
        yield Parameter(indexer + "weights_proj.weight", (config.index_n_heads, hidden), Storage.BF16)
        yield from _compressor(indexer + "compressor.", hidden, ratio, INDEX_HEAD_DIM)
    ffn = prefix + "ffn."
    yield Parameter(ffn + "gate.weight", (config.n_routed_experts, hidden), Storage.BF16)
    if hashed:
        yield Parameter(ffn + "gate.tid2eid", (config.vocab_size, config.num_experts_per_tok), Storage.INT32)
    else:
        yield Parameter(ffn + "gate.bias", (config.n_routed_experts,), Storage.FP32)
    inter = config.moe_intermediate_size
    routed = Storage.NVFP4 if config.nvfp4_experts and prefix.startswith("layers.") else Storage.MXFP4
    owners = [(f"{ffn}experts.{e}.", routed) for e in range(config.n_routed_experts)]
    for owner, storage in [*owners, (ffn + "shared_experts.", Storage.FP8)]:
        yield Parameter(owner + "w1.weight", (inter, hidden), storage)
        yield Parameter(owner + "w2.weight", (hidden, inter), storage)
        yield Parameter(owner + "w3.weight", (inter, hidden), storage)


def _compressor(prefix: str, hidden: int, ratio: int, dim: int) -> Iterator[Parameter]:
    # c4 blocks overlap: first-half channels belong to the following block, second-half ones to their own.
    width = 2 * dim if ratio == 4 else dim
    yield Parameter(prefix + "wkv.weight", (width, hidden), Storage.BF16)
    yield Parameter(prefix + "wgate.weight", (width, hidden), Storage.BF16)
    yield Parameter(prefix + "norm.weight", (dim,), Storage.BF16)
    yield Parameter(prefix + "ape", (ratio, width), Storage.FP32)
