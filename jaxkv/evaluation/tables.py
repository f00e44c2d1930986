"""Results as Markdown tables, for the README and the terminal. Numbers are per cent."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxkv.evaluation.coverage import Coverage, Point, coverage, mark
from jaxkv.evaluation.methods import FULL
from jaxkv.evaluation.metrics import Rows, by_cell, differences, groups, macro
from jaxkv.evaluation.questions import AGNOSTIC, AWARE
from jaxkv.evaluation.statistics import mean_interval

Record = Mapping[str, Any]
Shares = Mapping[Point, tuple[int, int]]  # answers that are there, and are wanted


def report(
    rows: Rows,
    config: Mapping[str, Any],
    *,
    baseline: str | None = None,
    command: str | None = None,
) -> str:
    """Return everything that `jaxkv eval report` prints of one folder.

    Args:
      rows: each once, with numbers.
      config: of the folder.
      baseline: a method that all others are compared with, or None.
      command: the one that goes on with what is missing, if it is known.

    Raises:
      ValueError: no row is of the baseline, or the folder is a card.
    """
    cover = coverage(rows, config)
    if config["kind"] == "card":
        if baseline is not None:
            raise ValueError(
                f"a card has no average to compare with that of {baseline!r}; leave "
                "--baseline out."
            )
        return _card(rows, config, cover, command)
    found = [] if baseline is None else differences(rows, baseline)
    parts = [
        _line(
            f"{config['kind']} of {config['model']} ({config['dtype']}), "
            f"{'' if protocol_of(config) == AWARE else AGNOSTIC + ', '}"
            f"seed {config['seed']}; mean score and 95 % interval, in per cent."
        ),
        *_unfinished(cover, command),
    ]
    by_lines = config["kind"] == "reasoning"
    for length in sorted({length for _, length, _ in cover.wanted}):
        here = [row for row in rows if row["length"] == length]
        what = "tokens of answer" if by_lines else "tokens"
        parts.append(f"### {length} {what}")
        title = "Lines right" if by_lines else "Mean over tasks"
        shares = {p: cover.share(*p, length=length) for p in cover.points}
        parts.append(f"{title}:\n\n{overview(macro(here), shares)}")
        if by_lines:
            exact = macro(here, "exact")
            parts.append(f"Whole answers right:\n\n{overview(exact, shares, 'exact')}")
            parts.append(f"Outputs:\n\n{outputs(exact, shares)}")
        if baseline is not None:
            compared = [record for record in found if record["length"] == length]
            title = f"Mean over tasks, minus that of {baseline} on the same questions"
            pairs = {(r["method"], r["budget"]): r["samples"] for r in compared}
            others = {
                point: (pairs.get(point, 0), wanted)
                for point, (_, wanted) in shares.items()
                if point[0] not in (baseline, FULL)
            }
            table = overview(compared, others, "difference")
            parts.append(f"{title}:\n\n{table}" if compared else f"{title}: none.")
        parts.append(f"By task:\n\n{by_task(here, cover, length)}")
    return "\n\n".join(parts)


def protocol_of(config: Mapping[str, Any]) -> str:
    """Return what a folder says of where questions stand."""
    return AWARE if config.get("query_aware", True) else AGNOSTIC


# What two folders must have in common for their tables to stand side by side.
_SHARED = (
    *("kind", "weights", "network", "tokenizer", "dtype", "seed", "samples", "file"),
    *("chat", "system", "match"),
)


def beside(folders: Sequence[tuple[Rows, Mapping[str, Any]]]) -> str:
    """Return the means over tasks of two folders, their protocols side by side.

    Args:
      folders: rows and configuration of each.

    Raises:
      ValueError: both are of one protocol, or they are not otherwise the same.
    """
    (_, first), (_, second) = folders
    names = [protocol_of(config) for _, config in folders]
    if names[0] == names[1]:
        raise ValueError(
            f"the folders are both {names[0]}; give one of each --protocol."
        )
    for name in _SHARED:
        if first.get(name) != second.get(name):
            raise ValueError(
                f"the folders differ in {name}, {first.get(name)!r} and "
                f"{second.get(name)!r}; give two runs that differ in --protocol alone."
            )
    covers = [coverage(rows, config) for rows, config in folders]
    points = list(dict.fromkeys(point for cover in covers for point in cover.points))
    budgets = list(dict.fromkeys(b for _, b in points if b != FULL))
    if any(budget == FULL for _, budget in points):
        budgets.append(FULL)
    title = f"{first['kind']} of {first['model']} ({first['dtype']}), mean over tasks"
    parts = [_line(f"{title} and 95 % interval, in per cent.")]
    for length in sorted({n for cover in covers for _, n, _ in cover.wanted}):
        found = [
            {
                (record["method"], record["budget"]): record
                for record in macro([row for row in rows if row["length"] == length])
            }
            for rows, _ in folders
        ]
        lines = []
        for method in dict.fromkeys(method for method, _ in points):
            line = [method]
            for budget in budgets:
                for records, cover in zip(found, covers, strict=True):
                    record = records.get((method, budget))
                    share = cover.share(method, budget, length=length)
                    value = "" if record is None else _plus_minus(record, "score")
                    line.append(f"{value}{mark(share) if value else ''}")
            lines.append(line)
        header = [f"{budget}, {name}" for budget in budgets for name in names]
        table = markdown(["method", *header], lines)
        parts.append(f"### {length} tokens\n\n{table}")
    return "\n\n".join(parts)


def unfinished(cover: Coverage) -> str:
    """Return what a title says of a comparison that is not complete; else ""."""
    there, wanted = cover.total
    return "" if cover.complete else f"unfinished: {there} of {wanted} rows"


def _unfinished(cover: Coverage, command: str | None) -> list[str]:
    if cover.complete:
        return []
    there, wanted = cover.total
    none = [
        name if name == budget == FULL else f"{name} at {budget}"
        for name, budget in cover.points
        if cover.share(name, budget)[0] == 0
    ]
    lacking = f" Nothing yet of {', '.join(none)}." if none else ""
    on = f": `{command}`" if command else ""
    return [
        _line(
            f"**Unfinished: {there} of {wanted} rows.** A number before [2 of 5] is of "
            f"2 questions out of 5, and not to be compared with others.{lacking} A run "
            f"with the same flags goes on where it stopped{on}."
        )
    ]


def _card(
    rows: Rows, config: Mapping[str, Any], cover: Coverage, command: str | None
) -> str:
    """Return a table of tasks and lengths, for each method and budget."""
    header = ["task", "length", "right, %", "95 %", "samples", "truncated, %", "MB"]
    parts = [
        _line(
            f"card of {config['model']} ({config['dtype']}), seed {config['seed']}; "
            "whole answers right and 95 % interval, in per cent; MB of one row's cache."
        ),
        *_unfinished(cover, command),
    ]
    found = groups(rows, ("method", "budget"))
    for method, budget in cover.points:
        group = found.get((method, budget), [])
        cells = {(r["task"], r["length"]): r for r in by_cell(group)}
        lines = []
        for task, length, _ in cover.wanted:
            there, wanted = cover.share(method, budget, task=task, length=length)
            count = str(there) if there == wanted else f"{there} of {wanted}"
            numbers = ["", "", count, "", ""]
            if r := cells.get((task, length)):
                numbers = [
                    f"{100 * r['exact']:.1f}",
                    f"{100 * r['exact_low']:.1f} to {100 * r['exact_high']:.1f}",
                    count,
                    f"{100 * r['truncated']:.1f}",
                    f"{r['cache_bytes'] / 1e6:.3f}",
                ]
            lines.append([task, str(length), *numbers])
        title = method if method == budget == FULL else f"{method} at {budget}"
        parts.append(f"### {_line(title)}\n\n{markdown(header, lines)}")
    return "\n\n".join(parts)


def overview(records: Sequence[Record], shares: Shares, column: str = "score") -> str:
    """Return a table of methods against budgets; the control has a column of its own.

    Args:
      records: from `metrics.macro` or `.differences`, of one length.
      shares: of each method and budget that the table is to have.
      column: which number of theirs.
    """
    budgets = list(dict.fromkeys(b for _, b in shares if b != FULL))
    if any(budget == FULL for _, budget in shares):
        budgets.append(FULL)
    found = {(r["method"], r["budget"]): r for r in records}
    lines = []
    for method in dict.fromkeys(method for method, _ in shares):
        line = [method]
        for point in ((method, budget) for budget in budgets):
            value = _plus_minus(found[point], column) if point in found else ""
            line.append(f"{value}{mark(shares.get(point, (0, 0)))}".strip())
        lines.append(line)
    return markdown(["method", *budgets], lines)


def by_task(rows: Rows, cover: Coverage, length: int) -> str:
    """Return a table of methods and budgets against tasks, with the mean over tasks."""
    tasks = list(dict.fromkeys(task for task, n, _ in cover.wanted if n == length))
    averages = {(r["method"], r["budget"]): r for r in macro(rows)}
    found = groups(rows, ("method", "budget", "task"))
    lines = []
    for method, budget in cover.points:
        cells = []
        for task in tasks:
            scores = [row["score"] for row in found.get((method, budget, task), [])]
            value = _percent(*mean_interval(scores)) if scores else ""
            share = cover.share(method, budget, task=task, length=length)
            cells.append(f"{value}{mark(share)}".strip())
        mean = averages.get((method, budget))
        value = "" if mean is None else _plus_minus(mean, "score")
        share = cover.share(method, budget, length=length)
        lines.append([method, budget, *cells, f"{value}{mark(share)}".strip()])
    return markdown(["method", "budget", *tasks, "mean"], lines)


def _percent(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def outputs(records: Sequence[Record], shares: Shares) -> str:
    """Return a table of how long outputs are and how many were cut at the limit."""
    return markdown(
        ["method", "budget", "tokens of output", "truncated"],
        [
            [
                r["method"],
                r["budget"],
                f"{r['output_tokens']:.0f}{mark(shares[r['method'], r['budget']])}",
                f"{100 * r['truncated']:.1f}",
            ]
            for r in records
        ],
    )


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with the first column to the left.

    A name may hold anything, as that of a file may, and stays in its place.
    """
    ruler = ["---", *["---:"] * (len(header) - 1)]
    table = [[_line(cell).replace("|", r"\|") for cell in line] for line in lines]
    names = [_line(cell).replace("|", r"\|") for cell in header]
    return "\n".join(f"| {' | '.join(line)} |" for line in (names, ruler, *table))


def _line(text: str) -> str:
    """Return a text on one line, without characters that a terminal would obey."""
    shown = (c if c.isprintable() else " " for c in text)
    return " ".join("".join(shown).split())


def _plus_minus(record: Record, column: str) -> str:
    """Return a mean and the longer side of its interval, which may be lopsided."""
    mean = record[column]
    side = max(mean - record["low"], record["high"] - mean)
    sign = "+" if column == "difference" else ""
    return f"{100 * mean:{sign}.1f} ± {100 * side:.1f}"
