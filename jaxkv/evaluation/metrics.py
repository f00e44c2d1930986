"""From predictions to numbers: means with 95 % intervals, and averages over tasks.

Scores are RULER's, the fraction of wanted strings found (of lines right for the
reasoning tasks); `exact` is 1 where nothing is missing. The macro average weighs tasks
alike.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxkv.evaluation.methods import FULL
from jaxkv.evaluation.statistics import average, average_difference, mean_interval
from jaxkv.tasks import wilson

Rows = Sequence[Mapping[str, Any]]
CELL = ("method", "budget", "task", "length", "depth")
POINT = ("method", "budget", "length")


def groups(rows: Rows, names: Sequence[str]) -> dict[tuple, list[Mapping[str, Any]]]:
    """Return rows grouped by columns, in the order in which groups first come."""
    found: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def by_cell(rows: Rows) -> list[dict[str, Any]]:
    """Return one record per method, budget, task, length and depth."""
    return [
        dict(zip(CELL, values, strict=True)) | _summary(group)
        for values, group in groups(rows, CELL).items()
    ]


def _summary(group: Rows) -> dict[str, Any]:
    score, low, high = mean_interval(row["score"] for row in group)
    right = sum(row["exact"] for row in group)
    exact_low, exact_high = wilson(right, len(group))
    budgets = {row["budget_tokens"] for row in group}
    means = ("prompt_tokens", "output_tokens", "truncated", "cache_bytes")
    return {
        "samples": len(group),
        "budget_tokens": budgets.pop() if len(budgets) == 1 else None,
        "score": score,
        "low": low,
        "high": high,
        "exact": right / len(group),
        "exact_low": exact_low,
        "exact_high": exact_high,
    } | {name: float(np.mean([row[name] for row in group])) for name in means}


def macro(rows: Rows, column: str = "score") -> list[dict[str, Any]]:
    """Return one record per method, budget and length: the mean over tasks.

    Its interval is made of the tasks' own; see `statistics.average`.
    """
    records = []
    for values, group in groups(rows, POINT).items():
        by_task = groups(group, ("task",)).values()
        mean, low, high = average(
            [mean_interval(row[column] for row in of_task) for of_task in by_task]
        )
        records.append(
            dict(zip(POINT, values, strict=True))
            | {
                "tasks": len(by_task),
                "samples": len(group),
                column: mean,
                "low": low,
                "high": high,
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
    same = ["length", "task", "depth", "index"]
    if baseline != FULL:
        same = ["budget", *same]
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
        if by_task:
            found = average_difference(list(by_task.values()))
            records.append(
                dict(zip(POINT, values, strict=True))
                | {"samples": sum(map(len, by_task.values()))}
                | dict(zip(("difference", "low", "high"), found, strict=True))
            )
    return records
