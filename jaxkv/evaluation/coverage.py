"""How much of a comparison is there, so that no part of it passes for the whole.

What is wanted follows from `config.yaml`: every question of every cell, to every method
at every budget. Where it does not say it (the folders of older versions), a question
that one method has answered is wanted of all.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxkv.evaluation.methods import FULL

Rows = Sequence[Mapping[str, Any]]
Place = tuple[str, int, float | None]  # task, length, depth
Point = tuple[str, str]  # method, budget


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage:
    """How many questions are wanted, and how many have been answered.

    Attributes:
      points: methods and budgets, in the order of the tables.
      wanted: questions of each cell, the same for all points.
      there: answers of each point and cell.
    """

    points: Sequence[Point]
    wanted: Mapping[Place, int]
    there: Mapping[tuple[Point, Place], int]

    def share(
        self,
        method: str,
        budget: str,
        *,
        task: str | None = None,
        length: int | None = None,
        depth: float | None = None,
    ) -> tuple[int, int]:
        """Return how many answers of a method at a budget are there, and are wanted.

        Args:
          method: whose.
          budget: at which.
          task: of one task only.
          length: of one length only.
          depth: of one depth only.
        """
        asked = (task, length, depth)
        places = [
            place
            for place in self.wanted
            if all(a in (None, p) for a, p in zip(asked, place, strict=True))
        ]
        there = (self.there.get(((method, budget), place), 0) for place in places)
        return sum(there), sum(self.wanted[place] for place in places)

    @property
    def total(self) -> tuple[int, int]:
        """How many rows are there, and are wanted."""
        shares = [self.share(*point) for point in self.points]
        return sum(there for there, _ in shares), sum(wanted for _, wanted in shares)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        there, wanted = self.total
        return there == wanted


def coverage(rows: Rows, config: Mapping[str, Any]) -> Coverage:
    """Return what is there of what a configuration asks.

    Args:
      rows: each once, with numbers.
      config: of the folder.
    """
    there: dict[tuple[Point, Place], int] = {}
    seen: dict[Place, set[int]] = {}
    for row in rows:
        point = row["method"], row["budget"]
        place = row["task"], row["length"], row["depth"]
        there[point, place] = there.get((point, place), 0) + 1
        seen.setdefault(place, set()).add(row["index"])
    wanted: dict[Place, int] = {}
    for cell in config.get("cells", ()):
        if isinstance(cell, Mapping) and {"task", "length"} <= cell.keys():
            count = cell.get("questions", config.get("samples", 0))
            wanted[cell["task"], cell["length"], cell.get("depth")] = count
    for place, indices in seen.items():
        wanted[place] = max(wanted.get(place, 0), len(indices))
    points = dict.fromkeys([*_points(config), *(point for point, _ in there)])
    return Coverage(points=list(points), wanted=wanted, there=there)


def _points(config: Mapping[str, Any]) -> list[Point]:
    points = []
    for method in config.get("methods", ()):
        if not isinstance(method, Mapping) or "prefill" not in method:
            continue
        parts = (method["prefill"], method.get("decode"))
        if all(part == {"name": "Full"} for part in parts):
            points.append((method["name"], FULL))
        else:
            points += [(method["name"], b) for b in config.get("budgets") or ()]
    return points


def mark(share: tuple[int, int]) -> str:
    """Return what stands behind a number that not all questions have made."""
    there, wanted = share
    return "" if there == wanted else f" [{there} of {wanted}]"
