"""The launcher's command line, with a stand-in for SGLang's server and for its parser, which takes every flag."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "launch"), str(ROOT / "overlay")]

from sglang_sm120_launch import cli  # noqa: E402
from sglang_sm120_launch.flags import Flags  # noqa: E402


class Parser(argparse.ArgumentParser):
    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        return self.parse_known_args(args, namespace)[0]


parser = Parser(add_help=False)
parser.add_argument("--port", type=int)
parser.add_argument("--skip-tokenizer-init", action="store_true")
for name in ("--model-path", "--host", "--ssl-certfile", "--ssl-keyfile"):
    parser.add_argument(name)
Flags.installed = classmethod(lambda cls: cls(parser))  # type: ignore[method-assign, assignment]
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
sys.exit(cli.main())
