"""What the user asks of a plan, and the checks of every value that the plan reckons with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sglang_sm120.checkpoint.config import DSPARK_FOLDER
from sglang_sm120.limits import DSPARK, EAGLE, MAX_DRAFT_TOKENS, PAGE

from . import tuned
from .address import PORT, grpc, port_problem
from .errors import LaunchError
from .fit import Given
from .model import Model, bundles_dspark
from .settings import Value

DRAFT_TOKENS = 4
BLOCK = "speculative-dspark-block-size"
DSPARK_FLAGS = (
    BLOCK, "speculative-dspark-sps-table-path", "speculative-dspark-confidence-sts-path",
    "speculative-dspark-align-verify-tokens-to-graph-tier",
)  # fmt: skip
DRAFTS = ("speculative-num-steps", "speculative-eagle-topk", "speculative-num-draft-tokens", *DSPARK_FLAGS)
PLANNED: Mapping[str, tuple[Value, ...]] = {
    "attention-backend": ("dsv4", "compressed"),
    "decode-attention-backend": ("dsv4", "compressed"),
    "dp-size": (1,),
    "dsv4-attn-backend": ("auto", "flashmla"),
    "kv-cache-dtype": ("auto", "fp8_e4m3"),
    "page-size": (PAGE,),
    "prefill-attention-backend": ("dsv4", "compressed"),
    "speculative-adaptive": (False,),
}
"""Flags that change what the memory budget is made of, and the values that it knows."""


@dataclass(frozen=True)
class Request:
    """What the user wants beside the defaults.

    Attributes:
        config_flags, config_env: values of a config file, whose name is `config`.
        flags, env: values from the command line and the process's environment; they win over the config's.
        keys: flags from variables of the environment; the command line wins over them, they win over the config.
        auto: flags that the config leaves to the plan; None for all.
        measured: whose prefill was the best on a card, by its name.
        mtp: speculative decoding with the checkpoint's MTP layer.
        dspark: with its DSpark drafter.
        gpus: indices of the cards to use; None for the best set.
        patched: whether the series is in the SGLang that will serve: the step is then on by itself, with one `wo_a`.
        evidence: how the config was tried (see README.md).
    """

    config: str | None = None
    config_flags: Mapping[str, Value] = field(default_factory=dict)
    config_env: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, Value] = field(default_factory=dict)
    keys: Mapping[str, Value] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    measured: Mapping[str, tuned.Prefill] = field(default_factory=dict)
    auto: tuple[str, ...] | None = None
    mtp: bool = False
    dspark: bool = False
    gpus: tuple[int, ...] | None = None
    patched: bool = True
    evidence: str = "unverified"

    def value(self, name: str) -> Value | None:
        """What the user gave for a flag."""
        return {**self.config_flags, **self.keys, **self.flags}.get(name)

    def variable(self, name: str) -> str | None:
        """What the user gave for a variable."""
        return {**self.config_env, **self.env}.get(name)

    def best(self, cards: Sequence[str]) -> tuned.Prefill:
        """What was measured on cards of these names; nothing where they differ, or the user gave a part of it."""
        given = any(self.variable(name) is not None for name in tuned.VARIABLES)
        nothing = tuned.Prefill()
        return nothing if given or len(cards) != 1 else self.measured.get(cards[0], nothing)


def checked(request: Request, model: Model) -> Request:
    """The request, with `mtp` or `dspark` also where SGLang's own flag asks for it.

    Raises:
        LaunchError: a value cannot be served, or the plan does not know what it takes.
    """
    for name, known in PLANNED.items():
        if (value := request.value(name)) is not None and value not in known:
            raise LaunchError(
                f"--{name} is {value}, which is not planned for (known: {', '.join(map(str, known))}): leave it out, "
                f"or start SGLang without this launcher."
            )
    port = number(request, "port") or PORT
    if problem := port_problem(port, grpc(request.value)):
        raise LaunchError(f"--port is {port}: {problem}.")
    number(request, "node-rank", least=0)
    return _with_drafts(request, model)


def number(request: Request, name: str, least: int = 1) -> int | None:
    """A flag's whole number, None where it was not given.

    Raises:
        LaunchError: it is no number, or below `least`.
    """
    value = request.value(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise LaunchError(f"--{name} is {value!r}: give a whole number of {least} or more.")
    return value


def given(request: Request, model: Model) -> Given:
    """The values that the fit must keep.

    Raises:
        LaunchError: one of them is out of its range.
    """
    chunk = request.value("chunked-prefill-size")
    if isinstance(chunk, int) and chunk < 1:
        raise LaunchError(
            f"--chunked-prefill-size is {chunk}, prefill in one piece, and the window pool must hold the largest "
            f"piece: give a size such as 4096, or leave it out."
        )
    context, longest = number(request, "context-length"), model.config["max_position_embeddings"]
    if context is not None and context > longest:
        raise LaunchError(f"--context-length is {context} and the model has {longest}: give that or less.")
    graphs = request.value("cuda-graph-bs-decode")
    if isinstance(graphs, int) and not isinstance(graphs, bool):
        graphs = (graphs,)
    off = request.value("disable-cuda-graph") is True or request.value("disable-decode-cuda-graph") is True
    if off or request.value("cuda-graph-backend-decode") == "disabled":
        graphs = ()
    sizes = tuple(one for one in graphs if isinstance(one, int) and one > 0) if isinstance(graphs, tuple) else None
    if sizes != graphs:
        raise LaunchError(f"--cuda-graph-bs-decode is {graphs!r}: give whole numbers of 1 or more.")
    return Given(
        chunk=number(request, "chunked-prefill-size"),
        requests=number(request, "max-running-requests"),
        context=context,
        window_ratio=_fraction(request, "swa-full-tokens-ratio"),
        static=_fraction(request, "mem-fraction-static"),
        graphs=sizes,
        max_graph=number(request, "cuda-graph-max-bs-decode"),
        max_tokens=number(request, "max-total-tokens"),
    )


def asks_dspark(request: Request) -> bool:
    """Whether the user wants the DSpark drafter, by this launcher's flag or by SGLang's."""
    return request.dspark or str(request.value("speculative-algorithm")).upper() == DSPARK


def draft_tokens(request: Request, model: Model) -> int:
    """Tokens that a request verifies per step; 0 without speculation.

    Raises:
        LaunchError: steps and tokens do not belong together, or cannot be served.
    """
    if request.dspark:
        assert model.dspark is not None, "`_with_dspark` refuses it"
        return _block(request, model.dspark.block_size) + 1
    if not request.mtp:
        return 0
    steps, tokens = number(request, "speculative-num-steps"), number(request, "speculative-num-draft-tokens", 2)
    draft = tokens or (steps + 1 if steps else DRAFT_TOKENS)
    if steps and draft != steps + 1:
        raise LaunchError(
            f"--speculative-num-steps is {steps} and --speculative-num-draft-tokens {draft}, which must be one more: "
            f"give one of them."
        )
    if draft > MAX_DRAFT_TOKENS:
        found = f"num-draft-tokens is {tokens}" if tokens else f"num-steps is {steps}"
        raise LaunchError(
            f"--speculative-{found}, and the compressor can take back {MAX_DRAFT_TOKENS} tokens: give "
            f"--speculative-num-steps {MAX_DRAFT_TOKENS - 1} or fewer."
        )
    return draft


def _block(request: Request, trained: int) -> int:
    """Proposals of a DSpark block, verified with the token before them."""
    block, tokens = number(request, BLOCK) or trained, number(request, "speculative-num-draft-tokens", 2)
    if tokens not in (None, block + 1):
        raise LaunchError(
            f"--speculative-num-draft-tokens is {tokens}, and a block of {block} drafts is verified as {block + 1}: "
            f"leave it out, or give --{BLOCK} {tokens - 1}."
        )
    if block >= MAX_DRAFT_TOKENS:
        raise LaunchError(
            f"A block of {block} drafts is verified as {block + 1} tokens, and the compressor can take back "
            f"{MAX_DRAFT_TOKENS}: give --{BLOCK} {MAX_DRAFT_TOKENS - 1} or less."
        )
    return block


def _with_drafts(request: Request, model: Model) -> Request:
    algorithm = request.value("speculative-algorithm")
    if algorithm is not None and str(algorithm).upper() not in (*EAGLE, DSPARK):
        raise LaunchError(
            f"--speculative-algorithm is {algorithm}, which is not planned for: give --mtp (EAGLE) or --dspark "
            f"instead, or start SGLang without this launcher."
        )
    dspark = asks_dspark(request)
    mtp = request.mtp or str(algorithm).upper() in EAGLE
    if not mtp and not dspark:
        for name in DRAFTS:
            if request.value(name) is not None:
                raise LaunchError(f"--{name} was given and nothing drafts: add --mtp or --dspark, or leave it out.")
        return request
    if mtp and dspark:
        raise LaunchError("Drafts of the MTP layer and of DSpark were asked for: leave one of them out.")
    asked = "--mtp" if request.mtp else "--dspark" if request.dspark else f"--speculative-algorithm {algorithm}"
    if dspark:
        return _with_dspark(request, model, asked)
    for name in DSPARK_FLAGS:
        if request.value(name) is not None:
            raise LaunchError(f"--{name} was given and the MTP layer drafts: leave it out, or give --dspark.")
    if bundles_dspark(model.config):
        raise LaunchError(
            f"{asked} was given and {model.path} has DSpark's stages in place of the MTP layer: give --dspark instead."
        )
    if not model.config.get("num_nextn_predict_layers"):
        raise LaunchError(f"{asked} was given and {model.path} has no MTP layer: leave it out.")
    if (width := request.value("speculative-eagle-topk")) not in (None, 1):
        raise LaunchError(f"--speculative-eagle-topk is {width}, and SGLang drafts DeepSeek-V4 with 1: leave it out.")
    if (path := request.value("speculative-draft-model-path")) not in (None, model.path):
        raise LaunchError(
            f"--speculative-draft-model-path is {path}, and the drafts are the model's own: leave it out."
        )
    return replace(request, mtp=True)


def _with_dspark(request: Request, model: Model, asked: str) -> Request:
    if model.dspark is None:
        raise LaunchError(
            f"{asked} was given, and of {model.path} no DSpark drafter was found here, in its files or in "
            f"{DSPARK_FOLDER}/ beside them: download it, or leave {asked} out."
        )
    if (stages := number(request, "pp-size") or 1) > 1 and request.value("disaggregation-mode") != "prefill":
        raise LaunchError(
            f"--pp-size is {stages}, and SGLang 0.5.23 pipelines DSpark in prefill servers alone "
            f"(--disaggregation-mode prefill): leave it out."
        )
    for name in ("speculative-num-steps", "speculative-eagle-topk"):
        if (value := request.value(name)) not in (None, 1):
            raise LaunchError(f"--{name} is {value}, and SGLang runs DSpark with 1: leave it out.")
    if (path := request.value("speculative-draft-model-path")) is not None:
        raise LaunchError(
            f"--speculative-draft-model-path is {path}, and the drafter is the model's own: leave it out."
        )
    return replace(request, dspark=True)


def _fraction(request: Request, name: str) -> float | None:
    value = request.value(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise LaunchError(f"--{name} is {value!r}: give a number between 0 and 1.")
    return float(value)
