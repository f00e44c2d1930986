"""An experiment from flags to a folder: questions, sweep, metrics, pictures.

`run_experiment` may be interrupted at any time and called again with the same
experiment: what is in the folder is skipped, and all files that are made of predictions
are made anew.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxkv import figures
from jaxkv.evaluation import digests, plan, sweep
from jaxkv.evaluation.folder import Predictions, begin_run, end_run, refuse_other
from jaxkv.evaluation.lock import one_writer
from jaxkv.evaluation.methods import Budget, Method
from jaxkv.evaluation.plan import Unit
from jaxkv.evaluation.questions import (
    AGNOSTIC,
    AWARE,
    Cell,
    Match,
    Protocol,
    Question,
    apart,
    as_chat,
    as_prompts,
    draw,
    with_chat_words,
)
from jaxkv.evaluation.reports import write_report
from jaxkv.evaluation.sweep import Batch
from jaxkv.evaluation.task_files import read_task_file
from jaxkv.language_model import LanguageModel
from jaxkv.options import described
from jaxkv.provenance import provenance
from jaxkv.text.completion import Stats

Kind = Literal["card", "niah", "ruler", "reasoning", "file"]
Progress = Callable[[str, int, int], Any]  # what is done, how much of it, of how much


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
      max_new_tokens: the longest output; None takes the longest answer of each length,
        for the card of each cell, for a file what it says.
      match: whether one wanted string is enough.
      protocol: whether a question is a part of what is cut, or comes behind it.
      chat: ask in the model's chat template.
      system: what the system says first, in a chat.
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
    protocol: Protocol = AWARE
    chat: bool = False
    system: str | None = None
    batch_size: int = 8
    mixed: bool = True
    side_by_side: int = 1
    seconds: float | None = None
    characters: int = 0
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    def decided(self, lm: LanguageModel) -> dict[str, Any]:
        """Return what decides the predictions, for `config.yaml`, but the questions."""
        return {
            "kind": self.kind,
            "model": lm.name,
            "dtype": lm.dtype.name,
            **digests.of_model(lm),
            "query_aware": self.protocol == AWARE,
            "seed": self.seed,
            "samples": self.samples,
            "file": None if self.file is None else str(self.file),
            "methods": [
                {"name": m.name} | described({"prefill": m.prefill, "decode": m.decode})
                for m in self.methods
            ],
            "budgets": [budget.name for budget in self.budgets],
            "max_new_tokens": self.max_new_tokens,
            "match": self.match,
            "chat": self.chat,
            "system": self.system,
            "characters": self.characters,
            "arguments": described(self.arguments),
        }


def _cells(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Return the cells of questions for `config.yaml`, each with what it asks."""
    found: dict[Cell, list[Question]] = {}
    for question in questions:
        found.setdefault(question.cell, []).append(question)
    return [
        dataclasses.asdict(cell)
        | {"questions": len(some), "digest": digests.of_questions(some)}
        for cell, some in found.items()
    ]


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
    """Takes the batches as they come: into the folder, the clock and the progress."""

    def __init__(
        self, predictions: Predictions, clock: _Clock, show: Progress, total: int
    ):
        self.stats: list[Stats] = []
        self._predictions, self._clock = predictions, clock
        self._show, self._done, self._total = show, 0, total

    def __call__(self, batch: Batch) -> None:
        begin = time.perf_counter()
        self._predictions.append(batch.rows)
        self.stats.append(batch.stats)
        self._clock.add("write", time.perf_counter() - begin)
        self._clock.add("compile", batch.stats.compile_seconds)
        self._clock.add("prefill", batch.stats.prefill_seconds)
        self._clock.add("decode", batch.stats.decode_seconds)
        self._clock.add("judge", batch.judging_seconds)
        self._done += len(batch.rows)
        last = batch.rows[-1]
        self._show(f"{last['method']} {last['length']}", self._done, self._total)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What `run_experiment` gave.

    Attributes:
      config: the content of `config.yaml`.
      metrics: the content of `metrics.json`.
      meta: what `run_meta.json` says of the run.
      stats: what each batch cost that has run now.
      ran: whether something is missing, and why.
    """

    config: dict[str, Any]
    metrics: dict[str, Any]
    meta: dict[str, Any]
    stats: list[Stats]
    ran: sweep.Ran


def run_experiment(
    lm: LanguageModel,
    experiment: Experiment,
    folder: Path,
    *,
    pictures: bool,
    show: Progress = lambda what, done, total: None,
    tell: Callable[[str], Any] = lambda line: None,
) -> Outcome:
    """Run what is missing in a folder, and write all its files.

    Args:
      lm: the model.
      experiment: what to run.
      folder: new, or of an earlier run of the same experiment.
      pictures: whether to draw.
      show: is told what is done.
      tell: is told what was wrong and has been put right, a line each.

    Raises:
      ValueError: the folder is of another experiment, somebody else writes into it, or
        something cannot work; nothing has run then. Or logits are no numbers, so that
        outputs cannot be scored; what has run before is kept.
      OSError: something cannot be written; what has been written is kept.
    """
    if pictures:
        figures.require()
    limit = experiment.seconds
    deadline = None if limit is None else time.monotonic() + limit
    clock = _Clock()
    with one_writer(folder):
        config = experiment.decided(lm)
        refuse_other(folder, config)  # before any question is made
        questions = questions_of(lm, experiment, show)
        config["cells"] = _cells(questions)
        clock.lap("questions")
        predictions = Predictions(folder, config)
        if predictions.mended:
            tell(predictions.mended)
        units = _plan(lm, experiment, questions, predictions)
        clock.lap("plan")
        origin = provenance()
        begin_run(folder, origin | {"complete": False})
        total = sum(len(unit.rows) for unit in units)
        record = _Record(predictions, clock, show, total)
        show("the first batch", 0, total)
        ran = sweep.run_units(
            lm,
            units,
            record,
            match=experiment.match,
            deadline=deadline,
            side_by_side=experiment.side_by_side,
            characters=experiment.characters,
            tell=tell,
            **experiment.arguments,
        )
        clock.lap("run")
        metrics = write_report(folder, pictures=pictures)
        clock.lap("report")
        meta = origin | _meta(experiment, clock, ran.complete)
        end_run(folder, meta)
    return Outcome(
        config=config, metrics=metrics, meta=meta, stats=record.stats, ran=ran
    )


def questions_of(
    lm: LanguageModel, experiment: Experiment, show: Progress
) -> list[Question]:
    """Return what is asked, tokenised once, in the way in which it is asked."""
    chat, system = experiment.chat, experiment.system
    if experiment.protocol == AGNOSTIC:
        for method in experiment.methods:
            if method.decode.evicts:
                raise ValueError(
                    f"{method.name} evicts while decoding, but --protocol {AGNOSTIC} "
                    "cuts documents only; leave one of them out."
                )
    if experiment.file is not None:
        questions = read_task_file(
            *(lm, experiment.file),
            max_new_tokens=experiment.max_new_tokens,
            chat=chat,
            system=system,
        )
        if experiment.protocol == AWARE:
            return questions
        return apart(lm, questions, chat=chat, system=system)
    total = experiment.samples * len(experiment.cells)
    drawn = draw(
        lm,
        experiment.cells,
        samples=experiment.samples,
        seed=experiment.seed,
        advance=lambda done: show("samples", done, total),
    )
    if experiment.protocol == AGNOSTIC:
        asked = with_chat_words(drawn) if chat else drawn
        return apart(lm, asked, chat=chat, system=system)
    return as_chat(lm, drawn, system=system) if chat else as_prompts(lm, drawn)


def _plan(
    lm: LanguageModel,
    experiment: Experiment,
    questions: Sequence[Question],
    predictions: Predictions,
) -> list[Unit]:
    """Return what the folder lacks, or raise ValueError for what cannot work."""
    units = plan.plan(
        questions,
        experiment.methods,
        experiment.budgets,
        whole=whole(experiment.kind, questions, experiment.protocol),
        outputs=plan.longest_outputs(
            questions,
            by_cell=experiment.kind == "card",
            limit=experiment.max_new_tokens,
        ),
        batch_size=experiment.batch_size,
        mixed=experiment.mixed,
        apart=experiment.kind == "file",
        done=predictions.done,
    )
    plan.check_positions(lm, units)
    return units


def whole(
    kind: Kind, questions: Sequence[Question], protocol: Protocol = AWARE
) -> Callable[[Question], float]:
    """Return what says of a question how many tokens 100 % of them are.

    They are each document's own where documents are cut, and each prompt's for the
    card; for `reasoning` the mean of prompt and gold answer together over a cell's
    questions; for all others the cell's length.
    """
    if protocol == AGNOSTIC:
        return lambda question: question.document
    if kind == "card":
        return lambda question: len(question.ids)
    if kind != "reasoning":
        return lambda question: question.cell.length
    sums: dict[Cell, list[int]] = {}
    for q in questions:
        sums.setdefault(q.cell, []).append(len(q.ids) + q.answer_tokens)
    means = {cell: float(np.mean(tokens)) for cell, tokens in sums.items()}
    return lambda question: means[question.cell]


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
