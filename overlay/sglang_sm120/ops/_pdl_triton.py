"""Programmatic dependent launch: a kernel's blocks start while the kernel before still runs, and wait inside.

Every kernel of the overlay is launched so (`kernels.launch`) unless SGLANG_SM120_PDL is 0. Each calls `wait` once, in
every block, before it reads what another kernel may have written and before it writes anything. Before that it may read
constants: weights, scales. The instructions exist from sm_90 on, and so do the providers; in a kernel launched as ever
they do nothing.

SGLang's compressor kernels, launched in between, may end without having waited, where a row has nothing to do: then
their end does not imply the end of the kernel before them. So that one, always a linear layer's, must not let others
start early: it has more than `SMALL_GRID` programs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
SMALL_GRID: tl.constexpr = tl.constexpr(4)
"""Programs of a kernel beside which the next one finds the SMs evenly free."""
LINE: tl.constexpr = tl.constexpr(128)
"""Bytes that one prefetch brings into the L2."""


@triton.jit
def wait(early=0):
    """Wait until the kernels before have ended and what they wrote is visible, then maybe let the next one's blocks
    start: beside a small kernel, or if `early` is not 0 (`kernels.leaves_room`).

    Others would crowd on the SMs that are left or come free first, which costs more than their early start gains.
    They do not start before this kernel has waited, so that the next one, too, may rely on the end of all kernels but
    this one.
    """
    if not INTERPRETED:
        gdc_wait()
        programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
        if (programs <= SMALL_GRID) | (early != 0):
            gdc_launch_dependents()


@triton.jit
def prefetch(at):
    """Bring the lines at pointers `at` into the L2."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [at.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
