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
from .model import checked, headers, read_json

EXPERT = re.compile(r"(?:layers|mtp)\.\d+\.ffn\.experts\.\d+\.w[123]\.(weight|scale)")
EXPERT_DTYPES = {"weight": "I8", "scale": "F8_E8M0"}
"""Two E2M1 values a byte, and one power of two per 32 of them."""


def checkpoint_checks(folder: Path) -> Iterator[Finding]:
    """Both checks of the checkpoint in `folder`."""
    try:
        file = folder / "config.json"
        config = checked(read_json(file), str(folder), file)
        dtypes = {name: entry["dtype"] for name, entry in headers(folder).items()}
    except LaunchError as error:
        found, _, do = str(error).rstrip(".").rpartition(": ")
    except ModuleNotFoundError:
        found, do = "not looked at", "see overlay"
    else:
        yield Finding("checkpoint", "ok", f"{len(dtypes)} tensors are where the index says")
        yield experts(config, dtypes)
        return
    yield Finding("checkpoint", "fail", found, do)
    yield Finding("experts", "fail", "not looked at", "see checkpoint")


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
