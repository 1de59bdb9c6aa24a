"""The mutation table: its changes apply, its runner tells a mutant from good code, and the page is of this list."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from mutations.mutation import ROOT, Mutation, Stale, Tests, mutate
from mutations.page import Row, only_in_the_oracle, page
from mutations.run import PAGE, Unusable, copied, outcome_of, scored
from mutations.score import ASKED, Score
from mutations.sites import mutations
from tokenizers import Tokenizer

from sglang_sm120 import ops
from sglang_sm120.checkpoint.config import ReferenceConfig
from sglang_sm120_reference.defects import Defect
from sglang_sm120_reference.oracle import Oracle
from sglang_sm120_reference.write import write_checkpoint


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    return copied(ROOT, tmp_path / "sources")


def named(name: str) -> Mutation:
    return next(mutation for mutation in mutations() if mutation.name == name)


@pytest.mark.parametrize("mutation", mutations(), ids=lambda mutation: mutation.name)
def test_a_mutation_applies_and_compiles(sources: Path, mutation: Mutation) -> None:
    before = (sources / mutation.path).read_text()
    mutate(mutation, sources)
    after = (sources / mutation.path).read_text()
    assert after != before
    compile(after, mutation.file, "exec")
    assert all(Path(argument).exists() for argument in mutation.tests.arguments if argument.startswith("tests/"))


def test_names_differ() -> None:
    assert len({mutation.name for mutation in mutations()}) == len(mutations())


@pytest.mark.parametrize(
    "tests", sorted({mutation.tests for mutation in mutations()}), ids=lambda tests: tests.arguments[-1]
)
def test_every_word_of_an_area_selects_tests(tests: Tests) -> None:
    """Of one that fits nothing any more, beside others that do, pytest says nothing."""
    place, *selected = tests.arguments
    path = ROOT / place
    names = [*ops.SPECS] if path.is_dir() else []
    for file in path.rglob("test_*.py") if path.is_dir() else [path]:
        names += [file.name, *re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)]
    assert len(names) > 2
    for word in selected[1].split(" or ") if selected else []:
        assert any(word in name for name in names), word


def test_no_defect_is_made_in_the_oracle_alone() -> None:
    assert only_in_the_oracle(mutations()) == []
    switches = [mutation for mutation in mutations() if mutation.is_switch]
    assert len(switches) == len(Defect)
    without = [mutation for mutation in mutations() if mutation.path != "overlay/sglang_sm120/ops/compress/__init__.py"]
    pooled, gated = "a c4 entry pools its own 4 tokens only", "the compressor's gate has no position term"
    assert only_in_the_oracle(without) == [pooled, gated]


@pytest.mark.parametrize(("text", "times"), [("no such text", 0), ("import torch\n", 2)])
def test_a_stale_text_is_named(sources: Path, text: str, times: int) -> None:
    path = sources / "overlay/sglang_sm120/ops/fp8_linear/__init__.py"
    path.write_text("import torch\n" * 2)
    with pytest.raises(Stale, match=f" {times} times .* needs it once"):
        mutate(Mutation("d", "s", "ops/fp8_linear/__init__.py", ((text, "x"),), Tests(())), sources)


BY_HAND = Tests(("tests/ops/test_by_hand.py",))


def test_mutants_are_caught_and_good_code_is_not(sources: Path) -> None:
    assert not outcome_of(sources, BY_HAND).failed
    mutate(named("nibbles swapped: MXFP4 format"), sources)
    outcome = outcome_of(sources, BY_HAND)
    noticing = [
        "test_mxfp4_block", "test_mxfp4_moe_reads_up_first_and_swizzled_scales",
        "test_nvfp4_moe_reads_up_first_and_factors_of_gates_first",
    ]  # fmt: skip
    assert outcome.failed == [f"tests/ops/test_by_hand.py::{test}" for test in noticing] and outcome.ran > 5


def test_a_kernel_mutant_is_caught(sources: Path) -> None:
    mutate(named("stale scratch: merge reads parts that nobody wrote, Triton"), sources)
    outcome = outcome_of(sources, Tests(("tests/ops/test_parity.py", "-k", "sparse_mla-some-parts-empty")))
    assert outcome.failed == ["tests/ops/test_parity.py::test_parity[sparse_mla-some-parts-empty-triton]"]
    assert outcome.ran == 2


def test_another_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unusable):
        outcome_of(tmp_path, BY_HAND)


def test_the_oracle_of_a_mutant_answers_otherwise(sources: Path, tmp_path: Path) -> None:
    config = ReferenceConfig(num_hidden_layers=1, num_nextn_predict_layers=0, compress_ratios=(0,))
    checkpoint = write_checkpoint(tmp_path / "small", config)
    oracle, tokenizer = Oracle(checkpoint), Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    rows = []
    for first in range(10, 900):
        answer = tokenizer.decode([int(oracle.forward([first, first + 1]).logprobs[-1].argmax())]).strip()
        if answer.isascii() and answer:
            row = {"id": str(first), "task": "recall", "distance": 1, "prompt": [first, first + 1], "max_tokens": 1}
            rows.append(row | {"answer": answer})
        if len(rows) == ASKED:
            break
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert scored(sources, checkpoint, questions) == Score(ASKED, ASKED)
    mutate(named("routed weight scaled twice: oracle"), sources)
    assert scored(sources, checkpoint, questions).right < ASKED


def test_where_a_mutation_is_caught() -> None:
    mutation, good = named("comb transposed: oracle"), Score(8, 8)

    def row(failed: list[str], score: Score | None) -> Row:
        return Row(mutation, failed, 20, False, False, score, good if score else None)

    assert row(["tests/a.py::t"], None).caught == "unit"
    assert row([], Score(7, 8)).caught == "accuracy"
    assert row(["tests/a.py::t"], Score(2, 8)).caught == "both"
    assert row([], Score(8, 8)).caught == row([], None).caught == ""
    assert "| **nothing** | 0 of 20 | not run |" in page([row([], None)])
    assert page([], [mutation]).endswith("\nNot run (1):\n\n* comb transposed: oracle\n")
    assert "| both | 1 of 20: `a.py::t` | 2 of 8 |" in page([row(["tests/a.py::t"], Score(2, 8))])
    place = Row(named("comb transposed: torch reference"), ["tests/a.py::t"], 20, False, False, None, None)
    assert "\n0 defects in 0 places," in page([row([], None)])
    places, switches = page([row([], None), place]).split("\n## ")
    assert "\n1 defects in 1 places," in places and " torch reference," in places and " oracle," not in places
    assert " oracle," in switches and " torch reference," not in switches


def test_the_page_is_of_this_list() -> None:
    def table(text: str) -> list[list[str]]:
        """Defect, place and change of each row; a bar inside a cell has a backslash before it."""
        return [line.split(" | ")[:3] for line in text.splitlines() if line.startswith("| ")][1:]

    text = PAGE.read_text()
    left = {line.removeprefix("* ") for line in text.splitlines() if line.startswith("* ")}
    listed = [mutation for mutation in mutations() if mutation.name not in left]
    assert table(text) == table(page([Row(mutation, [], 0, False, False, None, None) for mutation in listed]))
    assert left <= {mutation.name for mutation in mutations()}
    assert "**nothing**" not in text
