"""The page of the mutation table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mutations.mutation import ATTENTION, ORACLE, STEP, Mutation
from mutations.score import ASKED, Score

from synthetic import floor_of

NAMED = 2
"""Failed tests that a row names."""


class Row(NamedTuple):
    """What the tests say of a mutation; scores are None where the accuracy suite did not run."""

    mutation: Mutation
    failed: Sequence[str]
    ran: int
    died: bool
    stopped: bool
    score: Score | None
    good: Score | None

    @property
    def by_accuracy(self) -> bool:
        """Whether the trained model's score falls below the floor that its good score sets."""
        if self.score is None or self.good is None:
            return False
        return self.score.right / self.score.asked < floor_of(self.good.right / self.good.asked)

    @property
    def caught(self) -> str:
        """One of unit, accuracy and both, or nothing."""
        if self.failed and self.by_accuracy:
            return "both"
        return "unit" if self.failed else "accuracy" if self.by_accuracy else ""


def only_in_the_oracle(mutations: Sequence[Mutation]) -> list[str]:
    """Defects that are made in nothing that ships, whose tests therefore have not been seen to notice them."""
    shipped = {mutation.defect for mutation in mutations if not mutation.in_the_oracle}
    return [mutation.defect for mutation in mutations if mutation.defect not in shipped]


def page(rows: Sequence[Row], left: Sequence[Mutation] = ()) -> str:
    """Markdown. left: mutations that were not run."""
    places = [row for row in rows if not row.mutation.is_switch]
    switches = [row for row in rows if row.mutation.is_switch]
    missed = sum(not row.caught for row in rows)
    good = next((row.good for row in rows if row.good is not None), None)
    if good is None:
        answers = "The trained checkpoint or its questions were not there, so the accuracy suite was not run."
    else:
        answers = f"Without a defect the oracle answers {good} recall questions of the trained model right."
    defects = len({row.mutation.defect for row in places})
    head = f"""# Which test catches which mistake

Written by `make mutations`, which makes each change in a copy of the source and runs the tests of its area:
{defects} defects in {len(places)} places, {missed} caught by nothing (it fails if there is one).
Kernels run in Triton's interpreter.

*unit*: `tests/ops` (a run stops after {ATTENTION.most} failures), `tests/model/test_oracle.py` (after {ORACLE.most}),
`tests/model/test_step.py` (after {STEP.most}); of streams `tests/model/test_streams.py`, of DSpark's drafter
`tests/model/test_drafter.py` and of its plan `tests/launch`, of scratch and of what no graph can hold
`tests/sm120/test_warmup.py`, of compiled code, which is read and not run, `tests/sm120/test_compile_gate.py`.
*accuracy*: the oracle with the defect on the trained small model, {ASKED} recall questions; only where the oracle
computes with the changed file. {answers}

| defect | where | change | caught by | failed tests | score |
|---|---|---|---|---|---|
"""
    oracle = f"""
## What the oracle answers with a defect

{len(switches)} of these mistakes the oracle can make by a switch (`Defect`), which breaks nothing that ships. With it
the oracle's tests have to notice, and the score says what the mistake would cost. None counts as a place above, and
each defect has to have one there outside the oracle.

| defect | switch | change | caught by | failed tests | score |
|---|---|---|---|---|---|
"""
    unknown = f"\nNot run ({len(left)}):\n\n" + "".join(f"* {mutation.name}\n" for mutation in left) if left else ""
    return head + "".join(map(_line, places)) + oracle + "".join(map(_line, switches)) + unknown


def _line(row: Row) -> str:
    mutation = row.mutation
    edits = "; ".join(f"`{_cell(old)}` → `{_cell(new) or ' '}`" for old, new in mutation.edits)
    where = f"{mutation.site}, `{mutation.file}`"
    cells = (mutation.defect, where, edits, row.caught or "**nothing**", _tests(row), _score(row))
    return f"| {' | '.join(cells)} |\n"


def _tests(row: Row) -> str:
    if not row.failed:
        return f"0 of {row.ran}"
    first = "the first " if row.stopped or row.died else ""
    names = ", ".join(f"`{_cell(name.rpartition('/')[2])}`" for name in row.failed[:NAMED])
    died = ", the process died" if row.died else ""
    return f"{len(row.failed)} of {first}{row.ran}{died}: {names}"


def _score(row: Row) -> str:
    if not row.mutation.scored:
        return ""
    return "not run" if row.score is None else str(row.score)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
