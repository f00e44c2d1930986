"""Results as Markdown tables, for the README and the terminal. Numbers are per cent."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxkv.evaluation.methods import FULL
from jaxkv.evaluation.metrics import Rows, by_cell, differences, groups, macro
from jaxkv.evaluation.statistics import mean_interval

Record = Mapping[str, Any]


def report(rows: Rows, config: Mapping[str, Any], *, baseline: str | None) -> str:
    """Return everything that `jaxkv eval report` prints of one folder.

    Args:
      rows: from `metrics.typed`.
      config: of the folder.
      baseline: a method that all others are compared with, or None.

    Raises:
      ValueError: no row is of the baseline, or the folder is a card.
    """
    if config["kind"] == "card":
        if baseline is not None:
            raise ValueError(
                f"a card has no average to compare with that of {baseline!r}; leave "
                "--baseline out."
            )
        return _card(rows, config)
    found = [] if baseline is None else differences(rows, baseline)
    parts = [
        f"{config['kind']} of {config['model']} ({config['dtype']}), "
        f"seed {config['seed']}; mean score and 95 % interval, in per cent."
    ]
    by_lines = config["kind"] == "reasoning"
    for length in sorted({row["length"] for row in rows}):
        here = [row for row in rows if row["length"] == length]
        what = "tokens of answer" if by_lines else "tokens"
        parts.append(f"### {length} {what}")
        title = "Lines right" if by_lines else "Mean over tasks"
        parts.append(f"{title}:\n\n{overview(macro(here))}")
        if by_lines:
            exact = macro(here, "exact")
            parts.append(f"Whole answers right:\n\n{overview(exact, 'exact')}")
            parts.append(f"Outputs:\n\n{outputs(exact)}")
        if baseline is not None:
            compared = [record for record in found if record["length"] == length]
            title = f"Mean over tasks, minus that of {baseline} on the same questions"
            table = overview(compared, "difference")
            parts.append(f"{title}:\n\n{table}" if compared else f"{title}: none.")
        parts.append(f"By task:\n\n{by_task(here)}")
    return "\n\n".join(parts)


def _card(rows: Rows, config: Mapping[str, Any]) -> str:
    """Return a table of tasks and lengths, for each method and budget."""
    order = [(cell["task"], cell["length"]) for cell in config["cells"]]
    header = ["task", "length", "right, %", "95 %", "samples", "truncated, %", "MB"]
    parts = [
        f"card of {config['model']} ({config['dtype']}), seed {config['seed']}; whole "
        "answers right and 95 % interval, in per cent; MB of one row's cache."
    ]
    for (method, budget), group in groups(rows, ("method", "budget")).items():
        cells = {(r["task"], r["length"]): r for r in by_cell(group)}
        lines = [
            [
                r["task"],
                str(r["length"]),
                f"{100 * r['exact']:.1f}",
                f"{100 * r['exact_low']:.1f} to {100 * r['exact_high']:.1f}",
                str(r["samples"]),
                f"{100 * r['truncated']:.1f}",
                f"{r['cache_bytes'] / 1e6:.3f}",
            ]
            for r in (cells[place] for place in order if place in cells)
        ]
        title = method if method == budget == FULL else f"{method} at {budget}"
        parts.append(f"### {title}\n\n{markdown(header, lines)}")
    return "\n\n".join(parts)


def overview(records: Sequence[Record], column: str = "score") -> str:
    """Return a table of methods against budgets; the control has a column of its own.

    Args:
      records: from `metrics.macro` or `.differences`, of one length.
      column: which number of theirs.
    """
    budgets = list(dict.fromkeys(r["budget"] for r in records if r["budget"] != FULL))
    if any(r["budget"] == FULL for r in records):
        budgets.append(FULL)
    found = {(r["method"], r["budget"]): r for r in records}
    lines = []
    for method in dict.fromkeys(r["method"] for r in records):
        cells = (found.get((method, budget)) for budget in budgets)
        lines.append(
            [method, *("" if r is None else _plus_minus(r, column) for r in cells)]
        )
    return markdown(["method", *budgets], lines)


def by_task(rows: Rows) -> str:
    """Return a table of methods and budgets against tasks, with the mean over tasks."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    averages = {(r["method"], r["budget"]): r for r in macro(rows)}
    names = ("method", "budget")
    lines = []
    for (method, budget), group in groups(rows, names).items():
        by_name = groups(group, ("task",))
        cells = []
        for task in tasks:
            scores = [row["score"] for row in by_name.get((task,), [])]
            cells.append(_percent(*mean_interval(scores)) if scores else "")
        cells.append(_plus_minus(averages[method, budget], "score"))
        lines.append([method, budget, *cells])
    return markdown(["method", "budget", *tasks, "mean"], lines)


def _percent(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def outputs(records: Sequence[Record]) -> str:
    """Return a table of how long outputs are and how many were cut at the limit."""
    return markdown(
        ["method", "budget", "tokens of output", "truncated"],
        [
            [
                r["method"],
                r["budget"],
                f"{r['output_tokens']:.0f}",
                f"{100 * r['truncated']:.1f}",
            ]
            for r in records
        ],
    )


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with the first column to the left."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ruler, *lines))


def _plus_minus(record: Record, column: str) -> str:
    """Return a mean and the longer side of its interval, which may be lopsided."""
    mean = record[column]
    side = max(mean - record["low"], record["high"] - mean)
    sign = "+" if column == "difference" else ""
    return f"{100 * mean:{sign}.1f} ± {100 * side:.1f}"
