"""A child of cookbook.py, with SGLang's own evaluation tools.

    python cookbook_child.py load PATH             GSM8K's questions and their path, or error, as JSON; "" downloads
    python cookbook_child.py sgl-eval NAME FLAGS   as `sgl-eval run`, with the key of OPENAI_API_KEY
"""

from __future__ import annotations

import json
import os
import sys


def load(path: str) -> dict[str, str | int]:
    """Load GSM8K as SGLang does, by its own download where the path is empty; what raised is the `error`."""
    try:
        from sglang.test.simple_eval_mixed_prefix_gsm8k import GSM8K_URL, GSM8KEval
        from sglang.utils import download_and_cache_file

        path = path or download_and_cache_file(GSM8K_URL)
        return {"questions": len(GSM8KEval(num_shots=0, data_path=path)._lines), "path": path}
    except Exception as error:  # SGLang raises what its libraries do: all of it means no questions.
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def sgl_eval(words: list[str]) -> int:
    """`sgl-eval run`, whose only way to take a key is a flag, which other users of the machine would see."""
    from sgl_eval.cli import main

    code: int = main(["run", *words, "--api-key", os.environ.get("OPENAI_API_KEY", "EMPTY")])
    return code


if __name__ == "__main__":
    if sys.argv[1] == "load":
        print(json.dumps(load(sys.argv[2])))
    else:
        sys.exit(sgl_eval(sys.argv[2:]))
