"""`jaxkv eval card`: runs an evaluation, and shows and writes what came out."""

import csv
import dataclasses
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.table

from jaxkv.cli import parsing
from jaxkv.cli.terminal import announce, megabytes, progress
from jaxkv.evaluation import card
from jaxkv.evaluation.card import Cell, Prediction
from jaxkv.evaluation.folder import write_yaml
from jaxkv.language_model import LanguageModel
from jaxkv.options import described
from jaxkv.provenance import provenance, write_json, write_whole

_COLUMNS = (
    "task",
    "length",
    "index",
    "right",
    "score",
    "prompt_tokens",
    "output_tokens",
    "truncated",
    "cache_bytes",
    "outputs",
    "prediction",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """An evaluation that has run.

    Attributes:
      config: everything that decided the result.
      meta: where and when it ran.
      metrics: one row per cell.
      predictions: one per sample.
    """

    config: dict[str, Any]
    meta: dict[str, Any]
    metrics: list[dict[str, Any]]
    predictions: list[Prediction]

    @property
    def summary(self) -> dict[str, Any]:
        """All but the predictions, ready for JSON."""
        return {"config": self.config, "metrics": self.metrics, "run_meta": self.meta}


def cells(tasks: str | None, lengths: str, answers: str) -> list[Cell]:
    """Return the cells that comma-separated flags ask for.

    Raises:
      ValueError: a task is unknown, or a length is no positive number.
    """
    known = card.RETRIEVAL + card.QUOTING + card.REASONING
    wanted = parsing.names(tasks, known)
    everything = card.default_cells(
        parsing.positive("--lengths", lengths), parsing.positive("--answers", answers)
    )
    return [cell for cell in everything if cell.task in wanted]


def run(
    lm: LanguageModel,
    asked: Sequence[Cell],
    *,
    samples: int,
    batch_size: int,
    seed: int,
    **arguments: Any,
) -> Report:
    """Evaluate, with a progress bar.

    Args:
      lm: the model.
      asked: what to evaluate.
      samples: per cell.
      batch_size: prompts generated from together.
      seed: of the samples.
      **arguments: of `jaxkv.generate`.
    """
    if lm.tokenizer is None:
        raise ValueError(f"{lm.name} has no tokenizer, and the tasks are made of text.")
    begin = time.perf_counter()
    predictions: list[Prediction] = []
    with progress() as bar:
        task = bar.add_task("", total=samples * len(asked))
        for prediction in card.evaluate(
            lm, asked, samples=samples, batch_size=batch_size, seed=seed, **arguments
        ):
            predictions.append(prediction)
            cell = prediction.cell
            bar.update(task, advance=1, description=f"{cell.task} {cell.length}")
    announce(lm, (prediction.stats for prediction in predictions))
    metrics = card.summarize(predictions)
    for row in metrics:
        cell = Cell(task=row["task"], length=row["length"])
        mine = [_cache_bytes(p) for p in predictions if p.cell == cell]
        row["cache_bytes"] = sum(mine) / len(mine)
    return Report(
        config={
            "model": lm.name,
            "dtype": lm.dtype.name,
            "samples": samples,
            "batch_size": batch_size,
            "seed": seed,
            "cells": [dataclasses.asdict(cell) for cell in asked],
            "options": described(arguments),
        },
        meta=provenance() | {"seconds": time.perf_counter() - begin},
        metrics=metrics,
        predictions=predictions,
    )


def write(folder: Path, report: Report) -> None:
    """Write predictions, configuration, circumstances, and at last the metrics.

    Where `metrics.json` is, the other three are complete.
    """
    (folder / "metrics.json").unlink(missing_ok=True)  # of an earlier run
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS)
    writer.writeheader()
    writer.writerows(map(_row, report.predictions))
    write_whole(folder / "predictions.csv", text.getvalue())
    write_yaml(folder / "config.yaml", report.config)
    write_json(folder / "run_meta.json", report.meta)
    write_json(folder / "metrics.json", {"metrics": report.metrics})


def table(report: Report) -> rich.table.Table:
    """Return the metrics as a table for people."""
    result = rich.table.Table("task", title=report.config["model"])
    for column in ("length", "right", "95 %", "samples", "truncated", "cache"):
        result.add_column(column, justify="right")
    for row in report.metrics:
        result.add_row(
            row["task"],
            str(row["length"]),
            f"{row['accuracy']:.1%}",
            f"{row['low']:.1%} to {row['high']:.1%}",
            str(row["samples"]),
            f"{row['truncated']:.1%}",
            megabytes(row["cache_bytes"]),
        )
    return result


def _cache_bytes(prediction: Prediction) -> int:
    """Return one row's share; all rows of a batch have as many slots."""
    return prediction.stats.cache_bytes // len(prediction.stats.prompt_tokens)


def _row(prediction: Prediction) -> dict[str, Any]:
    fields = {name: getattr(prediction, name, None) for name in _COLUMNS}
    return fields | {
        "task": prediction.cell.task,
        "length": prediction.cell.length,
        "cache_bytes": _cache_bytes(prediction),
        "outputs": json.dumps(prediction.outputs),
    }
