"""The server with the step on this machine's GPUs: the Triton kernels in CUDA graphs against the torch references.

One checkpoint of full width and six layers is written here, and one of V4-Pro's width and two. Each configuration is
one server, shared by its tests; two GPUs run tensor-parallel too. On a Hopper card the servers' Triton kernels are
lowered as for SM120.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import sm120_lowering
import traces
from local_server import LocalServer
from recall import GRAPHS
from sglang_sm120.checkpoint.config import PRO, model_config
from sglang_sm120_reference.write import main as write_checkpoint
from side_by_side import EAGLE

LENGTHS = (1, 2, 5, 63, 127, 128, 129, 300, 700, 2047, 2048, 2600, 4000, 6000, 11_000, 20_000)
NEW_TOKENS = 24
VOCABULARY = 4096
LAYERS = "0,0,4,128,4,128"
TOLERANCE = 0.05
"""Of a log-probability, as between server and oracle (`oracle.LOGPROB_TOLERANCE`): bf16 rounding through six layers."""
TIE = 2 * TOLERANCE
MAX_EXCLUDED = 0.02
"""Share of positions where rounding may have decided between two experts or index entries."""
SCORED = 2600
"""Prompts up to this length are compared at every position."""
# What sixteen of the longest prompts need, so that several servers fit a card.
FLAGS = (
    "--mem-fraction-static", "0.5", "--max-total-tokens", "400000", "--grammar-backend", "none", "--log-level", "info",
)  # fmt: skip
NO_GRAPHS = ("--disable-decode-cuda-graph", "--disable-prefill-cuda-graph")
AS_BLACKWELL = """
from types import SimpleNamespace


def register():
    from sglang.srt.layers.quantization import modelopt_quant

    modelopt_quant.get_platform = lambda: SimpleNamespace(is_blackwell=True)
"""
TPS = (1, 2)
LOWERED = Path(__file__).parents[2] / "bench/lowered_children"
"""On PYTHONPATH: a server's processes lower their Triton kernels as for SM120."""


@dataclass
class Greedy:
    """One greedy answer: tokens, for each the gap between the best two log-probabilities, and those of the prompt."""

    tokens: list[int]
    gaps: list[float]
    prompt: torch.Tensor


def environment() -> dict[str, str]:
    found = {"HF_HUB_OFFLINE": "1", "FLASHINFER_DISABLE_VERSION_CHECK": "1"}
    # Or a server with TP 2 does not start while another one loads on one of its GPUs.
    found["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"
    if torch.cuda.get_device_capability()[0] == 9:
        found |= sm120_lowering.SERVER_ENVIRONMENT
        found["PYTHONPATH"] = f"{LOWERED}:{os.environ.get('PYTHONPATH', '')}"
    return found


def flags_of_card() -> tuple[str, ...]:
    return sm120_lowering.SERVER_FLAGS if torch.cuda.get_device_capability()[0] == 9 else ()


def untouched(place: Path) -> Path:
    """A folder for PYTHONPATH: SGLang as released, and this package as its wheel has it, without the series."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    site = Path(spec.origin).parents[1]
    released = [site / "sglang", *site.glob("sglang-*.dist-info")]
    package = [site / "sglang_sm120", *site.glob("sglang_sm120-*.dist-info")]
    for folder in (*released, *package):
        shutil.copytree(folder, place / folder.name)
    # It takes the package away with the patches.
    tool = Path(__file__).parents[2] / "patches/patchset.py"
    subprocess.run([sys.executable, tool, "unapply", "--site", place], check=True)
    for folder in package:
        shutil.copytree(folder, place / folder.name)
    shutil.rmtree(place / "sglang_sm120/series")
    return place


@pytest.mark.needs_no_gpu
def test_the_untouched_sglang_is_untouched(tmp_path: Path) -> None:
    """Its start-up check passes, and SGLang itself finds the plugin and nothing that turns it on."""
    place = untouched(tmp_path)
    line = (
        "import sglang, sglang_sm120; from sglang_sm120 import startup; startup.check(); "
        "from sglang.srt.kernel_plugins.nvidia import binding; "
        "print(sglang.__file__, sglang_sm120.__file__, binding.plugin_reasons(), hasattr(binding, 'settle_default'))"
    )
    env = os.environ | {"PYTHONPATH": str(place)}
    said = subprocess.run([sys.executable, "-c", line], env=env, capture_output=True, text=True, check=True).stdout
    assert said.split()[-4:] == [f"{place}/sglang/__init__.py", f"{place}/sglang_sm120/__init__.py", "[]", "False"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide(tmp_path_factory.mktemp("wide"), model_config(), LAYERS, 16)


def wide(place: Path, config: dict[str, Any], layers: str, experts: int, *more: str) -> Path:
    """A checkpoint of a model's width with few layers and experts, in a folder of `place`."""
    pytest.importorskip("sglang.launch_server")
    (like := place / "like.json").write_text(json.dumps(config))
    arguments = ("--like", like, "--ratios", layers, "--n-routed-experts", experts, "--vocab-size", VOCABULARY)
    write_checkpoint([str(place / "model"), *map(str, arguments), *(more or ("--mtp",))])
    return place / "model"


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(os.environ.get("OUT") or tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def prompts(request: pytest.FixtureRequest) -> list[list[int]]:
    rng = random.Random(zlib.crc32(request.node.nodeid.encode()))
    return [[rng.randrange(300, VOCABULARY) for _ in range(length)] for length in LENGTHS]


def generate(server: LocalServer, body: dict[str, Any]) -> Any:
    response = httpx.post(f"{server.url}/generate", json=body, timeout=300)
    response.raise_for_status()
    return response.json()


def greedy(server: LocalServer, batch: list[list[int]]) -> list[Greedy]:
    """Answers to prompts that are prefilled and decoded together."""
    sampling = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    starts = [0 if len(prompt) <= SCORED else -1 for prompt in batch]
    options = {"return_logprob": True, "top_logprobs_num": [2] * len(batch), "logprob_start_len": starts}
    replies = generate(server, {"input_ids": batch, "sampling_params": sampling, **options})
    answers = []
    for reply in replies:
        meta = reply["meta_info"]
        gaps = [first[0] - second[0] for first, second in meta["output_top_logprobs"]]
        scored = [entry[0] for entry in meta["input_token_logprobs"][1:]]
        answers.append(Greedy(reply["output_ids"], gaps, torch.tensor(scored)))
    return answers


def sampled(server: LocalServer, count: int, seed: int) -> None:
    """`count` sampled requests, 16 at a time, each answered in full."""
    rng = random.Random(seed)
    batch = [[rng.randrange(300, VOCABULARY) for _ in range(rng.randrange(1, 800))] for _ in range(count)]
    sampling = {"max_new_tokens": 32, "temperature": 0.7, "top_p": 0.9, "ignore_eos": True}

    def one(ids: list[int]) -> list[int]:
        return generate(server, {"input_ids": ids, "sampling_params": sampling})["output_ids"]

    with ThreadPoolExecutor(16) as pool:
        for tokens in pool.map(one, batch):
            assert len(tokens) == 32
            assert all(0 <= token < VOCABULARY for token in tokens)


def halving(scores: torch.Tensor) -> float:
    """The temperature that gives the largest of log-probabilities a half."""
    low, high = 1e-4, 1e3
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if (scores.double() / middle).softmax(0).max() > 0.5 else (low, middle)
    return low


@pytest.mark.needs_no_gpu
def test_a_half_is_what_the_likeliest_gets() -> None:
    scores = torch.tensor([-9.0, -0.1, -3.0, -3.5]).log_softmax(0)
    assert abs(float((scores.double() / halving(scores)).softmax(0)[1]) - 0.5) < 1e-9


def first_difference(a: list[int], b: list[int]) -> int:
    """Where two answers part; their length where they do not."""
    assert len(a) == len(b)
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def assert_agree(found: list[Greedy], expected: list[Greedy]) -> None:
    """Log-probabilities of the prompts within tolerance, and the same tokens until one where two were as likely."""
    errors = torch.cat([(a.prompt - b.prompt).abs() for a, b in zip(found, expected, strict=True)])
    excluded = (errors > TOLERANCE).float().mean().item()
    within = errors[errors <= TOLERANCE]
    print(f"{len(errors)} prompt positions: median error {errors.median():.4f}, {excluded:.2%} above {TOLERANCE}, "
          f"largest {errors.max():.3f}, largest within {within.max():.3f}")  # fmt: skip
    same = 0
    for length, a, b in zip(LENGTHS, found, expected, strict=True):
        at = first_difference(a.tokens, b.tokens)
        same += at
        assert at == NEW_TOKENS or b.gaps[at] < TIE, f"prompt of {length} tokens: token {at} differs, gaps {b.gaps}"
    print(f"{same} of {len(LENGTHS) * NEW_TOKENS} tokens are the same up to the first that differs, a tie each time")
    # Or an early tie in each answer would leave nothing to compare.
    assert same >= len(LENGTHS) * NEW_TOKENS // 4
    assert len(errors) > 7000
    assert excluded <= MAX_EXCLUDED


def assert_step_served(server: LocalServer, *modes: str) -> None:
    """Where the plugin contract refuses the step, SGLang answers by itself and only says so in its log."""
    text = server.log.read_text(errors="replace")
    for mode in modes:
        assert f"the step takes its first {mode} pass" in text, text[-3000:]


def assert_nothing_compiled_late(server: LocalServer) -> None:
    text = server.log.read_text(errors="replace")
    assert "kernels ready" in text
    assert "An overlay kernel was compiled while serving" not in text
    # SGLang's own Triton kernels still compile while it serves: they are logged, and do not fail this.
    assert "was built with nvcc" not in text.partition("fired up and ready")[2]


@pytest.fixture(scope="module", params=TPS, ids=lambda tp: f"tp{tp}")
def tp(request: pytest.FixtureRequest) -> int:
    if torch.cuda.device_count() < request.param:
        pytest.skip(f"{torch.cuda.device_count()} GPU, needed {request.param}")
    return request.param


@pytest.fixture(scope="module")
def expected(checkpoint: Path, logs: Path, prompts: list[list[int]]) -> list[Greedy]:
    return references(checkpoint, logs / "torch.log", prompts)


def references(
    checkpoint: Path,
    log: Path,
    prompts: list[list[int]],
    env: Mapping[str, str] | None = None,
    card: tuple[str, ...] | None = None,
) -> list[Greedy]:
    """The torch provider's answers on one card, whatever the server's TP: prefill in chunks, no CUDA graph."""
    flags = (*FLAGS, *(card or flags_of_card()), *NO_GRAPHS, "--chunked-prefill-size", "2048")
    env = {**(env or environment()), "SGLANG_SM120_PROVIDER": "torch"}
    with LocalServer(checkpoint, *flags, log=log, env=env, ready_seconds=300) as server:
        found = greedy(server, prompts)
        assert_step_served(server, "decode")
        return found


@pytest.fixture(scope="module")
def server(checkpoint: Path, logs: Path, tp: int, expected: list[Greedy]) -> Iterator[LocalServer]:
    """The Triton provider with CUDA graphs; `expected` first, as two servers may not fit one card."""
    log = logs / f"triton-tp{tp}.log"
    flags = (*FLAGS, *flags_of_card(), *GRAPHS, "--tp", str(tp))
    with LocalServer(checkpoint, *flags, log=log, env=environment(), ready_seconds=400) as running:
        yield running


@pytest.fixture(scope="module")
def answers(server: LocalServer, prompts: list[list[int]]) -> list[Greedy]:
    return greedy(server, prompts)


def test_greedy_tokens_equal_the_torch_providers(
    server: LocalServer, answers: list[Greedy], expected: list[Greedy]
) -> None:
    assert_agree(answers, expected)
    assert_step_served(server, "decode")


def test_batch_size_does_not_change_an_answer(
    server: LocalServer, prompts: list[list[int]], expected: list[Greedy]
) -> None:
    assert_agree([greedy(server, [prompt])[0] for prompt in prompts], expected)


def test_200_sampled_requests(server: LocalServer, seed: int) -> None:
    sampled(server, 200, seed)


def test_unfiltered_samples_follow_the_distribution(
    server: LocalServer, prompts: list[list[int]], expected: list[Greedy]
) -> None:
    """The likeliest token comes as often as the log-probabilities of each sample's own pass say.

    The temperature gives it a half. Rounding in another batch moves that half, so that each sample is judged by its own
    pass, after the prompt where the likeliest leads by most: where two are as likely, rounding alone would decide.
    """
    leads = [answer.gaps[0] for answer in expected]
    prompt, count = prompts[leads.index(max(leads))], 400
    top = {"return_logprob": True, "top_logprobs_num": 64}
    one = {"max_new_tokens": 1, "temperature": 0}
    meta = generate(server, {"input_ids": prompt, "sampling_params": one, **top})["meta_info"]
    scores = torch.tensor([entry[0] for entry in meta["output_top_logprobs"][0]], dtype=torch.float64)
    likeliest = meta["output_top_logprobs"][0][0][1]
    body = {"input_ids": [prompt] * count, "sampling_params": {"max_new_tokens": 1, "temperature": halving(scores)}}
    replies = generate(server, body | {"return_logprob": True, "top_logprobs_num": [64] * count})
    shares = []
    for reply in replies:
        found = {token: score for score, token, _ in reply["meta_info"]["output_top_logprobs"][0]}
        # SGLang's are of the temperature.
        assert sum(map(math.exp, found.values())) > 0.99
        shares.append(math.exp(found[likeliest]))
    hits = sum(reply["output_ids"][0] == likeliest for reply in replies)
    print(f"{hits} of {count} samples, expected {sum(shares):.0f}; shares {min(shares):.3f} to {max(shares):.3f}")
    # Five standard deviations.
    assert abs(hits - sum(shares)) < 5 * sum(share * (1 - share) for share in shares) ** 0.5
    assert 0.05 < sum(shares) / count < 0.95


def test_samples_without_log_probabilities_follow_the_distribution(
    server: LocalServer, prompts: list[list[int]]
) -> None:
    """Drawn from the logits, without a softmax (`step/sample.py`): the likeliest few as often as another pass says."""
    prompt, count = prompts[LENGTHS.index(300)], 400
    sampling = {"max_new_tokens": 1, "temperature": 1.0}
    one = {"return_logprob": True, "top_logprobs_num": 64, "sampling_params": sampling}
    top = generate(server, {"input_ids": prompt, **one})["meta_info"]["output_top_logprobs"][0]
    # As many of them as have a third together, or all.
    mass, few = 0.0, set()
    for score, token, _ in top:
        mass += math.exp(score)
        few.add(token)
        if mass > 0.33:
            break
    replies = generate(server, {"input_ids": [prompt] * count, "sampling_params": sampling})
    hits = sum(reply["output_ids"][0] in few for reply in replies)
    print(f"{hits} of {count} samples among {len(few)} tokens, expected {mass * count:.0f}")
    # Five standard deviations; rounding in another batch moves a log-probability by some hundredths.
    assert abs(hits - mass * count) < 5 * (count * mass * (1 - mass)) ** 0.5 + 0.05 * mass * count
    assert 0.02 < mass < 0.98


def test_no_kernel_that_sm120_lacks(server: LocalServer, logs: Path, prompts: list[list[int]]) -> None:
    folder = logs / "trace"
    folder.mkdir(exist_ok=True)
    httpx.post(f"{server.url}/start_profile", json={"output_dir": str(folder), "activities": ["GPU"]}, timeout=60)
    greedy(server, [prompts[LENGTHS.index(length)] for length in (1, 300, 2600)])
    generate(server, {"input_ids": prompts[0], "sampling_params": {"max_new_tokens": 4, "temperature": 1.0}})
    httpx.post(f"{server.url}/stop_profile", timeout=120)
    found = [kernel for trace in folder.rglob("*.json.gz") for kernel in traces.read(trace)]
    names = {kernel.name for kernel in found}
    assert any(kernel.graph for kernel in found) and {"_attend", "_best_of_row"} <= names, names
    assert not traces.foreign(found)


def test_nothing_was_compiled_while_serving(server: LocalServer) -> None:
    assert_nothing_compiled_late(server)


def test_two_layers_of_v4_pro(tmp_path: Path, logs: Path, prompts: list[list[int]]) -> None:
    """At full width on one card: a hashed layer with c128, and a scored one whose indexer chooses 1,024 entries."""
    folder = wide(tmp_path, model_config(PRO) | {"num_hash_layers": 1}, "128,4", 24)
    expected = references(folder, logs / "pro-torch.log", prompts)
    flags = (*FLAGS, *flags_of_card(), *GRAPHS)
    with LocalServer(folder, *flags, log=logs / "pro.log", env=environment(), ready_seconds=400) as server:
        assert_agree(greedy(server, prompts), expected)
        assert_step_served(server, "decode")
        assert_nothing_compiled_late(server)


@pytest.fixture
def nvfp4_environment(tmp_path: Path) -> dict[str, str]:
    """`environment` of servers in which SGLang's class of NVFP4 experts takes this card for Blackwell.

    It asks when it is made, before any kernel of its own; on SM12x the answer is true already.
    """
    (tmp_path / "as_blackwell.py").write_text(AS_BLACKWELL)
    (told := tmp_path / "as_blackwell-1.dist-info").mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: as-blackwell\nVersion: 1\n")
    (told / "entry_points.txt").write_text("[sglang.srt.plugins]\nas_blackwell = as_blackwell:register\n")
    found = {"SGLANG_SM120_PREFILL": "overlay", **environment()}
    return found | {"PYTHONPATH": f"{tmp_path}:{found.get('PYTHONPATH', os.environ.get('PYTHONPATH', ''))}"}


def test_nvfp4_experts(tmp_path: Path, logs: Path, prompts: list[list[int]], nvfp4_environment: dict[str, str]) -> None:
    """At full width on one card, a layer of each kind."""
    folder = wide(tmp_path, model_config(), "0,4,128", 16, "--nvfp4-experts", "--no-mtp")
    own = ("--moe-runner-backend", "flashinfer_mxfp4", "--disable-flashinfer-autotune", "--disable-prefill-cuda-graph")
    card = flags_of_card() or own
    expected = references(folder, logs / "nvfp4-torch.log", prompts, nvfp4_environment, card)
    flags = (*FLAGS, *card, *GRAPHS)
    with LocalServer(folder, *flags, log=logs / "nvfp4.log", env=nvfp4_environment, ready_seconds=400) as server:
        assert_agree(greedy(server, prompts), expected)
        assert_step_served(server, "decode")
        assert_nothing_compiled_late(server)


def test_an_untouched_sglang_with_the_flag(
    checkpoint: Path, logs: Path, tmp_path: Path, tp: int, prompts: list[list[int]], expected: list[Greedy]
) -> None:
    """SGLang as released, this package as a wheel beside it, and `--enable-nvidia-megakernel`."""
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join((str(untouched(tmp_path)), env.get("PYTHONPATH", "")))
    flags = (*FLAGS, *flags_of_card(), *GRAPHS, "--tp", str(tp), "--enable-nvidia-megakernel")
    log = logs / f"untouched-tp{tp}.log"
    with LocalServer(checkpoint, *flags, log=log, env=env, ready_seconds=400) as server:
        assert_agree(greedy(server, prompts), expected)
        assert_step_served(server, "decode")
        assert_nothing_compiled_late(server)


def test_mtp_answers_as_without(
    checkpoint: Path, logs: Path, tp: int, prompts: list[list[int]], expected: list[Greedy], seed: int
) -> None:
    flags = (*FLAGS, *flags_of_card(), *GRAPHS, *EAGLE, "--tp", str(tp))
    with LocalServer(checkpoint, *flags, log=logs / f"mtp-tp{tp}.log", env=environment(), ready_seconds=400) as server:
        assert_agree(greedy(server, prompts), expected)
        sampled(server, 50, seed)
        assert server.alive()
        assert_step_served(server, "target_verify")
        assert_nothing_compiled_late(server)
