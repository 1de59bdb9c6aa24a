"""The doctor's check of a checkpoint: what a plan asks of it, read from the headers of its files, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .checks import Finding
from .errors import LaunchError
from .model import Model, read_index


def checkpoint_checks(folder: Path) -> Iterator[Finding]:
    """The check of the checkpoint in `folder`, and of the DSpark drafter there."""
    try:
        # Imported where it is used: doctor runs without the overlay too.
        from sglang_sm120.checkpoint.config import nvfp4_experts

        model = Model.load(str(folder)).with_dspark()
        # A plan does without: SGLang, too, takes what files there are.
        read_index(folder)
    except LaunchError as error:
        found, _, do = str(error).rstrip(".").rpartition(": ")
        yield Finding("checkpoint", "fail", found, do)
    except ModuleNotFoundError:
        yield Finding("checkpoint", "fail", "not looked at", "see overlay")
    else:
        experts = "NVFP4, input scales are ignored" if nvfp4_experts(model.config) else "MXFP4"
        yield Finding("checkpoint", "ok", f"{len(model.tensors)} tensors are as config.json says (experts: {experts})")
