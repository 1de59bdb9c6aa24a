"""All layers of DeepSeek-V4-Flash through `sglang-sm120 serve --config`, with random weights, on H200s.

All experts on two cards, half of them on one. What the plan says of memory is held against what SGLang reports, and the
time of a decode step is printed.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from test_server import environment

import decode_step
from local_server import free_port
from sglang_sm120.checkpoint.config import model_config

CONFIG = Path(__file__).parents[2] / "configs/deepseek-v4-flash.2x-h200.tp2.yaml"
RANDOM_WEIGHTS = Path(decode_step.__file__).parent / "random_weights"
NEEDED = 140_000 << 20
TOLERANCE = 0.01
"""Of the memory plan, what the issue of the step on a GPU allows."""
SCALES = 1 / 17
"""Of the experts' bytes: one for 32 weights of half a byte."""
START_SECONDS = 600
CONTEXT = 1024


def planned_and_reported(log: str) -> dict[str, tuple[float, float]]:
    """What `serve` planned and what SGLang then reported: GiB of weights, tokens, window tokens, bytes a token."""
    parts = dict(re.findall(r"^ +(experts|other weights|rotation tables) +-([\d.]+) GiB$", log, re.MULTILINE))
    # Until the step is built.
    bf16 = re.search(r"wo_a is there in FP8 alone; beside SGLang as released it takes ([\d.]+) GiB in bf16", log)
    pools = re.search(r"hold (\d+) tokens of context at (\d+) bytes; the window pool (\d+) tokens", log)
    loaded = re.search(r"Load weight end\..* mem usage=([\d.]+) GB", log)
    token = re.search(r"bytes_per_full_token=([\d.]+)", log)
    sizes = re.search(r"DSV4 pool sizes: full=(\d+), swa=(\d+)", log)
    assert len(parts) == 3 and bf16 and pools and loaded and token and sizes, log[-3000:]
    # On this card SGLang loads the experts' scales as fp32, which the step makes bytes again.
    widened = 3 * SCALES * float(parts["experts"])
    return {
        "weights": (sum(map(float, (*parts.values(), bf16[1]))) + widened, float(loaded[1])),
        "tokens": (float(pools[1]), float(sizes[1])),
        "window tokens": (float(pools[3]), float(sizes[2])),
        "bytes per token": (float(pools[2]), float(token[1])),
    }


@pytest.mark.parametrize("cards", [1, 2])
def test_serve_with_the_h200_config(tmp_path: Path, seed: int, cards: int) -> None:
    memory = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    if len(memory) < cards or min(memory[:cards]) < NEEDED:
        pytest.skip(f"{[size >> 20 for size in memory]} MiB of GPU memory, needed {cards} times {NEEDED >> 20}")
    decode_step.write_model(tmp_path / "model", model_config()["n_routed_experts"] * cards // 2)
    settings = yaml.safe_load(CONFIG.read_text())
    settings["for"]["cards"] = settings["server"]["tp-size"] = cards
    (tmp_path / "h200.yaml").write_text(yaml.safe_dump(settings))
    port = free_port()
    words = ["serve", "--model", str(tmp_path / "model"), "--config", str(tmp_path / "h200.yaml")]
    words += ["--gpus", ",".join(map(str, range(cards)))]
    words += ["--start-limit", str(START_SECONDS), "--", "--load-format", "dummy", "--grammar-backend", "none"]
    log = Path(os.environ.get("OUT") or tmp_path) / f"whole-model-{cards}.log"
    variables = os.environ | environment()
    variables["PYTHONPATH"] = os.pathsep.join((str(RANDOM_WEIGHTS), variables.get("PYTHONPATH", "")))
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang_sm120_launch", *words, "--port", str(port)],
            stdout=out, stderr=subprocess.STDOUT, env=variables, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_SECONDS
        while "evidence for this configuration" not in log.read_text(errors="replace"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(1)
        rng = random.Random(seed)
        for batch in (1, 8, 32):
            ms = decode_step.step_ms(f"http://127.0.0.1:{port}", batch, CONTEXT, rng)
            print(f"TP {cards}, {CONTEXT} tokens, random weights, batch {batch}: {ms:.2f} ms a step")
        process.send_signal(signal.SIGINT)
        process.wait(30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = log.read_text(errors="replace")
    assert "An overlay kernel was compiled while serving" not in text
    for name, (planned, reported) in planned_and_reported(text).items():
        print(f"{name}: planned {planned:,.2f}, SGLang reports {reported:,.2f}")
        assert abs(planned - reported) <= TOLERANCE * reported, name


@pytest.mark.needs_no_gpu
def test_the_report_is_read() -> None:
    """Lines as `serve` and SGLang 0.5.23 print them, some shortened; their figures are no run's."""
    log = """
  experts                        -68.53 GiB
  other weights                   -3.38 GiB
  rotation tables                 -0.50 GiB
  wo_a FP8 (the step)             -0.67 GiB
  wo_a is there in FP8 alone; beside SGLang as released it takes 1.34 GiB in bf16 too.
  The pools hold 3585024 tokens of context at 15956 bytes; the window pool 358400 tokens, 40960 needed.
[TP0] Load weight end. elapsed=1.77 s, type=DeepseekV4ForCausalLM, quant=fp8, avail mem=52.10 GB, mem usage=86.20 GB.
[TP0] DSV4 memory calculation: unified=False, unified_fp8=False, bytes_per_full_token=15955.85, full_token=3592192
[TP0] DSV4 pool sizes: full=3592192, swa=359168, c4=898048, c128=28064, c4_state=22448, c128_state=359168
"""
    found = planned_and_reported(log)
    assert found["tokens"] == (3585024, 3592192) and found["window tokens"] == (358400, 359168)
    assert found["weights"] == (pytest.approx(85.84, abs=0.01), 86.20) and found["bytes per token"] == (15956, 15955.85)
