"""A child of cookbook.py: SGLang's data sets, loaded by SGLang's own code, and GPQA from a file.

    python cookbook_child.py load gsm8k=PATH gpqa= aime25= …   each one's questions and path, or error, as JSON
    python cookbook_child.py gpqa PATH FLAGS                   as `python -m sglang.test.run_eval` with the FLAGS

The second is there because run_eval takes no path for GPQA. SGLang's AIME25 takes none either: the library under it
prefers ./opencompass/AIME2025 where that exists.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

GPQA_URL = "https://openaipublic.blob.core.windows.net/simple-evals/gpqa_diamond.csv"
"""As in sglang.test.run_eval, which has it inside a function."""


def load(name: str, path: str) -> dict[str, str | int]:
    """Load a data set, by SGLang's own download where the path is empty; raises whatever SGLang raises."""
    if name == "gsm8k":
        from sglang.test.simple_eval_gsm8k import GSM8K_URL, GSM8KEval
        from sglang.utils import download_and_cache_file

        path = path or download_and_cache_file(GSM8K_URL)
        return {"questions": len(GSM8KEval(num_shots=0, data_path=path)._lines), "path": path}
    if name == "gpqa":
        from sglang.test.simple_eval_gpqa import GPQAEval

        return {"questions": len(GPQAEval(path or GPQA_URL, None, 1).examples), "path": path}
    from sglang.test.simple_eval_aime25 import AIME25Eval

    return {"questions": len(AIME25Eval(None, 1).examples), "path": path}


def gpqa(path: str, words: list[str]) -> None:
    """SGLang's GPQA on a CSV file, with the last lines and the result file that run_eval has."""
    from sglang.test.run_eval import parse_json_object, run_eval_once
    from sglang.test.simple_eval_common import set_ulimit
    from sglang.test.simple_eval_gpqa import GPQAEval

    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--num-examples", type=int)
    parser.add_argument("--num-threads", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--reasoning-effort")
    parser.add_argument("--chat-template-kwargs", type=parse_json_object)
    arguments = parser.parse_args(words)
    os.environ.setdefault("OPENAI_API_KEY", "EMPTY")
    set_ulimit()
    evaluation = GPQAEval(path, arguments.num_examples, arguments.num_threads)
    result, _, _ = run_eval_once(arguments, f"{arguments.base_url}/v1", evaluation)
    file = Path(tempfile.mkdtemp(prefix="gpqa-")) / "result.json"
    file.write_text(json.dumps({"score": float(result.score)}))
    print(f"Writing results to {file}")


def load_all(words: list[str]) -> dict[str, dict[str, str | int]]:
    """`load` for each `name=path`; what raised has `error` instead."""
    found: dict[str, dict[str, str | int]] = {}
    for word in words:
        name, _, path = word.partition("=")
        try:
            found[name] = load(name, path)
        except Exception as error:  # SGLang raises what its libraries do: all of it means no questions.
            found[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return found


if __name__ == "__main__":
    if sys.argv[1] == "load":
        print(json.dumps(load_all(sys.argv[2:])))
    else:
        gpqa(sys.argv[2], sys.argv[3:])
