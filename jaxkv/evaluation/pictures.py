"""Pictures of results: the length × depth heat map, and score against budget.

Each picture is written as PNG and as SVG; each heat map's grid also as CSV, which
needs no matplotlib.
"""

import csv
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxkv import figures
from jaxkv.evaluation.coverage import Coverage, Point
from jaxkv.evaluation.folder import safe_name
from jaxkv.evaluation.methods import FULL
from jaxkv.evaluation.metrics import Rows, groups, macro
from jaxkv.evaluation.statistics import mean_interval
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
        size = (2.5 + 0.6 * len(lengths), 1.8 + 0.35 * len(lines))
        figure = figures.empty(figsize=size)
        axes = figure.subplots()
        image = axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(lengths)), map(str, lengths), rotation=45)
        axes.set_yticks(range(len(lines)), [f"{line[0]:.0%}" for line in lines])
        axes.set_xlabel("tokens of the prompt")
        axes.set_ylabel("depth of the needle")
        mean = f"mean {sum(flat) / len(flat):.1%}" if flat else "no cell finished"
        axes.set_title(f"{title}: {method}, budget {budget}, {mean}")
        figure.colorbar(image, label="score")
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
    lengths = sorted({length for _, length, _ in cover.wanted})
    figure = figures.empty(figsize=(3 + 4.5 * len(lengths), 4.2))
    panels = figure.subplots(1, len(lengths), squeeze=False, sharey=True)
    methods = dict.fromkeys(r["method"] for r in records if r["budget"] != FULL)
    styles = dict(zip(methods, _styles(), strict=False))
    shown: dict[str, Any] = {}  # some lengths may lack some methods
    for length, axes in zip(lengths, panels[0], strict=True):
        here = [record for record in records if record["length"] == length]
        _panel(axes, here, column, styles)
        lines, names = axes.get_legend_handles_labels()
        shown = dict(zip(names, lines, strict=True)) | shown
        axes.set_title(f"{length} tokens")
        axes.set_xlabel("budget")
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel(label)
    names = list(dict.fromkeys(r["method"] for r in records))
    lines = [shown[name] for name in names]
    figure.legend(lines, names, loc="outside right upper", fontsize="small")
    without = list(dict.fromkeys(m for m, _ in cover.points if m not in names))
    lacking = f"\nno point yet: {', '.join(without)}" if without else ""
    figure.suptitle(title + lacking)
    return figures.save(figure, folder / "budgets")


def _is_whole(cover: Coverage, method: str, budget: str, length: int) -> bool:
    there, wanted = cover.share(method, budget, length=length)
    return there == wanted


def _styles() -> Iterator[dict[str, str]]:
    """Yield ways to draw a line: ten colours, with another marker after each round."""
    for marker, line in itertools.cycle((("o", "-"), ("s", "--"), ("^", ":"))):
        for colour in range(10):
            yield {"color": f"C{colour}", "marker": marker, "ls": line}


def _panel(
    axes: Any,
    records: Sequence[Mapping[str, Any]],
    column: str,
    styles: Mapping[str, Mapping[str, str]],
) -> None:
    budgets = {r["budget"] for r in records if r["budget"] != FULL}
    # Evenly spaced, in order: budgets are often powers of two.
    ordered = sorted(budgets, key=lambda name: float(name.removesuffix("%")))
    place = {name: number for number, name in enumerate(ordered)}
    axes.set_xticks(range(len(ordered)), ordered)
    methods = groups(records, ("method",))
    for (method,), group in methods.items():
        if group[0]["budget"] == FULL:
            axes.axhline(group[0][column], color="black", ls="--", label=method)
            continue
        group = sorted(group, key=lambda record: place[record["budget"]])
        middle = [record[column] for record in group]
        below = [r[column] - r["low"] for r in group]
        above = [r["high"] - r[column] for r in group]
        axes.errorbar(
            [place[record["budget"]] for record in group],
            middle,
            yerr=[below, above],
            capsize=3,
            label=method,
            **styles[method],
        )
