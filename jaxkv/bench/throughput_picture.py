"""The picture of `jaxkv bench throughput`: tokens per second by batch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxkv import figures

KINDS = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """Raise ValueError for a kind of file that is not drawn, or without matplotlib."""
    if path.suffix not in KINDS:
        raise ValueError(
            f"--picture takes a file that ends in {', '.join(KINDS)}; got {path}."
        )
    figures.require()


def draw(path: Path, result: Mapping[str, Any]) -> None:
    """Draw a line per method, and write how its best batch compares.

    Args:
      path: that `check` has passed.
      result: of `jaxkv bench throughput`.
    """
    figure = figures.empty(figsize=(7, 4.5))
    axes = figure.subplots()
    speeds: dict[str, dict[int, float]] = {}
    for row in result["rows"]:
        if row["fits"]:
            of_method = speeds.setdefault(row["method"], {})
            of_method[row["batch"]] = row["tokens_per_second"]
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
