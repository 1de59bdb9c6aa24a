"""How sure a score is: Wilson's interval of a share, and the floor a published share sets for a number of questions."""

from __future__ import annotations

import math
from typing import NamedTuple

Z95 = 1.959963984540054
"""Standard normal quantile of a two-sided interval of 95 %."""


class Interval(NamedTuple):
    """A share's lower and upper bound, both within [0, 1]."""

    low: float
    high: float


def wilson(right: int, total: int, z: float = Z95) -> Interval:
    """Wilson's score interval of `right` of `total` (E. B. Wilson, JASA 22, 1927).

    Raises:
        ValueError: `right` is not within 0…total, or total is 0.
    """
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"{right} of {total} is no share: give 0 <= right <= total, total > 0.")
    share, weight = right / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    # At the ends the bound is 0 or 1, which rounding misses.
    return Interval(0.0 if right == 0 else centre - half, 1.0 if right == total else centre + half)


def floor_for(published: float, total: int) -> float:
    """The smallest share of `total` questions whose 95 % interval still reaches `published`.

    A server as good as the published one falls below it in about one run of forty; one that is clearly worse, always.
    """
    for right in range(total + 1):
        if wilson(right, total).high >= published:
            return right / total
    return 1.0
