"""The plans that `golden/` keeps; `python tests/launch/golden_plans.py` writes them again after a wanted change."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parents[1] / "launch"), str(HERE.parents[1] / "overlay")]

from sglang_sm120_launch import show  # noqa: E402
from sglang_sm120_launch.errors import LaunchError  # noqa: E402
from sglang_sm120_launch.machine import Machine  # noqa: E402
from sglang_sm120_launch.model import FLASH, Model  # noqa: E402
from sglang_sm120_launch.plan import make_plan  # noqa: E402
from sglang_sm120_launch.values import Request  # noqa: E402

MACHINES = sorted(path.stem for path in (HERE / "machines").glob("*.json"))
CASES: dict[str, dict[str, Any]] = {name: {} for name in MACHINES} | {
    "2x-h200+force": {"env": {"SGLANG_SM120_FORCE": "1"}},
    "2x-rtx-pro-6000+mtp": {"mtp": True},
    "mixed-cards+gpus": {"gpus": (0, 2)},
}
"""Golden file -> what the user asks for; the machine is the part before `+`."""


def machine(name: str) -> Machine:
    """A described machine by its file's name."""
    return Machine.from_json(HERE / "machines" / f"{name}.json")


def planned(case: str, model: Model) -> dict[str, Any]:
    """The plan of a case as JSON keeps it, or the refusal."""
    try:
        plan = make_plan(machine(case.split("+")[0]), model, Request(**CASES[case]))
    except LaunchError as refusal:
        return {"refused": str(refusal)}
    return json.loads(show.as_json(plan))


def main() -> None:
    """Write every golden plan."""
    model = Model.load(FLASH)
    for case in CASES:
        text = json.dumps(planned(case, model), indent=2) + "\n"
        (HERE / "golden" / f"{case}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
