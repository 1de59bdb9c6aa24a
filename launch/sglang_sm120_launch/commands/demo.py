"""`sglang-sm120 demo`: a small DeepSeek-V4, served and asked on this machine's CPU, from a clone of the repository."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from ..errors import LaunchError


def configure(parser: argparse.ArgumentParser) -> None:
    """There is nothing to choose."""


def run(arguments: argparse.Namespace) -> int:
    """Run the clone's demo; its exit status."""
    script, model = Path("evals/demo.py"), Path("evals/small-deepseek-v4.xz")
    if not script.is_file():
        raise LaunchError(f"no {script} here, which a wheel does not hold: run this in a clone of the repository.")
    for package in ("httpx", "openai"):  # that the script needs: a missing one is said in a sentence
        if find_spec(package) is None:
            raise ModuleNotFoundError(name=package)
    return subprocess.run([sys.executable, script, model]).returncode
