"""The tables of README.md, from folders of `jaxkv eval`.

    python benchmarks/tables.py FOLDER
    python benchmarks/tables.py AWARE AGNOSTIC --first-token FOLDER

A table for each length: methods by their mean over budgets and folders, the best first,
mean over tasks in per cent with its 95 % interval; the full cache stands in the title.
Of several folders each budget has a column of each. `--first-token` adds a table of
what `first_token.py` has written into a folder, a file or more.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxkv.evaluation.folder import read_config
from jaxkv.evaluation.tables import markdown, protocol_of

FULL = "full"


def cell(record: dict[str, Any] | None) -> str:
    """Return a mean and the longer side of its interval."""
    if record is None:
        return ""
    mean = record["score"]
    side = max(mean - record["low"], record["high"] - mean)
    rows, wanted = record["samples"], record["wanted"]
    lacking = "" if rows == wanted else f" [{rows} of {wanted}]"
    return f"{100 * mean:.1f} ± {100 * side:.1f}{lacking}"


def scores(folders: Sequence[Path]) -> Iterable[str]:
    """Yield a table for each length."""
    names = [protocol_of(read_config(folder)) for folder in folders]
    found: dict[tuple, dict[str, Any]] = {}
    for number, folder in enumerate(folders):
        metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
        for r in metrics["macro"]:
            found[r["length"], r["method"], r["budget"], number] = r
    for length in sorted({key[0] for key in found}):
        here = {key[1:]: r for key, r in found.items() if key[0] == length}
        budgets = {budget for _, budget, _ in here if budget != FULL}
        columns = [
            (budget, number)
            for budget in sorted(budgets, key=lambda b: float(b.removesuffix("%")))
            for number in range(len(folders))
        ]
        means = {}
        for method in {method for method, *_ in here} - {FULL}:
            some = [here.get((method, *column)) for column in columns]
            there = [r["score"] for r in some if r]
            means[method] = sum(there) / len(there)
        lines = [
            [f"`{method}`", *(cell(here.get((method, *column))) for column in columns)]
            for method in sorted(means, key=lambda m: -means[m])
        ]
        whole = [cell(here.get((FULL, FULL, n))) for n in range(len(folders))]
        title = f"{length:,} tokens (full cache {', '.join(filter(None, whole))})"
        header = []
        for budget, number in columns:
            shown = budget.replace("%", " %")
            header.append(f"{shown}, {names[number]}" if len(names) > 1 else shown)
        yield markdown([title, *header], lines)


def first_tokens(folder: Path) -> str:
    """Return a table of times to the first token, in ms, and of memory, in MB."""
    rows = {}
    for path in sorted(folder.glob("*.json")):
        for row in json.loads(path.read_text("utf-8"))["rows"]:
            rows[row["method"], row["protocol"], row["batch"]] = row
    sizes = sorted({batch for *_, batch in rows})
    lines = []
    for method in dict.fromkeys(method for method, *_ in rows):
        line = [f"`{method}`"]
        for size in sizes:
            aware = rows.get((method, "query-aware", size), {})
            behind = rows.get((method, "query-agnostic", size), {})
            times = [aware.get("first_token_seconds"), behind.get("document_seconds")]
            times.append(behind.get("first_token_seconds"))
            line += ["" if t is None else f"{1000 * t:.1f}" for t in times]
            line.append(megabytes(behind.get("cache_bytes")))
            line += [megabytes(each.get("program_bytes")) for each in (aware, behind)]
        lines.append(line)
    lines.sort(key=lambda line: float(line[1] or "inf"))
    header = [
        f"{what}, {size}"
        for size in sizes
        for what in ("prompt", "document", "question", "cache", "peak", "peak apart")
    ]
    return markdown(["ms, MB", *header], lines)


def megabytes(number: float | None) -> str:
    """Return bytes in MB."""
    return "" if number is None else f"{number / 1e6:,.0f}"


def main(
    folders: Annotated[list[Path], typer.Argument(exists=True, help="Of results.")],
    first_token: Annotated[
        Path | None, typer.Option(exists=True, help="Folder of its files.")
    ] = None,
) -> None:
    """Print tables as README.md has them."""
    for table in scores(folders):
        print(table + "\n")
    if first_token is not None:
        print(first_tokens(first_token))


if __name__ == "__main__":
    typer.run(main)
