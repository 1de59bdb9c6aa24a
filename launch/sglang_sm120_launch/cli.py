"""`sglang-sm120`: one table of subcommands, each a module that is imported when it is chosen."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

from .errors import LaunchError

COMMANDS = {
    "plan": "which settings SGLang should get for a model on a machine, and why",
    "serve": "plan, start the server, wait until it answers, watch it",
    "prebuild": "build SGLang's and FlashInfer's kernels in parallel, before a first start; needs no GPU",
    "doctor": "what is missing on this machine",
    "prove": "what works on this machine's GPUs and how fast, beside the prediction, as one file to send",
    "demo": "a small model, served and asked on this machine's CPU, from a clone of the repository",
    "kernels": "which implementation serves each op here, and why",
    "bench": "throughput and latency of a running server",
    "compare": "ratios of two files of bench, or of prove",
}


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 1 failed, 2 misuse."""
    words = list(sys.argv[1:] if words is None else words)
    parser = argparse.ArgumentParser(prog="sglang-sm120", description="DeepSeek-V4 with SGLang on SM120.")
    versions = ", ".join(f"{name} {_version(name)}" for name in ("sglang-sm120", "sglang"))
    parser.add_argument("--version", action="version", version=versions, help="print the versions of both packages")
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in words if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        child = choices.add_parser(name, help=summary, description=summary)
        if name == chosen:
            chosen_parser = child
    try:
        if chosen is not None:
            # Imported only now, so that `doctor` runs where torch and SGLang cannot be imported.
            module = importlib.import_module(f"{__package__}.commands.{chosen}")
            module.configure(chosen_parser)
            chosen_parser.set_defaults(run=module.run)
        arguments, unknown = parser.parse_known_args(words)
        if unknown:
            where = "SGLang's own flags come after `--`" if "server" in arguments else "`--help` lists them"
            raise LaunchError(f"{unknown[0]} is no option of `{chosen}`: {where}.")
        return int(arguments.run(arguments))
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        print(
            f"sglang-sm120: {sys.executable} has no package {package}, which `{chosen}` needs: run `make setup` and "
            f"`make apply`, or use the Python that they filled.",
            file=sys.stderr,
        )
        return 2
    except LaunchError as error:
        print(f"sglang-sm120: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has left; what it read is complete.
        sys.stderr.close()
        return 1


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
