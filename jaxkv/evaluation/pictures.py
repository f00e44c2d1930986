"""Pictures of results: the length × depth heat map, and score against budget.

Each picture is written as PNG and as SVG; each heat map's grid also as CSV, which
needs no matplotlib.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxkv import figures, plot
from jaxkv.evaluation.coverage import Coverage, Point
from jaxkv.evaluation.folder import safe_name
from jaxkv.evaluation.methods import FULL
from jaxkv.evaluation.metrics import Rows, groups, macro
from jaxkv.evaluation.statistics import mean_interval
from jaxkv.plot import Curve, Panel
from jaxkv.provenance import write_whole


def grids(rows: Rows, cover: Coverage) -> dict[Point, list[list[Any]]]:
    """Return the mean score by depth and length, for each method and budget.

    Each grid is a table: a header of lengths, then one line per depth, the depth first;
    None where not all questions have been answered.
    """
    depths = sorted({depth for _, _, depth in cover.wanted if depth is not None})
    lengths = sorted({length for _, length, _ in cover.wanted})
    found = {}
    by_point = groups(rows, ("method", "budget"))
    for point in cover.points:
        group = by_point.get(point, [])
        scores = {}
        for (depth, length), some in groups(group, ("depth", "length")).items():
            there, wanted = cover.share(*point, length=length, depth=depth)
            if there == wanted:
                mean, _, _ = mean_interval(row["score"] for row in some)
                scores[depth, length] = mean
        found[point] = [["depth", *lengths]] + [
            [depth, *(scores.get((depth, length)) for length in lengths)]
            for depth in depths
        ]
    return found


def write_grids(folder: Path, rows: Rows, cover: Coverage) -> list[Path]:
    """Write each grid as `heatmap__METHOD__BUDGET.csv`; return the files."""
    written = []
    for (method, budget), grid in grids(rows, cover).items():
        path = folder / f"heatmap__{safe_name(method)}__{safe_name(budget)}.csv"
        text = io.StringIO()
        csv.writer(text).writerows(grid)
        write_whole(path, text.getvalue())
        written.append(path)
    return written


def draw_heat_maps(
    folder: Path, rows: Rows, cover: Coverage, *, title: str
) -> list[Path]:
    """Draw each grid, red for 0 and green for 1; return the files.

    Raises:
      ValueError: matplotlib is missing.
    """
    figures.require()
    written = []
    for (method, budget), grid in grids(rows, cover).items():
        (_, *lengths), *lines = grid
        values = [
            [float("nan") if value is None else value for value in line[1:]]
            for line in lines
        ]
        flat = [value for line in values for value in line if value == value]
        mean = f"mean {sum(flat) / len(flat):.1%}" if flat else "no cell finished"
        figure = plot.heat_maps(
            {f"{title}: {method}, budget {budget}, {mean}": values},
            rows=[f"{line[0]:.0%}" for line in lines],
            columns=list(map(str, lengths)),
            row_label="depth of the needle",
            column_label="tokens of the prompt",
            label="score",
            limits=(0, 1),
            colours="RdYlGn",
            figsize=(2.5 + 0.6 * len(lengths), 1.8 + 0.35 * len(lines)),
        )
        name = f"heatmap__{safe_name(method)}__{safe_name(budget)}"
        written += figures.save(figure, folder / name)
    return written


def draw_budgets(
    folder: Path, rows: Rows, cover: Coverage, *, title: str, column: str, label: str
) -> list[Path]:
    """Draw the macro average against the budget, a panel per length; return the files.

    A mean that lacks questions has no point, and a method without one says so.

    Args:
      folder: where `budgets.png` and `.svg` go.
      rows: each once, with numbers.
      cover: how much of what is wanted they are.
      title: of the picture.
      column: "score" or "exact".
      label: of the vertical axis.

    Raises:
      ValueError: matplotlib is missing.
    """
    records = [
        record
        for record in macro(rows, column)
        if _is_whole(cover, record["method"], record["budget"], record["length"])
    ]
    panels = [
        _panel([r for r in records if r["length"] == length], column, length)
        for length in sorted({length for _, length, _ in cover.wanted})
    ]
    there = {record["method"] for record in records}
    without = list(dict.fromkeys(m for m, _ in cover.points if m not in there))
    lacking = f"\nno point yet: {', '.join(without)}" if without else ""
    figure = plot.against_budget(
        panels, label=label, limits=(-0.02, 1.02), title=title + lacking
    )
    return figures.save(figure, folder / "budgets")


def _is_whole(cover: Coverage, method: str, budget: str, length: int) -> bool:
    there, wanted = cover.share(method, budget, length=length)
    return there == wanted


def _panel(records: Sequence[Mapping[str, Any]], column: str, length: int) -> Panel:
    """Return the curves of one length; what keeps everything is their control."""
    curves, controls = {}, {}
    for (method,), group in groups(records, ("method",)).items():
        if group[0]["budget"] == FULL:
            controls[method] = group[0][column]
            continue
        curves[method] = Curve(
            at=[record["budget"] for record in group],
            mean=[record[column] for record in group],
            low=[record["low"] for record in group],
            high=[record["high"] for record in group],
        )
    return Panel(curves=curves, controls=controls, title=f"{length} tokens")
