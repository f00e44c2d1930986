"""95 % intervals: of a mean, of an average over tasks, of paired differences.

A share gets Wilson's interval, a mean of partial scores Student's.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from jaxkv.tasks import wilson

Interval = tuple[float, float, float]  # middle, lower end, upper end

UPPER = 0.975  # the probability below the upper end


def half_width(values: Sequence[float] | np.ndarray) -> float:
    """Return half of Student's interval of a mean; infinite for a single value."""
    if len(values) < 2:
        return math.inf
    from scipy import special  # it takes half a second, `scipy.stats` another

    quantile = special.stdtrit(len(values) - 1, UPPER)
    return float(quantile * np.std(values, ddof=1) / math.sqrt(len(values)))


def mean_interval(scores: Iterable[float]) -> Interval:
    """Return mean and interval of scores in [0, 1].

    Student's interval; Wilson's where all scores are 0 or 1, or equal: there the
    sample says nothing about its spread, and Wilson's is the widest that holds.
    """
    values = np.array(list(scores), float)
    mean = float(values.mean())
    if (values == values[0]).all() or np.isin(values, (0, 1)).all():
        return mean, *wilson(float(values.sum()), len(values))
    half = half_width(values)
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def average(intervals: Sequence[Interval]) -> Interval:
    """Return mean and interval of the average of independent estimates.

    Of estimates `m_t` with intervals `l_t` to `u_t` the rule for sums (Zou and Donner
    2008, "MOVER") makes one that reaches `sqrt(sum (m_t - l_t)^2)` below and
    `sqrt(sum (u_t - m_t)^2)` above, over their number. So that of one estimate is its
    own, and none leaves 0 to 1.
    """
    means, lows, highs = np.array(intervals).T
    mean = float(means.mean())
    sides = np.linalg.norm([means - lows, highs - means], axis=1) / len(means)
    return mean, max(0.0, mean - sides[0]), min(1.0, mean + sides[1])


def average_difference(differences: Sequence[Sequence[float]]) -> Interval:
    """Return mean and interval of the average over tasks of paired differences.

    Args:
      differences: of each task, question by question. The normal quantile is taken, for
        all tasks together; a task with one question makes the interval infinite.
    """
    mean = float(np.mean([np.mean(of_task) for of_task in differences]))
    variance = sum(
        np.var(of_task, ddof=1) / len(of_task) if len(of_task) > 1 else math.inf
        for of_task in differences
    )
    from scipy import special

    half = special.ndtri(UPPER) * math.sqrt(variance) / len(differences)
    return mean, mean - half, mean + half
