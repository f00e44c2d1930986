"""What `jaxkv bench throughput` makes of its records: ratios, sentences, a picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxkv import figures

TRANSFORMERS = "transformers"
BENCHMARK = "throughput-transformers"
PICTURES = (".png", ".svg", ".pdf")


def ratios(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare methods at equal batches, and each at its best batch.

    Args:
      rows: with `method`, `batch`, `fits`, and `tokens_per_second` if so.

    Returns:
      For every method and every full cache (`full`, `transformers`) a record of
      `method`, `against`, `equal_batch` (batch and ratio) and `best_batch` (both
      batches and the ratio).
    """
    speeds = _speeds(rows)
    found = []
    for against in ("full", TRANSFORMERS):
        for method in speeds:
            if against not in speeds or method in (against, TRANSFORMERS):
                continue
            mine, other = speeds[method], speeds[against]
            best = max(mine, key=mine.__getitem__)
            best_other = max(other, key=other.__getitem__)
            found.append(
                {
                    "method": method,
                    "against": against,
                    "equal_batch": [
                        {"batch": batch, "ratio": mine[batch] / other[batch]}
                        for batch in sorted(mine.keys() & other.keys())
                    ],
                    "best_batch": {
                        "batch": best,
                        "batch_against": best_other,
                        "ratio": mine[best] / other[best_other],
                    },
                }
            )
    return found


def read_transformers(path: Path) -> dict[str, Any]:
    """Return a result of the benchmark script, or raise ValueError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--transformers {path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("benchmark") != BENCHMARK:
        raise ValueError(
            f"--transformers {path} is no result of "
            "benchmarks/throughput_transformers.py."
        )
    return content


def add_transformers(result: dict[str, Any], theirs: Mapping[str, Any]) -> None:
    """Put its rows and its provenance into a result; ValueError if of other work."""
    for key in ("model", "dtype", "prompt", "new", "device"):
        if theirs.get(key) != result[key]:
            raise ValueError(
                f"--transformers: the file is of {key}={theirs.get(key)}, but this run "
                f"is of {key}={result[key]}; run the script for the same."
            )
    rest = {key: value for key, value in theirs.items() if key != "rows"}
    result[TRANSFORMERS] = rest
    result["rows"] += theirs["rows"]


def sentences(result: dict[str, Any]) -> list[str]:
    """Return one line per ratio, and one on what was not started."""
    lines = []
    for pair in result["ratios"]:
        best = pair["best_batch"]
        equal = [f"{x['ratio']:.2f} at {x['batch']}" for x in pair["equal_batch"]]
        lines.append(
            f"{pair['method']} against {pair['against']}: {best['ratio']:.2f} times at "
            f"their best batches ({best['batch']} and {best['batch_against']}); at "
            f"equal ones {', '.join(equal) or 'not measured'}"
        )
    if result["not_started"]:
        cells = (f"{x['method']} {x['batch']}" for x in result["not_started"])
        lines.append(f"time was up before {', '.join(cells)}")
    return lines


def check_picture(path: Path) -> None:
    """Raise ValueError for a kind of file that is not drawn, or without matplotlib."""
    if path.suffix not in PICTURES:
        raise ValueError(
            f"--picture takes a file that ends in {', '.join(PICTURES)}; got {path}."
        )
    figures.require()


def draw_picture(path: Path, result: Mapping[str, Any]) -> None:
    """Draw a line per method, and write how its best batch compares.

    Args:
      path: that `check_picture` has passed.
      result: of `jaxkv bench throughput`.
    """
    figure = figures.empty(figsize=(7, 4.5))
    axes = figure.subplots()
    speeds = _speeds(result["rows"])
    best = {
        pair["method"]: f": {pair['best_batch']['ratio']:.2f} x full, each at its best"
        for pair in result["ratios"]
        if pair["against"] == "full"
    }
    for method, by_batch in speeds.items():
        batches = sorted(by_batch)
        heights = [by_batch[batch] for batch in batches]
        axes.plot(batches, heights, marker="o", label=method + best.get(method, ""))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    every = sorted({batch for by_batch in speeds.values() for batch in by_batch})
    axes.set_xticks(every, map(str, every))
    axes.set_xlabel("batch")
    axes.set_ylabel("new tokens per second")
    axes.set_title(
        f"{result['model']}, {result['prompt']} + {result['new']} tokens, budget "
        f"{result['budget']}\n{result['device']}, {result['dtype']}; sampled steps",
        fontsize="medium",
    )
    axes.grid(alpha=0.3)
    if speeds:
        axes.legend()
    figures.write(figure, path)


def _speeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Return the tokens per second of each method, by batch."""
    speeds: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["fits"]:
            of_method = speeds.setdefault(row["method"], {})
            of_method[row["batch"]] = row["tokens_per_second"]
    return speeds
