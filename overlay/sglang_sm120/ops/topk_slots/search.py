"""What both structures of `topk_slots` are made of: keys, the search for the k-th largest, places, and slots.

The k-th largest key is found by cutting a range in three and counting the keys at or above either cut, both in one sum:
four instructions per key and step where a histogram costs some fifty. Cuts between values rather than bit patterns, and
an end as soon as a count is good, leave about 8 steps for ordinary scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

STEP: tl.constexpr = tl.constexpr(512)
TWO_LEVELS: tl.constexpr = tl.constexpr(4096)
"""Elements from which a scan in two levels takes less time."""
LOWEST: tl.constexpr = tl.constexpr(-(2**31))
"""Below every score's key."""
FLIP: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def key_of(score):
    """fp32 to an int32 of the same order; NaN counts as -inf, -0.0 as 0.0."""
    score = tl.where(score != score, float("-inf"), tl.where(score == 0.0, 0.0, score))
    return flipped(score.to(tl.int32, bitcast=True))


@triton.jit
def flipped(bits):
    """Bits of an fp32 to an int32 of the same order, and back."""
    return bits ^ ((bits >> 31) & FLIP)


@triton.jit
def value_of(key):
    return flipped(key).to(tl.float32, bitcast=True)


@triton.jit
def kth_largest(keys, live, least, most):
    """(t, n) of at least `least` live keys: the `least` largest are the n above t and `least` - n that equal t.

    The search ends as soon as it meets a t with `least` to `most` keys above it, n of them.
    """
    low = tl.min(tl.where(live, keys, FLIP), 0)
    high = tl.max(keys, 0)
    greater = 0
    step = 0
    while low < high:
        # The thirds between the two values, or, should they prove slow or be none, a quarter and half of the keys.
        first = value_of(low) * (2 / 3) + value_of(high) * (1 / 3)
        second = value_of(low) * (1 / 3) + value_of(high) * (2 / 3)
        finite = (step < 16) & (tl.abs(first) < float("inf")) & (tl.abs(second) < float("inf"))
        quarter = (high >> 2) - (low >> 2)
        less = tl.where(finite, flipped(first.to(tl.int32, bitcast=True)), low + quarter)
        more = tl.where(finite, flipped(second.to(tl.int32, bitcast=True)), low + 2 * quarter)
        less = tl.minimum(tl.maximum(less, low + 1), high)
        more = tl.minimum(tl.maximum(more, less), high)
        # Two counts in one sum.
        counts = tl.sum((keys >= less).to(tl.int32) + ((keys >= more).to(tl.int32) << 16), 0)
        below, above = counts & 0xFFFF, counts >> 16
        greater = tl.where(above >= least, greater, tl.where(below >= least, above, below))
        high = tl.where(above >= least, high, tl.where(below >= least, more - 1, less - 1))
        low = tl.where(above >= least, more, tl.where(below >= least, less, low))
        from_low = tl.where(above >= least, above, below)
        if (from_low >= least) & (from_low <= most):
            # All from low on, which are those above the key before it.
            low -= 1
            high = low
            greater = from_low
        step += 1
    return low, greater


@triton.jit
def compared(keys, threshold):
    """1 where a key is above the threshold, 2^16 where it equals it, as int32: sums count both."""
    return (keys > threshold).to(tl.int32) + ((keys == threshold).to(tl.int32) << 16)


@triton.jit
def _sums_before(x):
    """For each element the sum of those before it.

    In two levels where there are many: in a scan of one, each thread adds up the sums of every 32 elements.
    """
    SIZE: tl.constexpr = x.shape[0]
    if SIZE < TWO_LEVELS:
        return tl.cumsum(x, 0) - x
    groups = tl.reshape(x, [SIZE // 32, 32])
    sums = tl.sum(groups, 1)
    first = tl.cumsum(sums, 0) - sums
    return tl.reshape(tl.cumsum(groups, 1) - groups + first[:, None], [SIZE])


@triton.jit
def places(keys, before, threshold, allowed):
    """Which keys are above the threshold or, the first `allowed` of them, equal to it, and their places in order.

    before sums what `compared` gives for keys that lie before these.
    """
    before += _sums_before(compared(keys, threshold))
    equals = before >> 16
    chosen = (keys > threshold) | ((keys == threshold) & (equals < allowed))
    return chosen, (before & 0xFFFF) + tl.minimum(equals, allowed)


@triton.jit
def page_of(table, entry, live, PAGE: tl.constexpr):
    return tl.load(table + entry // PAGE, mask=live, other=0)


@triton.jit
def put(out, place, entry, page, chosen, PAGE: tl.constexpr):
    """Write the slots of chosen entries to their places."""
    tl.store(out + place, page * PAGE + entry % PAGE, mask=chosen)


@triton.jit
def list_entries(table, out, count, PAGE: tl.constexpr):
    """Entries 0 … count - 1."""
    for start in tl.range(0, count, STEP):
        entry = start + tl.arange(0, STEP)
        live = entry < count
        put(out, entry, entry, page_of(table, entry, live, PAGE), live, PAGE)


@triton.jit
def fill(out, out_width, count):
    """-1 from place `count` on."""
    for start in tl.range(count, out_width, STEP):
        column = start + tl.arange(0, STEP)
        tl.store(out + column, -1, mask=column < out_width)
