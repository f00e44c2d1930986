"""From predictions to numbers: means with 95 % intervals, macro averages, tables.

Scores are RULER's, the fraction of wanted strings found (of lines right for the
reasoning tasks); `exact` is 1 where nothing is missing. A share gets Wilson's interval,
a mean of partial scores Student's. The macro average weighs tasks alike.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxkv.evaluation.methods import FULL
from jaxkv.tasks.samples import wilson

Rows = Sequence[Mapping[str, Any]]
CELL = ("method", "budget", "task", "length", "depth")
POINT = ("method", "budget", "length")
Z = 1.959963984540054  # the normal quantile of a 95 % interval


def student(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t, to 1e-2 from 4 degrees on.

    Hill's expansion around the normal quantile (Abramowitz and Stegun, 26.7.5).
    """
    if degrees < 1:
        return math.inf
    z = Z
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def mean_interval(scores: Iterable[float]) -> tuple[float, float, float]:
    """Return mean and 95 % interval of scores in [0, 1].

    Student's interval; Wilson's where all scores are 0 or 1, or equal: there the
    sample says nothing about its spread, and Wilson's is the widest that holds.
    """
    values = np.array(list(scores), float)
    mean = float(values.mean())
    if _says_no_spread(values):
        return mean, *wilson(float(values.sum()), len(values))
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = student(len(values) - 1) * error
    return mean, max(0.0, mean - half), min(1.0, mean + half)


def _says_no_spread(values: np.ndarray) -> bool:
    return bool((values == values[0]).all() or np.isin(values, (0, 1)).all())


def groups(rows: Rows, names: Sequence[str]) -> dict[tuple, list[Mapping[str, Any]]]:
    """Return rows grouped by columns, in the order in which groups first come."""
    found: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def typed(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Return rows of `predictions.csv` with numbers for what was text.

    Raises:
      ValueError: something is no number; the message names the row.
    """
    return [_typed(row, number) for number, row in enumerate(rows, 1)]


def _typed(row: Mapping[str, str], number: int) -> dict[str, Any]:
    whole = ("length", "index", "exact", "truncated")
    whole += ("prompt_tokens", "output_tokens", "cache_bytes")
    try:
        return (
            dict(row)
            | {name: int(row[name]) for name in whole}
            | {
                "score": float(row["score"]),
                "depth": float(row["depth"]) if row["depth"] else None,
                "budget_tokens": int(row["budget_tokens"] or 0) or None,
            }
        )
    except ValueError as error:
        raise ValueError(f"row {number} of predictions.csv: {error}.") from error


def cells(rows: Rows) -> list[dict[str, Any]]:
    """Return one record per method, budget, task, length and depth."""
    return [
        dict(zip(CELL, values, strict=True)) | _summary(group)
        for values, group in groups(rows, CELL).items()
    ]


def _summary(group: Rows) -> dict[str, Any]:
    score, low, high = mean_interval(row["score"] for row in group)
    right = sum(row["exact"] for row in group)
    exact_low, exact_high = wilson(right, len(group))

    def mean(name: str) -> float:
        return float(np.mean([row[name] for row in group]))

    return {
        "samples": len(group),
        "budget_tokens": group[0]["budget_tokens"],
        "score": score,
        "low": low,
        "high": high,
        "exact": right / len(group),
        "exact_low": exact_low,
        "exact_high": exact_high,
        "prompt_tokens": mean("prompt_tokens"),
        "output_tokens": mean("output_tokens"),
        "truncated": mean("truncated"),
        "cache_bytes": mean("cache_bytes"),
    }


def macro(rows: Rows, column: str = "score") -> list[dict[str, Any]]:
    """Return one record per method, budget and length: the mean over tasks.

    Its interval is made of the tasks' own, `l_t` to `u_t` around `m_t`, by the rule for
    sums of independent estimates (Zou and Donner 2008, "MOVER"): it reaches
    `sqrt(sum (m_t - l_t)^2)` below and `sqrt(sum (u_t - m_t)^2)` above, over the number
    of tasks. So that of one task is the task's, and none leaves 0 to 1.
    """
    records = []
    for values, group in groups(rows, POINT).items():
        by_task = [
            np.array([row[column] for row in of_task], float)
            for of_task in groups(group, ("task",)).values()
        ]
        means, lows, highs = np.array([mean_interval(s) for s in by_task]).T
        mean = float(means.mean())
        below, above = np.linalg.norm([means - lows, highs - means], axis=1) / len(
            means
        )
        records.append(
            dict(zip(POINT, values, strict=True))
            | {
                "tasks": len(means),
                "samples": len(group),
                column: mean,
                "low": max(0.0, mean - below),
                "high": min(1.0, mean + above),
                "output_tokens": float(np.mean([r["output_tokens"] for r in group])),
                "truncated": float(np.mean([r["truncated"] for r in group])),
            }
        )
    return records


def differences(rows: Rows, baseline: str) -> list[dict[str, Any]]:
    """Return how much each method's macro average exceeds a baseline's, paired.

    Both have answered the same questions, so the interval of the mean difference is
    narrower than two separate intervals suggest. The control has no budgets and is
    compared with at all of them.

    Raises:
      ValueError: no row is of the baseline.
    """
    same = ("length", "task", "depth", "index")
    if baseline != FULL:
        same = ("budget", *same)
    base = {
        tuple(row[name] for name in same): row["score"]
        for row in rows
        if row["method"] == baseline
    }
    if not base:
        known = ", ".join(dict.fromkeys(row["method"] for row in rows))
        raise ValueError(f"no results of a method {baseline!r}; there are {known}.")
    records = []
    for values, group in groups(rows, POINT).items():
        if values[0] in (baseline, FULL):
            continue
        by_task: dict[str, list[float]] = {}
        for row in group:
            other = base.get(tuple(row[name] for name in same))
            if other is not None:
                by_task.setdefault(row["task"], []).append(row["score"] - other)
        if not by_task:
            continue
        mean = float(np.mean([np.mean(d) for d in by_task.values()]))
        variance = sum(
            np.var(d, ddof=1) / len(d) if len(d) > 1 else math.inf
            for d in by_task.values()
        )
        half = Z * math.sqrt(variance) / len(by_task)
        records.append(
            dict(zip(POINT, values, strict=True))
            | {"difference": mean, "low": mean - half, "high": mean + half}
        )
    return records
