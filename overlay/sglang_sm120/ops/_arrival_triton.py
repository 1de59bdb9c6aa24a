"""The last of several programs to arrive does what needs the results of all of them, in place of another launch.

Each program stores its part and arrives at a counter (`kernels.counters`). The last one reads all parts, its own too,
in an order that does not depend on who that is, and past the L1 (`cache_modifier=".cg"`), which may hold older ones.

Why it sees them all, in terms of PTX's memory model: a program's stores come before its barrier, the barrier before
one thread's atomic add, which releases at GPU scope what the barrier has brought before it, other threads' stores too.
Adds to one address are ordered and each reads what the one before wrote, so the last one acquires what all before have
released; Triton hands what it read to the program's other threads through a second barrier, and only then they load.

The last one sets the counter back to zero. Nobody else looks at it before the end of this kernel: the next kernels
wait for that (`_pdl_triton.wait`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def last_to_arrive(counter, programs):
    """Whether this program is the last of `programs` at the counter; what they have stored may be read then."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter, 0)
    return last
