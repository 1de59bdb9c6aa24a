"""The lowering refuses what it cannot emulate."""

from __future__ import annotations

import pytest
from sm120_lowering import SHARED_LIMIT, LoweringError, retarget

pytestmark = pytest.mark.needs_no_gpu
PTX = ".version 8.7\n.target sm_120a\nmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {};\n"


def test_target_is_replaced_and_the_rest_kept() -> None:
    assert retarget(PTX, SHARED_LIMIT) == PTX.replace("sm_120a", "sm_90a")


@pytest.mark.parametrize(
    "instruction",
    ["wgmma.mma_async.sync", "mma.sync.kind::mxf8f6f4.m16n8k32", "cvt.rn.f16x2.e2m1x2", "tcgen05.mma", "add.f32x2"],
)
def test_foreign_instructions_are_refused(instruction: str) -> None:
    with pytest.raises(LoweringError, match=r"SM120"):
        retarget(PTX + instruction + ";\n", 0)


def test_too_much_shared_memory_is_refused() -> None:
    with pytest.raises(LoweringError, match=f"{SHARED_LIMIT + 1} B .* {SHARED_LIMIT} B"):
        retarget(PTX, SHARED_LIMIT + 1)
