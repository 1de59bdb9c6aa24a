"""The server, which compares on each rank what `standin.py` says of SGLang with what is there.

It logs `COMPARED`, what was compared and the list of differences, as JSON: once for each loaded model, and once for
each mode of the passes of each. The children import this file too, so all of them do it.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "reference"))

from standin import New, Norm, Rank, Server, Weights

from sglang_sm120 import plugin

COMPARED = "stand-ins compared with"
# Tables of rotations have a row for each position of the context, and vocabularies are split over ranks.
ANY_LENGTH = ("freqs_cis", "lm_head.weight")
install = plugin.install_on_cpu


def differences(made: Any, real: Any, path: str, shapes: bool = False) -> Iterator[str]:
    """Names that `real` lacks, and tensors of another dtype, rank or, where asked for, shape; other values have to
    be equal."""
    if isinstance(made, torch.Tensor):
        exact = shapes and not path.endswith(ANY_LENGTH)
        wanted = made.dtype, made.shape if exact else made.dim()
        if not isinstance(real, torch.Tensor):
            yield f"{path} is {real!r}, not a tensor"
        elif (found := (real.dtype, real.shape if exact else real.dim())) != wanted:
            yield f"{path} is {found}, not {wanted}"
    elif isinstance(made, list):
        for i, (one, other) in enumerate(zip(made, real, strict=True)):
            yield from differences(one, other, f"{path}[{i}]", shapes)
    elif isinstance(made, SimpleNamespace | Norm):
        for name, part in vars(made).items():
            if not hasattr(real, name):
                yield f"{path}.{name} is missing"
            else:
                yield from differences(part, getattr(real, name), f"{path}.{name}", shapes)
    elif callable(made) or callable(real):
        if callable(made) != callable(real):
            yield f"{path} is {real!r}, not {made!r}"
    elif made != real:
        yield f"{path} is {real!r}, not {made!r}"


def caches(pool: Any, layer: int, ratio: int) -> dict[str, Any]:
    """What a pool says of a layer."""
    found = {"swa": pool.get_swa_key_buffer_radix(layer), "swa page": pool.get_swa_key_page_size()}
    if ratio:
        states = pool.get_attention_compress_states(layer).kv_score_buffer.kv_score
        found |= {"extra": pool.get_extra_key_buffer(layer), "states": states}
        found["extra page"] = pool.get_extra_key_page_size(layer)
    if ratio == 4:
        states = pool.get_indexer_compress_states(layer).kv_score_buffer.kv_score
        found |= {"index": pool.get_index_k_with_scale_buffer(layer), "index states": states}
    return found


def compared_pass(view: Any, forward_batch: Any, ratios: tuple[int, ...], is_decode: bool) -> Iterator[str]:
    """Of a pass: its metadata and its pool."""
    seen: list[Any] = []

    def step(stand_in: Any, ids: torch.Tensor, *_: Any) -> SimpleNamespace:
        seen.append(stand_in)
        return SimpleNamespace(logits=torch.zeros(len(ids), 1))

    server = Server(step, ratios, 1, 256, torch.Generator().manual_seed(0))
    (server.decode if is_decode else server.extend)(New(1, 0, [1]))
    (made,) = seen
    core, real = made.metadata.core_attn_metadata, view.metadata.core_attn_metadata
    yield from differences(made.metadata, view.metadata, "metadata")
    for name in ("sparse_page_indices", "sparse_topk_lengths"):
        for ratio in {4, 128} & set(ratios):
            yield from differences(getattr(core, name)(ratio), getattr(real, name)(ratio), f"{name}({ratio})")
    yield from differences(made.swa_out_cache_loc(None), view.swa_out_cache_loc(forward_batch), "swa_out_cache_loc")
    for layer, ratio in enumerate(ratios):
        pools = (caches(one.kv_pool.pool, layer, ratio) for one in (made, view))
        yield from differences(*(SimpleNamespace(**pool) for pool in pools), f"pool of layer {layer}")
    one, other = made.kv_pool, view.kv_pool
    yield from differences(one.request_window, other.request_window, "request_window")
    yield from differences(one.get_swa_key_bytes_per_token(), other.get_swa_key_bytes_per_token(), "bytes per token")


def install_and_compare(model: torch.nn.Module, hf_config: Any) -> None:
    from sglang.srt.kernel_plugins.nvidia.binding import MegakernelBinding
    from sglang.srt.runtime_context import get_context, get_parallel

    def told(what: str, found: Iterator[str]) -> None:
        logging.getLogger(__name__).info("%s %s: %s", COMPARED, what, json.dumps(list(found)))

    parallel, is_draft = get_parallel(), hf_config.architectures[0] == plugin.DRAFT
    body: Any = model.model
    experts = (body.decoder if is_draft else body.layers[0]).mlp.experts
    split = experts.num_local_experts < hf_config.n_routed_experts
    weights = Weights(
        Path(get_context().server_args.model_path), Rank(parallel.tp_group.rank_in_group, parallel.tp_size, split)
    )
    ratios = (0,) if is_draft else tuple(layer.self_attn.compress_ratio for layer in body.layers)
    name = "draft" if is_draft else "target"
    told(f"the {name}", differences(weights.draft() if is_draft else weights.target(), model, name, shapes=True))
    install(model, hf_config)
    forward, seen, binding = model.forward, set(), MegakernelBinding(model=model)

    def compared(input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any, **kwargs: Any) -> Any:
        mode = plugin.mode_of(forward_batch)
        if mode not in seen:
            seen.add(mode)
            told(f"a {mode} pass of the {name}", compared_pass(
                binding.forward_view(), forward_batch, ratios, forward_batch.forward_mode.is_decode()
            ))  # fmt: skip
        return forward(input_ids, positions, forward_batch, **kwargs)

    model.forward = compared  # type: ignore[method-assign]


if __name__ in ("__main__", "__mp_main__"):
    plugin.install_on_cpu = install_and_compare

if __name__ == "__main__":
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    launch_server(prepare_server_args(sys.argv[1:]))
