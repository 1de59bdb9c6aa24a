"""Programmatic dependent launch: a kernel's blocks start while the kernel before still runs, and wait inside.

Only between the kernels of one op, where `kernels.launch_next` launches the second one: its blocks `wait` before they
read what another kernel may have written and before they write anything; constants may be read before that. What
follows an op is launched as ever, since SGLang's own kernels return early without waiting where there is nothing to do:
one that ended would not imply that ours before it has. The instructions exist from sm_90 on, and so do the providers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
LINE: tl.constexpr = tl.constexpr(128)
"""Bytes that one prefetch brings into the L2."""


@triton.jit
def wait():
    """Wait until the kernels before have ended and what they wrote is visible."""
    if not INTERPRETED:
        gdc_wait()


@triton.jit
def let_next_start():
    """Blocks of the next kernel, one by `kernels.launch_next`, may start once all of this one's have come here or
    ended."""
    if not INTERPRETED:
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
