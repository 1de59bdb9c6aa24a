"""SGLang's kernel plugin `nvidia_megakernel`: which passes of DeepSeek-V4 the step serves, and why not when not.

On SM12x SGLang's own binding builds the spec and installs the forward (`--enable-nvidia-megakernel`, or by default
where the series is applied); on a CPU, where that binding refuses, a patch calls `install_on_cpu`.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import torch
from sglang.kernels.plugin_kernels.nvidia import spec

from . import limits, registry
from .limits import MAX_ROWS
from .step import loading, modules
from .step.passes import Passes
from .step.reasons import (
    DRAFT_MODES,
    DSPARK_MODES,
    MODEL_TYPE,
    TARGET_MODES,
    config_reasons,
    emulated,
    model_reasons,
    takes_prefill,
    unusable,
    why_alone,
    why_left,
)  # fmt: skip

logger = logging.getLogger(__name__)

TARGET = "DeepseekV4ForCausalLM"
DRAFT = "DeepseekV4ForCausalLMNextN"
DSPARK = "DeepseekV4ForCausalLMDSpark"


def register() -> None:
    """Entry point `nvidia_megakernel` of the group `sglang.srt.plugins`."""
    spec.register(architecture=TARGET, path=f"{__name__}:SPEC")
    if os.environ.get(modules.LIST):
        modules.watch()
    if loading.wanted():
        loading.serve()


def mode_of(forward_batch: Any) -> str:
    """The pass's mode by its name in this project: decode, target_verify, extend, …"""
    return forward_batch.forward_mode.name.lower()


class Built:
    """The step of one loaded model, as SGLang's contract wants it (`BuiltMegakernel`).

    Args:
        step: of the target or of the draft.
        widths: rows of the passes in CUDA graphs that it may take.
        modes: which passes those are, as `why_left` wants them.
        counts: as in `Passes`.
        alone: why SGLang's forward cannot serve what is left to it; None where it can.
    """

    draft_sampler = None

    def __init__(
        self, step: Callable[..., Any], widths: tuple[int, ...], modes: Mapping[str, str], counts: bool = False,
        alone: str | None = None,
    ) -> None:  # fmt: skip
        self.widths = widths
        self._alone = alone
        self.passes = Passes(counts)
        self._step = Checked(step)
        self._modes = modes

    def summary(self) -> str:
        prefill = "prefill, " if takes_prefill() else ""
        return f"{prefill}{' and '.join(self._modes.values())} up to {self.widths[-1]} rows"

    def plan(self, input_ids: torch.Tensor, forward_batch: Any, *args: Any, **kwargs: Any) -> spec.Step | None:
        mode, rows = mode_of(forward_batch), input_ids.shape[0]
        why = why_left(self._modes, mode, rows, kwargs)
        if why is not None:
            if self._alone:
                raise RuntimeError(f"{self._alone} SGLang's forward cannot serve a pass here: {why}.")
            self.passes.leave(mode, why)
            return None
        self.passes.take(mode, rows)
        return spec.Step(mode, rows)

    @torch.no_grad()
    def forward(
        self, step: spec.Step, original: Callable[..., Any], input_ids: torch.Tensor, positions: torch.Tensor,
        forward_batch: Any, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        return self._step(step.view, input_ids, positions, forward_batch)


class Checked:
    """A step that looks at SGLang's pools, which do not exist when it is built, before its first pass."""

    def __init__(self, step: Callable[..., Any]) -> None:
        self._step = step
        self._usable = False

    def __call__(self, view: Any, *args: Any) -> Any:
        if not self._usable:
            reasons = unusable(view)
            if reasons:
                raise RuntimeError(f"sglang_sm120 cannot serve this pool: {'; '.join(reasons)}.")
            self._usable = True
        return self._step(view, *args)


def build(model: torch.nn.Module, hf_config: Any, context: spec.BuildContext) -> Built:
    """Take the weights, compile all kernels and reserve the graphs' scratch, before SGLang sizes its cache."""
    from sglang.srt.mem_cache.allocation_sizing import get_req_to_token_extra_context_len
    from sglang.srt.runtime_context import get_exec, get_model, get_parallel, get_schedule, get_spec

    from .step import draft_states, sample
    from .step.prepare import patched
    from .step.target import Target
    from .warmup import warm_up

    modules.watch()
    alone = why_alone(hf_config)
    check_graphs(get_exec().graph.cuda_graph_config, context.tokens_per_request, alone)
    if drafts():
        spec.register(architecture=DRAFT, path=f"{__name__}:DRAFT_SPEC")
    # Its experts lie as the target's: SGLang builds it without asking for the draft's own runner.
    spec.register(architecture=DSPARK, path=f"{__name__}:DSPARK_SPEC")
    parallel = get_parallel()
    built = Built(Target(model), context.widths, TARGET_MODES, counts=parallel.tp_rank == 0, alone=alone)
    longest = get_model().context_length or hf_config.max_position_embeddings
    chunk = get_schedule().chunked_prefill_size or 0
    prefill = chunk if chunk > 0 else longest
    device = torch.device("cuda", torch.cuda.current_device())
    eagle = get_spec().speculative_algorithm in limits.EAGLE
    with modules.late_ones(eagle, hf_config.vocab_size):
        warm_up(
            hf_config.to_dict(),
            tp=parallel.tp_size,
            ep=parallel.moe_ep_size,
            prefill_rows=prefill if takes_prefill() else MAX_ROWS,
            lent_rows=prefill if patched() and not takes_prefill() else 0,
            graph_rows=MAX_ROWS,
            # The page tables in SGLang's graphs are as wide as the longest request with its drafts.
            context=longest + get_req_to_token_extra_context_len(),
            device=device,
            barrier=parallel.tp_group.barrier,
            compiles=parallel.tp_group.local_rank == 0,
            speculates=eagle,
        )
    sample.serve(device)
    draft_states.serve(device)
    return built


def check_graphs(graphs: Any, tokens: int, alone: str | None) -> None:
    """Say which decode graphs have more rows than the step takes: SGLang's forward serves them.

    Args:
        graphs: SGLang's `CudaGraphConfig`, or None.
        tokens: rows of one request in a decode-phase pass.
        alone: as in `Built`.

    Raises:
        ValueError: SGLang's forward cannot serve them, in one sentence.
    """
    larger = [size for size in (graphs and graphs.decode.bs) or () if size * tokens > MAX_ROWS]
    if not larger:
        return
    rows = f"{', '.join(map(str, larger))} requests of {tokens} token{'s' if tokens > 1 else ''}"
    if alone:
        raise ValueError(
            f"{alone} nothing but the step can serve, whose passes have up to {MAX_ROWS} rows, and there are CUDA "
            f"graphs of {rows}: give --cuda-graph-max-bs-decode {MAX_ROWS // tokens}."
        )
    logger.info("sglang_sm120: CUDA graphs of %s are SGLang's forward's, the step takes %d rows.", rows, MAX_ROWS)


def drafts() -> bool:
    """Whether SGLang keeps the draft's experts as the target's, which the step can read."""
    from sglang.srt.layers.moe.utils import get_speculative_moe_runner_backend

    backend = get_speculative_moe_runner_backend()
    return bool(backend.is_triton() if emulated() else backend.is_flashinfer_mxfp4())


def build_draft(model: torch.nn.Module, hf_config: Any, context: spec.BuildContext) -> Built:
    """The draft whose experts lie as the target's do; `build` has compiled for it."""
    from .step.draft import Draft

    return Built(Draft(model), context.widths, DRAFT_MODES, alone=why_alone(hf_config))


def build_dspark(model: torch.nn.Module, hf_config: Any, context: spec.BuildContext) -> Built:
    """The stages of a DSpark drafter; `build` has compiled for them."""
    from .step.draft import Stages

    return Built(Stages(model), context.widths, DSPARK_MODES, alone=why_alone(hf_config))


SPEC = spec.MegakernelSpec(
    name="sglang-sm120",
    api_version=1,
    requires=spec.Requirements(
        # SGLANG_SM120_FORCE=1 is for tests on a Hopper card. Compiled for it, the step decodes up to 8 requests faster
        # than SGLang's own forward, 32 slower (measured on one H200).
        isas=frozenset({f"sm_{sm}" for sm in limits.SM12X} | ({"sm_90"} if registry.forced() else set())),
        tp_sizes=frozenset(),
        server_args={name: frozenset(values) for name, values in limits.server_args(emulated()).items()},
        hf_config={"model_type": MODEL_TYPE},
        env=limits.ENVIRONMENT,
    ),
    features=frozenset(
        {
            spec.Feature.EXPERT_PARALLEL,
            spec.Feature.KV_OFFLOAD,
            spec.Feature.PD_DISAGGREGATION,
            spec.Feature.RAGGED_VERIFY,
            spec.Feature.SPECULATIVE_DECODING,
        }
    ),
    # Of the step against the whole-model oracle, teacher-forced, where rounding alone decides nothing (tests/model);
    # against SGLang's own forward, which rounds activations to FP8, nothing was measured yet.
    numerics=spec.Numerics(spec.NumericsKind.TOLERANCE, {"logprob": 0.05}),
    max_rows=MAX_ROWS,
    build=build,
    model_disable_reasons=model_reasons,
    config_disable_reasons=config_reasons,
)

DRAFT_SPEC = msgspec.structs.replace(
    SPEC, name="sglang-sm120-draft", build=build_draft, config_disable_reasons=None
)
"""Registered when the target is built, where the draft's experts have the target's layout. Else SGLang drafts."""
DSPARK_SPEC = msgspec.structs.replace(DRAFT_SPEC, name="sglang-sm120-dspark", build=build_dspark)


def install_on_cpu(model: torch.nn.Module, hf_config: Any) -> None:
    """Replace the forward of a loaded DeepSeek-V4 or its MTP layer by the step, which serves every pass on a CPU.

    Another architecture is left alone.

    Raises:
        ValueError: this model or this SGLang is not what the step is made for, in one sentence.
    """
    architecture = (hf_config.architectures or [None])[0]
    if architecture not in (TARGET, DRAFT):
        return
    from sglang.srt.kernel_plugins.nvidia.binding import MegakernelBinding
    from sglang.srt.runtime_context import get_parallel

    from .step import draft_states, sample
    from .step.draft import Draft
    from .step.target import Target

    reasons = model_reasons(model, hf_config)
    if hf_config.model_type != MODEL_TYPE:
        reasons.append(f"the model type is {hf_config.model_type} and the step serves {MODEL_TYPE}")
    if reasons:
        raise ValueError(f"sglang_sm120 cannot serve this model on a CPU: {'; '.join(reasons)}.")
    sample.serve(torch.device("cpu"))
    draft_states.serve(torch.device("cpu"))
    step = Checked((Target if architecture == TARGET else Draft)(model))
    passes = Passes(architecture == TARGET and get_parallel().tp_rank == 0)
    binding, original = MegakernelBinding(model=model), model.forward

    @functools.wraps(original)
    @torch.no_grad()
    def forward(input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any, **kwargs: Any) -> Any:
        if kwargs.get("input_embeds") is not None:
            raise ValueError("A request brings embeddings, which no forward on a CPU takes: send text or token ids.")
        passes.take(mode_of(forward_batch), input_ids.shape[0])
        return step(binding.forward_view(), input_ids, positions, forward_batch)

    model.forward = forward
    model._derived_weight_cache_error = "Online weight updates are not supported with the step of sglang_sm120 on a CPU"
    logger.info("sglang_sm120: the step serves every pass of %s on this CPU.", architecture)
