"""Which modules SGLang and FlashInfer build for DeepSeek-V4 on a card: SGLang's scheduler serves requests on one that
is not there (`fake_card`), and `sglang_sm120.step.modules` lists what is asked for.

    python tests/launch/trace_modules.py sm120 OUT [SGLang's flags …]      one run, as JSON lines
    python tests/launch/trace_modules.py --renew                           every run of RUNS, into the launcher's list
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from array import array
from contextlib import nullcontext
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2] / "reference"))

from sglang_sm120.checkpoint.config import DSPARK_FOLDER  # noqa: E402
from sglang_sm120_launch.comms import PCIE_IPC  # noqa: E402
from sglang_sm120_reference.config_file import FLASH_DRAFTER  # noqa: E402


class Run(NamedTuple):
    """A server: SGLang's flags, and the variables that it is started with."""

    flags: tuple[str, ...] = ()
    variables: dict[str, str] = {}


TP2 = ("--tp-size", "2")
EAGLE = ("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3", "--speculative-eagle-topk", "1",
         "--speculative-num-draft-tokens", "4")  # fmt: skip
DSPARK = ("--speculative-algorithm", "DSPARK", "--max-running-requests", "64",
          "--cuda-graph-bs-decode", "1", "2", "64")  # fmt: skip
"""With the largest batch of a plan: the step takes fewer rows than its 384 to verify, which are SGLang's forward's."""
COMPACT = {"SGLANG_RAGGED_VERIFY_MODE": "compact"}
"""Verification of as many drafts as are worth it, in place of whole blocks (`static`)."""
RUNS = {
    "tp1": Run(), "tp2": Run(TP2), "eagle": Run(EAGLE), "eagle-tp2": Run((*EAGLE, *TP2)),
    "dspark": Run(DSPARK), "dspark-tp2": Run((*DSPARK, *TP2)),
    "dspark-compact": Run(DSPARK, COMPACT), "dspark-compact-tp2": Run((*DSPARK, *TP2), COMPACT),
    # As planned for more than two cards that reach each other over PCIe.
    "pcie-tp4": Run(("--tp-size", "4"), {PCIE_IPC: "1"}),
}  # fmt: skip
ARCHS = ("sm120",)
LIST = Path(__file__).parents[2] / "launch/sglang_sm120_launch/modules.json"
LAYERS = 6
"""Of the model's layers: hashed, plain, and both kinds of compression are among them."""
FLAGS = ("--load-format", "dummy", "--skip-tokenizer-init", "--max-total-tokens", "65536",
         "--max-running-requests", "8", "--chunked-prefill-size", "4096", "--context-length", "32768",
         "--cuda-graph-bs-decode", "1", "2", "--disable-custom-all-reduce")  # fmt: skip
REQUESTS: dict[int, list[tuple[int, dict[str, Any]]]] = {
    2: [(5, {"temperature": 0})],
    20: [(300, {"temperature": 0.7, "top_p": 0.9}), (40, {"temperature": 1.0, "top_k": 20})],
    40: [(5000, {"temperature": 1.0, "min_p": 0.1}), (700, {"temperature": 1.0, "top_k": 9, "top_p": 0.5})],
    60: [(17, {"temperature": 1.0}), (90, {"temperature": 1.0, "frequency_penalty": 0.5})],
    80: [(30, {"temperature": 0}), (60, {"temperature": 1.0, "top_k": 50})],
}
"""By turn of the scheduler's loop: prompts' lengths and how their tokens are drawn."""


def model(folder: Path) -> Path:
    """The published configuration with few layers, and that of its DSpark drafter, which sees the last of them."""
    config = json.loads(resources.files("sglang_sm120").joinpath("model-config.json").read_text())
    ratios = config["compress_ratios"]
    config |= {"num_hidden_layers": LAYERS, "compress_ratios": [*ratios[:LAYERS], ratios[-1]]}
    seen = [*range(LAYERS)][-len(FLASH_DRAFTER["dspark_target_layer_ids"]) :]
    drafter = config | FLASH_DRAFTER | {"dspark_target_layer_ids": seen}
    (folder / DSPARK_FOLDER).mkdir()
    for place, content in ((folder, config), (folder / DSPARK_FOLDER, drafter)):
        (place / "config.json").write_text(json.dumps(content))
    return folder


def serve(arch: str, out: str, flags: list[str]) -> None:
    """Serve REQUESTS on a card of `arch`, whose modules are listed in the file `out`."""
    import fake_card

    number = int(arch.removeprefix("sm"))
    os.environ |= {"SGLANG_SM120_MODULES": out, "FLASHINFER_CUDA_ARCH_LIST": f"{number // 10}.{number % 10}"}
    fake_card.install((number // 10, number % 10))
    import torch
    from flashinfer import autotuner, sampling
    from flashinfer.jit import core
    from flashinfer.mla import _sparse_mla_sm120
    from sglang.benchmark.one_batch import SpawnRanks, publish, spawn_world_rank
    from sglang.kernels.jit.utils.compile import loader
    from sglang.srt.distributed.device_communicators import pynccl, shm_broadcast
    from sglang.srt.managers import scheduler as managers
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.model_loader import loader as weights
    from sglang.srt.plugins import load_plugins
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.server_args import PortArgs, prepare_server_args

    import sglang_sm120.step.modules
    import sglang_sm120.warmup

    # What is asked for is noted before it is looked for: everything is found.
    loader._find_prebuilt = lambda *, spec, scope: spec.module_name
    loader._load = fake_card.Nothing
    core.JitSpecNvcc.try_load = lambda self: fake_card.Nothing(self.name)
    plan, u8 = "sgl_kernel_jit_dpsk_v4_compress_plan", {"dtype": torch.uint8, "device": "cuda:0"}
    fake_card.Nothing.answers |= {
        f"{plan}.plan_decode": lambda rows, *_: torch.zeros(rows.shape[0], 16, **u8),
        f"{plan}.plan_prefill": lambda *a: (torch.zeros(a[6], 16, **u8), torch.zeros(a[6], 8, **u8)),
        "fused_moe_120.init": lambda *_, **__: fake_card.Nothing("experts"),
    }
    torch.from_dlpack = lambda tensor: tensor
    attention = _sparse_mla_sm120._sparse_mla_sm120_paged_attention

    def asks_its_module(*args: Any, **arguments: Any) -> None:
        # The module, which answers which formats it has, is not there.
        try:
            attention(*args, **arguments)
        except TypeError as error:
            assert "not iterable" in str(error), error

    _sparse_mla_sm120._sparse_mla_sm120_paged_attention = asks_its_module
    autotuner.AutoTuner.choose_one = lambda self, name, runners, *_, **__: (runners[0], -1)
    sampling.get_seed_and_offset = lambda *_, **__: (0, 0)
    weights.initialize_dummy_weights = lambda model: None
    sglang_sm120.warmup.warm_up = lambda *_, **__: None
    # Requests ask for them here.
    sglang_sm120.step.modules.late_ones = lambda *_: nullcontext()
    shm_broadcast.MessageQueue.create_from_process_group = staticmethod(fake_card.Nothing)
    pynccl.PyNcclCommunicator = type("Quiet", (fake_card.Nothing,), {"change_state": lambda self, **_: self})

    load_plugins()
    with tempfile.TemporaryDirectory() as folder:
        arguments = prepare_server_args(["--model-path", str(model(Path(folder))), *FLAGS, *flags])
        arguments.resolve_once()
        ports = PortArgs.init_new(arguments)
        ranks = SpawnRanks(world_rank=spawn_world_rank(arguments, tp_rank=0, pp_rank=0), dp_rank=None, gpu_id=0)
        publish(arguments, role="scheduler", ranks=ranks)
        managers.configure_scheduler_process(arguments, 0)
        with fake_card.present():
            scheduler = managers.Scheduler(arguments, ports)
            turn, served = 0, 0

            def ingest() -> None:
                nonlocal turn, served
                turn += 1
                for length, drawn in REQUESTS.get(turn, []):
                    params = SamplingParams(max_new_tokens=6, ignore_eos=True, **drawn)
                    params.normalize(None)
                    ids = array("q", random.choices(range(1000), k=length))
                    served += 1
                    scheduler.handle_generate_request(
                        TokenizedGenerateReqInput(
                            rid=str(served), input_text="", input_ids=ids, input_embeds=None, mm_inputs=None,
                            token_type_ids=None, sampling_params=params, return_logprob=False, logprob_start_len=-1,
                            top_logprobs_num=0, token_ids_logprob=None, stream=False,
                        )  # fmt: skip
                    )
                scheduler.gracefully_exit = turn > max(REQUESTS) + 30

            scheduler.ingest_requests = ingest
            scheduler.run_event_loop()
    print(f"served {served} requests", flush=True)
    os._exit(0)


def traced(arch: str, run: Run) -> dict[str, dict[str, Any]]:
    """By name, every module that a run in a process of its own asks for."""
    # A home of its own: FlashInfer keeps there which of its kernels is the fastest, which this does not find out. The
    # tests' interpreter of Triton's kernels would read the card's tensors.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as home:
        out = Path(home) / "modules.jsonl"
        done = subprocess.run(
            [sys.executable, __file__, arch, str(out), *run.flags],
            env={**environment, "HOME": home, **run.variables}, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        wanted = f"served {sum(map(len, REQUESTS.values()))} requests"
        assert wanted in done.stdout, done.stdout[-3000:] + done.stderr[-6000:]
        entries = [json.loads(line) for line in out.read_text().splitlines()]
    return {entry["name"]: entry for entry in entries}


def renew() -> None:
    """Trace every run of every card into the launcher's list."""
    cards: dict[str, list[dict[str, Any]]] = {}
    for arch in ARCHS:
        merged: dict[str, dict[str, Any]] = {}
        for name, run in RUNS.items():
            for module, entry in traced(arch, run).items():
                merged.setdefault(module, {**entry, "runs": []})["runs"].append(name)
            print(arch, name, len(merged), flush=True)
        cards[arch] = [merged[name] for name in sorted(merged)]
    found = {
        "traced": "on a CPU with a stand-in for the card, by tests/launch/trace_modules.py",
        **{package: version(package) for package in ("sglang", "flashinfer-python")},
        "cards": cards,
    }
    LIST.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--renew"]:
        renew()
    else:
        serve(sys.argv[1], sys.argv[2], sys.argv[3:])
