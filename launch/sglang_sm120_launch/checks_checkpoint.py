"""The doctor's checks of a checkpoint: the index against the files, and whether the experts are as config.json says.

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

EXPERT = re.compile(r"(layers|mtp)\.\d+\.ffn\.experts\.\d+\.w[123]\.(\w+)")
MXFP4 = {"weight": "I8", "scale": "F8_E8M0"}
"""Two E2M1 values a byte, and one power of two per 32 of them."""
NVFP4 = {"weight": "U8", "weight_scale": "F8_E4M3", "weight_scale_2": "F32", "input_scale": "F32"}
"""Two E2M1 values a byte, an E4M3 scale per 16 of them, a factor, and a scale of inputs that the step leaves alone."""


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
    """All routed experts' tensors, as many as the config says, in MXFP4, or where it says so the layers' in NVFP4.

    dtypes: tensor name -> safetensors dtype.
    """
    # Imported where it is used: doctor runs without the overlay too.
    from sglang_sm120.checkpoint.config import nvfp4_experts

    nvfp4 = nvfp4_experts(config)
    formats = {"layers": NVFP4 if nvfp4 else MXFP4, "mtp": MXFP4}
    called = "NVFP4 (the MTP layer's MXFP4)" if nvfp4 else "MXFP4"
    found = {name: (match.groups(), dtypes[name]) for name in dtypes if (match := EXPERT.fullmatch(name))}
    wrong = {name: dtype for name, ((owner, kind), dtype) in found.items() if formats[owner].get(kind) != dtype}
    do = "use the published checkpoint, whose experts are MXFP4 (int8 pairs with E8M0 scales)"
    if nvfp4:
        do = "use a checkpoint in ModelOpt's layout: uint8 pairs with E4M3 weight_scale, weight_scale_2 and input_scale"
    if wrong:
        name = min(wrong)
        counts = ", ".join(f"{n} x {dtype}" for dtype, n in sorted(Counter(wrong.values()).items()))
        return Finding("experts", "fail", f"{len(wrong)} of {len(found)} are not {called} ({counts}; first {name})", do)
    drafts = len(config.get("dspark_target_layer_ids") or ()) or config.get("num_nextn_predict_layers", 0)
    layers = {"layers": config.get("num_hidden_layers", 0), "mtp": drafts}
    expected = sum(n * config.get("n_routed_experts", 0) * 3 * len(formats[owner]) for owner, n in layers.items())
    if len(found) != expected or not found:
        return Finding("experts", "fail", f"{len(found)} expert tensors, config.json implies {expected}", do)
    scales = "E4M3 scales; input scales are ignored, activations stay bf16" if nvfp4 else "E8M0 scales"
    return Finding("experts", "ok", f"{len(found)} tensors, {called} with {scales}")
