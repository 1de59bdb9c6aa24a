"""The launcher's command line, with a stand-in for SGLang's server."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "launch"), str(ROOT / "overlay")]

from sglang_sm120_launch import cli, request  # noqa: E402

if "STUB_UNPATCHED" not in os.environ:
    request.is_patched = lambda: True
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
sys.exit(cli.main())
