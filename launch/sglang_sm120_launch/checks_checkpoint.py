"""The doctor's checks of a checkpoint: the index against the files, and whether the experts are MXFP4 as published.

Only the headers of the safetensors files are read, without torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .checks import Finding
from .errors import LaunchError
from .model import MODEL_TYPE, checked, read_index, read_json, shard_header

EXPERT = re.compile(r"(?:layers|mtp)\.\d+\.ffn\.experts\.\d+\.w[123]\.(weight|scale)")
EXPERT_DTYPES = {"weight": "I8", "scale": "F8_E8M0"}
"""Two E2M1 values a byte, and one power of two per 32 of them."""


def checkpoint_checks(folder: Path) -> Iterator[Finding]:
    """Both checks of the checkpoint in `folder`."""
    try:
        config = read_json(folder / "config.json")
        if config.get("model_type") != MODEL_TYPE:
            raise LaunchError(
                f"{folder} holds the model type {config.get('model_type')!r}, needed {MODEL_TYPE!r}: "
                "name another directory with --model."
            )
        checked(config, str(folder), folder / "config.json")
        dtypes = _dtypes(folder)
    except LaunchError as error:
        found, _, do = str(error).rstrip(".").rpartition(": ")
        yield Finding("checkpoint", "fail", found, do)
        yield Finding("experts", "fail", "not looked at", "see checkpoint")
        return
    yield Finding("checkpoint", "ok", f"{len(dtypes)} tensors are where the index says")
    yield experts(config, dtypes)


def experts(config: Mapping[str, Any], dtypes: Mapping[str, str]) -> Finding:
    """All routed experts' weights, as many as the config says, in MXFP4. `dtypes`: tensor name -> safetensors dtype."""
    found = {name: (match.group(1), dtypes[name]) for name in dtypes if (match := EXPERT.fullmatch(name))}
    wrong = {name: dtype for name, (kind, dtype) in found.items() if dtype != EXPERT_DTYPES[kind]}
    do = "use the published checkpoint, whose experts are MXFP4 (int8 pairs with E8M0 scales)"
    if wrong:
        name = min(wrong)
        counts = ", ".join(f"{n} x {dtype}" for dtype, n in sorted(Counter(wrong.values()).items()))
        return Finding("experts", "fail", f"{len(wrong)} of {len(found)} are not MXFP4 ({counts}; first {name})", do)
    layers = config.get("num_hidden_layers", 0) + config.get("num_nextn_predict_layers", 0)
    expected = layers * config.get("n_routed_experts", 0) * 3 * len(EXPERT_DTYPES)
    if len(found) != expected or not found:
        return Finding("experts", "fail", f"{len(found)} expert tensors, config.json implies {expected}", do)
    return Finding("experts", "ok", f"{len(found)} tensors, MXFP4 with E8M0 scales")


def _dtypes(folder: Path) -> dict[str, str]:
    """Tensor name -> dtype, once the index and the files it names agree about every tensor."""
    weight_map = read_index(folder)
    files = {file: shard_header(folder / file) for file in sorted(set(weight_map.values()))}
    lost = sorted(name for name, file in weight_map.items() if name not in files[file])
    if lost:
        file = weight_map[lost[0]]
        raise LaunchError(f"{file} lacks {lost[0]} ({len(lost)} tensors of the index are missing): download it again.")
    extra = sorted(name for file, header in files.items() for name in header if weight_map.get(name) != file)
    if extra:
        raise LaunchError(f"the index does not have {extra[0]} ({len(extra)} tensors of the files): download it again.")
    return {name: files[file][name]["dtype"] for name, file in weight_map.items()}
