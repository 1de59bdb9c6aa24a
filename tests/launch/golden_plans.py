"""The plans that `golden/` keeps; `python tests/launch/golden_plans.py` writes them again after a wanted change."""

from __future__ import annotations

import functools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parents[1] / folder) for folder in ("launch", "overlay", "reference")]

from sglang_sm120.checkpoint.config import FLASH, PRO, DSparkConfig, ReferenceConfig  # noqa: E402
from sglang_sm120.checkpoint.layout import stored  # noqa: E402
from sglang_sm120_launch import show  # noqa: E402
from sglang_sm120_launch.errors import LaunchError  # noqa: E402
from sglang_sm120_launch.machine import Machine  # noqa: E402
from sglang_sm120_launch.model import Model  # noqa: E402
from sglang_sm120_launch.plan import make_plan  # noqa: E402
from sglang_sm120_launch.values import Request  # noqa: E402
from sglang_sm120_reference.config_file import FLASH_DRAFTER  # noqa: E402

MACHINES = sorted(path.stem for path in (HERE / "machines").glob("*.json"))
CASES: dict[str, dict[str, Any]] = {name: {} for name in MACHINES} | {
    "2x-h200+force": {"env": {"SGLANG_SM120_FORCE": "1"}},
    "2x-rtx-pro-6000+mtp": {"mtp": True},
    "2x-rtx-pro-6000+dspark": {"dspark": True},
    "mixed-cards+gpus": {"gpus": (0, 2)},
    "2x-rtx-pro-6000+pro": {},
    "8x-h200+pro": {},
    "8x-rtx-pro-6000+pro": {},
    "16x-rtx-pro-6000+pro": {},
    "16x-rtx-pro-6000+pro+mtp": {"mtp": True},
}
"""Golden file -> what the user asks for; the machine is the part before `+`, the model V4-Pro where `pro` follows."""

load = functools.cache(Model.load)


def drafted() -> Model:
    """Flash with its drafter, whose stages have the MTP layer's place."""
    model = load(FLASH)
    config = {**model.config, **FLASH_DRAFTER}
    target = ReferenceConfig.from_json(config)
    dspark = DSparkConfig.from_json(config, target)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in stored(target, dspark).items()}
    rest = {name: size for name, size in model.tensors.items() if not name.startswith("mtp.")}
    return replace(model, config=config, tensors=rest | sizes, dspark=dspark)


def machine(name: str) -> Machine:
    """A described machine by its file's name; `16x-` is two nodes of `8x-`."""
    described = Machine.from_json(HERE / "machines" / f"{name.replace('16x-', '8x-')}.json")
    return replace(described, nodes=2) if name.startswith("16x-") else described


def planned(case: str) -> dict[str, Any]:
    """The plan of a case as JSON keeps it, or the refusal."""
    name, *words = case.split("+")
    try:
        model = drafted() if "dspark" in words else load(PRO if "pro" in words else FLASH)
        plan = make_plan(machine(name), model, Request(**CASES[case]))
    except LaunchError as refusal:
        return {"refused": str(refusal)}
    return json.loads(show.as_json(plan))


def main() -> None:
    """Write every golden plan."""
    for case in CASES:
        text = json.dumps(planned(case), indent=2) + "\n"
        (HERE / "golden" / f"{case}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
