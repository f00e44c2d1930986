"""An experiment from flags to a folder: questions, sweep, metrics, pictures.

`run` may be interrupted at any time and called again with the same experiment: what is
in the folder is skipped, and all files that are made of predictions are made anew.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from jaxkv import figures
from jaxkv.cli.terminal import announce, progress
from jaxkv.evaluation import folder as evaluation_folder
from jaxkv.evaluation import metrics as evaluation_metrics
from jaxkv.evaluation import pictures as evaluation_pictures
from jaxkv.evaluation import questions as evaluation_questions
from jaxkv.evaluation import sweep, tables
from jaxkv.evaluation.card import Cell
from jaxkv.evaluation.folder import Predictions
from jaxkv.evaluation.methods import Budget, Method
from jaxkv.evaluation.questions import Match, Question
from jaxkv.evaluation.sweep import Batch, Unit
from jaxkv.inference import Stats
from jaxkv.language_model import LanguageModel
from jaxkv.options import described
from jaxkv.provenance import provenance, write_json

Kind = Literal["niah", "ruler", "reasoning", "file"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides a result, and how it is computed.

    Attributes:
      kind: which command asked.
      cells: tasks and lengths; empty for a file.
      file: questions in RULER's format, or None.
      methods: rows of the table.
      budgets: columns of the table.
      samples: per cell.
      seed: of the samples.
      max_new_tokens: the longest output; None takes each length's longest answer.
      match: whether one wanted string is enough.
      batch_size: most prompts generated from together.
      mixed: whether a batch may hold rows of different budgets.
      side_by_side: programs that run at the same time.
      seconds: after which no further batch begins; None for no limit.
      characters: of each output that are kept; 0 keeps all.
      arguments: of `jaxkv.generate` besides method and budget.
    """

    kind: Kind
    cells: Sequence[Cell] = ()
    file: Path | None = None
    methods: Sequence[Method]
    budgets: Sequence[Budget]
    samples: int = 0
    seed: int = 0
    max_new_tokens: int | None = None
    match: Match = "all"
    batch_size: int = 8
    mixed: bool = True
    side_by_side: int = 1
    seconds: float | None = None
    characters: int = 0
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    def config(self, lm: LanguageModel) -> dict[str, Any]:
        """Return what decides the predictions, for `config.yaml`."""
        return {
            "kind": self.kind,
            "model": lm.name,
            "dtype": lm.dtype.name,
            "query_aware": True,  # the question is a part of the prompt that is cut
            "seed": self.seed,
            "samples": self.samples,
            "cells": [dataclasses.asdict(cell) for cell in self.cells],
            "file": None if self.file is None else str(self.file),
            "methods": [
                {"name": m.name} | described({"prefill": m.prefill, "decode": m.decode})
                for m in self.methods
            ],
            "budgets": [budget.name for budget in self.budgets],
            "max_new_tokens": self.max_new_tokens,
            "match": self.match,
            "characters": self.characters,
            "arguments": described(self.arguments),
        }


class _Clock:
    """Seconds per phase of a run."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Count the time since the last lap towards a phase."""
        now = time.perf_counter()
        self.add(phase, now - self._last)
        self._last = now

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds


class _Record:
    """Takes the batches as they come: into the folder, the clock and the bar."""

    def __init__(
        self, predictions: Predictions, clock: _Clock, bar: Any, units: Sequence[Unit]
    ):
        self.stats: list[Stats] = []
        self._predictions = predictions
        self._clock = clock
        self._bar = bar
        self._task = bar.add_task("", total=sum(len(unit.rows) for unit in units))

    def __call__(self, batch: Batch) -> None:
        begin = time.perf_counter()
        self._predictions.append(batch.rows)
        self.stats.append(batch.stats)
        self._clock.add("write", time.perf_counter() - begin)
        self._clock.add("compile", batch.stats.compile_seconds)
        self._clock.add("prefill", batch.stats.prefill_seconds)
        self._clock.add("decode", batch.stats.decode_seconds)
        self._clock.add("judge", batch.judging_seconds)
        last = batch.rows[-1]
        text = f"{last['method']} {last['length']}"
        self._bar.update(self._task, advance=len(batch.rows), description=text)


def run(
    lm: LanguageModel, experiment: Experiment, folder: Path, *, pictures: bool | None
) -> dict[str, Any]:
    """Run what is missing in a folder, and write all its files.

    Args:
      lm: the model.
      experiment: what to run.
      folder: new, or of an earlier run of the same experiment.
      pictures: whether to draw; None draws where matplotlib is installed.

    Returns:
      The content of `metrics.json`.

    Raises:
      ValueError: the folder is of another experiment, or something cannot work; nothing
        has run then.
    """
    if pictures:
        figures.require()
    limit = experiment.seconds
    deadline = None if limit is None else time.monotonic() + limit
    clock = _Clock()
    predictions = Predictions(folder, experiment.config(lm))
    origin = provenance()
    with progress() as bar:
        questions = _questions(lm, experiment, bar)
        clock.lap("questions")
        units = _plan(lm, experiment, questions, predictions)
        clock.lap("plan")
        record = _Record(predictions, clock, bar, units)
        try:
            complete = sweep.run(
                lm,
                units,
                record,
                match=experiment.match,
                deadline=deadline,
                side_by_side=experiment.side_by_side,
                characters=experiment.characters,
                **experiment.arguments,
            )
        except KeyboardInterrupt:
            _say(f"interrupted; the same command goes on in {folder}")
            raise
        clock.lap("run")
    if record.stats:
        announce(lm, record.stats)
    metrics = write_report(folder, pictures=pictures)
    clock.lap("report")
    evaluation_folder.add_run(folder, origin | _meta(experiment, clock, complete))
    if not complete:
        _say(f"--seconds is over; the same command goes on in {folder}")
    return metrics


def _questions(lm: LanguageModel, experiment: Experiment, bar: Any) -> list[Question]:
    if experiment.file is not None:
        return evaluation_questions.read_task_file(
            lm, experiment.file, max_new_tokens=experiment.max_new_tokens
        )
    task = bar.add_task("samples", total=experiment.samples * len(experiment.cells))
    drawn = evaluation_questions.draw(
        lm,
        experiment.cells,
        samples=experiment.samples,
        seed=experiment.seed,
        advance=lambda count: bar.advance(task, count),
    )
    bar.remove_task(task)
    return drawn


def _plan(
    lm: LanguageModel,
    experiment: Experiment,
    questions: Sequence[Question],
    predictions: Predictions,
) -> list[Unit]:
    """Return what the folder lacks, or raise ValueError for what cannot work."""
    of_sequence = experiment.kind == "reasoning"
    units = sweep.plan(
        questions,
        experiment.methods,
        experiment.budgets,
        whole=sweep.wholes(questions, of_sequence=of_sequence),
        max_new_tokens=experiment.max_new_tokens,
        batch_size=experiment.batch_size,
        mixed=experiment.mixed,
        done=predictions.done,
    )
    sweep.check_positions(lm, units)
    return units


def write_report(folder: Path, *, pictures: bool | None) -> dict[str, Any]:
    """Write metrics and pictures of the predictions in a folder; return the metrics.

    Args:
      folder: of an experiment.
      pictures: as in `run`.

    Raises:
      ValueError: the folder holds no results, or matplotlib is missing.
    """
    rows = evaluation_metrics.typed(evaluation_folder.read(folder))
    config = evaluation_folder.read_config(folder)
    metrics = {
        "cells": evaluation_metrics.cells(rows),
        "macro": evaluation_metrics.macro(rows),
        "macro_exact": evaluation_metrics.macro(rows, "exact"),
    }
    write_json(folder / "metrics.json", metrics)
    if not rows:
        return metrics
    drawn = folder / "pictures"
    if config["kind"] == "niah":
        evaluation_pictures.write_grids(drawn, rows)
    if pictures is False:
        return metrics
    if pictures is None and not figures.available():
        _say(
            "no pictures without matplotlib; pip install 'jaxkv[plot]', then "
            f"jaxkv eval report {folder} --pictures"
        )
        return metrics
    title = f"{config['kind']}, {config['model']}"
    if config["kind"] == "niah":
        evaluation_pictures.draw_heat_maps(drawn, rows, title=title)
    else:
        evaluation_pictures.draw_budgets(
            drawn,
            rows,
            title=title,
            column="exact" if config["kind"] == "reasoning" else "score",
            label="whole answers right"
            if config["kind"] == "reasoning"
            else "score, mean over tasks",
        )
    return metrics


def markdown(folder: Path, *, baseline: str | None = None) -> str:
    """Return the report of a folder; see `evaluation_tables.report`."""
    rows = evaluation_metrics.typed(evaluation_folder.read(folder))
    config = evaluation_folder.read_config(folder)
    return tables.report(rows, config, baseline=baseline)


def _meta(experiment: Experiment, clock: _Clock, complete: bool) -> dict[str, Any]:
    device = jax.devices()[0].memory_stats() or {}  # a CPU has none
    return {
        "complete": complete,
        "batch_size": experiment.batch_size,
        "mixed": experiment.mixed,
        "side_by_side": experiment.side_by_side,
        # Those of programs that ran side by side overlap, and exceed "run".
        "seconds": {phase: round(s, 3) for phase, s in clock.seconds.items()},
        "peak_bytes": device.get("peak_bytes_in_use"),
    }


def _say(message: str) -> None:
    print(f"jaxkv: {message}", file=sys.stderr)
