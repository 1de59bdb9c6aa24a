"""What a mutation is, how it is made in a copy of the source, and which tests have to notice."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PACKAGES = {"overlay": "sglang_sm120", "reference": "sglang_sm120_reference", "launch": "sglang_sm120_launch"}
"""What is mutated: folder of the checkout -> the package in it."""


class Tests(NamedTuple):
    """The tests of an area, as pytest's arguments. most: failures after which it stops."""

    arguments: tuple[str, ...]
    most: int = 5


class Mutation(NamedTuple):
    """One change.

    edits: (text that `file` holds exactly once, what stands there instead); file: in `sglang_sm120`, or `reference/`
    and the name in `sglang_sm120_reference`, or `launch/` and the name in `sglang_sm120_launch`.
    """

    defect: str
    site: str
    file: str
    edits: tuple[tuple[str, str], ...]
    tests: Tests

    @property
    def name(self) -> str:
        return f"{self.defect}: {self.site}"

    @property
    def path(self) -> str:
        """The file in the checkout."""
        folder, _, rest = self.file.partition("/")
        if folder not in PACKAGES:
            folder, rest = "overlay", self.file
        return f"{folder}/{PACKAGES[folder]}/{rest}"

    @property
    def is_switch(self) -> bool:
        """Whether it only has the oracle make a mistake that the oracle can make by itself, and so breaks nothing."""
        return any("Defect." in old for old, _ in self.edits)

    @property
    def in_the_oracle(self) -> bool:
        """Whether it is made in what computes for tests alone; `config_file` writes what drafters are served by."""
        return self.file.startswith("reference/") and self.file != "reference/config_file.py"

    @property
    def scored(self) -> bool:
        """Whether the oracle computes with this file, so that the trained model's answers may show the defect."""
        return self.file.startswith(("reference/", "checkpoint/", "formats/"))


class Stale(ValueError):
    """A mutation whose text is not in its file, or there more than once."""


def mutate(mutation: Mutation, sources: Path) -> None:
    """Make the mutation in a copy that `run.copied` made.

    Raises:
        Stale: the source no longer has a text of the list, or has it twice.
    """
    path = sources / mutation.path
    source = path.read_text(encoding="utf-8")
    for old, new in mutation.edits:
        if source.count(old) != 1:
            raise Stale(
                f"{mutation.file} holds {old!r} {source.count(old)} times and {mutation.name!r} needs it once: "
                f"give the text as it is now in {FOLDER.name}/."
            )
        source = source.replace(old, new)
    path.write_text(source, encoding="utf-8")


def ops(expression: str) -> Tests:
    """The tests of the ops whose name, or whose file's, this expression matches."""
    return Tests(("tests/ops", "-k", expression))


ATTENTION = ops("sparse_mla")
PAGES = ops("sparse_mla or indexer or page")
INDEXER = ops("indexer or topk_slots or fp8_operands")
TOPK = ops("topk_slots")
MXFP8 = ops("mxfp8")
MIXING = ops("mhc or sinkhorn")
EXPERTS = ops("mxfp4 or router")
NVFP4 = ops("nvfp4_moe")
NVFP4_MODEL = Tests(("tests/model/test_nvfp4.py",))
HASHED = ops("hash_topk")
LINEARS = ops("linear")
ROUTER = ops("router")
ROTATION = ops("rope")
DRAW = ops("sample_token")
CLEARING = ops("clear_draft or refused_drafts")
CLEARED = Tests(("tests/model/test_draft_states.py",))
SAMPLER = Tests(("tests/model/test_sampler.py",))
PLUGIN = Tests(("tests/model/test_plugin.py",))
DRAFT = Tests(("tests/model/test_draft.py",))
DRAFTER = Tests(("tests/model/test_drafter.py",))
DSPARK_PLAN = Tests(("tests/launch", "-k", "dspark"))
COMPRESSOR = ops("compress")
PTX = ops("test_inline_ptx")
SCALES = ops("test_by_hand or test_formats or linear or mxfp4")
# What follows a failure there takes a minute and tells no more.
ORACLE = Tests(("tests/model/test_oracle.py",), most=1)
STEP = Tests(("tests/model/test_step.py",), most=2)
STREAMS = Tests(("tests/model/test_streams.py",))
# Of tests/sm120 what tells of these alone; the rest of it takes minutes.
COMPILED = Tests(("tests/sm120/test_compile_gate.py", "-k", "ptx"))
NEEDED = Tests(("tests/sm120/test_compile_gate.py", "-k", "no_kernel_needs_more"))
SCRATCH = Tests(("tests/sm120/test_warmup.py", "-k", "scratch"))
REFUSALS = Tests(("tests/sm120/test_warmup.py", "-k", "no_graph_could_hold"))
