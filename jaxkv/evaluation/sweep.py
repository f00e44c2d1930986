"""Runs every method at every budget over the same questions, as `plan` arranges them.

Two programs may run side by side, so that one compiles while the other computes.
"""

import concurrent.futures
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxkv.evaluation.plan import Row, Unit
from jaxkv.evaluation.questions import Match, judge
from jaxkv.evaluation.rows import cut
from jaxkv.language_model import LanguageModel
from jaxkv.soundness import LogitsError
from jaxkv.text.completion import Completion, Stats
from jaxkv.text.documents import compress
from jaxkv.text.inference import generate
from jaxkv.text.stopwatch import stopwatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """What one batch gave.

    Attributes:
      rows: columns of `predictions.csv`.
      stats: what it cost.
      judging_seconds: spent on scoring the outputs.
    """

    rows: list[dict[str, Any]]
    stats: Stats
    judging_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ran:
    """What has become of units.

    Attributes:
      complete: whether nothing is missing.
      late: whether the deadline has passed before all had begun.
      failed: of each unit that did not fit into the memory, what it was and how many
        rows it lacks.
    """

    complete: bool
    late: bool
    failed: Sequence[str]


def run_units(
    lm: LanguageModel,
    units: Sequence[Unit],
    record: Callable[[Batch], Any],
    *,
    match: Match = "all",
    deadline: float | None = None,
    side_by_side: int = 1,
    characters: int = 0,
    tell: Callable[[str], Any] = lambda line: None,
    **arguments: Any,
) -> Ran:
    """Run units and hand over each batch as it ends, one at a time.

    A batch that does not fit into the memory is run again as two, and so on; a row that
    does not fit alone leaves out the rest of its unit, and the others go on.

    Args:
      lm: the model.
      units: from `plan`.
      record: is given every batch, never two at once.
      match: see `questions.judge`.
      deadline: on the clock of `time.monotonic`; no batch begins after it.
      side_by_side: programs that run at the same time.
      characters: of the outputs that are kept; 0 keeps them whole.
      tell: is told what is done about a lack of memory, a line each.
      **arguments: of `jaxkv.generate`, the same for all.

    Raises:
      ValueError: an output cannot be scored, since the logits were no numbers; the
        message names method, budget and questions.
    """
    lock = threading.Lock()
    stop = threading.Event()
    late: list[Unit] = []
    failed: list[str] = []

    def run(unit: Unit) -> Unit | None:
        """Run a unit, and return what is left of it if the memory is too small."""
        for number, (rows, counts) in enumerate(unit.batches()):
            if stop.is_set():
                return None
            if deadline is not None and time.monotonic() >= deadline:
                late.append(unit)
                return None
            try:
                batch = _run_batch(lm, unit, rows, counts, match, characters, arguments)
            except Exception as error:
                if not _out_of_memory(error):
                    raise
                return unit.behind(number)
            with lock:
                record(batch)
        return None

    def work(unit: Unit) -> None:
        try:
            # Not in the handler: an error holds on to what did not fit.
            while left := run(unit):
                smaller = left.halved()
                what = _what(left)
                if smaller is None:
                    failed.append(f"{what}: {len(left.rows)} rows")
                    return
                tell(
                    f"{what}: out of memory with {left.size} rows at a time, "
                    f"goes on with {smaller.size}"
                )
                unit = smaller
        except BaseException:
            stop.set()  # the other threads end with their batch
            raise

    if side_by_side == 1:
        for unit in units:
            work(unit)
    else:
        with concurrent.futures.ThreadPoolExecutor(side_by_side) as pool:
            futures = [pool.submit(work, unit) for unit in units]
            try:
                for future in futures:
                    future.result()
            finally:
                stop.set()  # an interrupt reaches this thread only
    return Ran(complete=not (late or failed), late=bool(late), failed=failed)


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, jax.errors.JaxRuntimeError):
        return "RESOURCE_EXHAUSTED" in str(error)
    return isinstance(error, MemoryError)


def _what(unit: Unit) -> str:
    """Return what a unit runs, for messages."""
    row = unit.rows[0]
    return f"{_at(row)}, {row.question.cell.length} tokens"


def _at(row: Row) -> str:
    name = row.method.name
    return name if row.tokens is None else f"{name} at {row.budget}"


def _run_batch(
    lm: LanguageModel,
    unit: Unit,
    rows: Sequence[Row],
    counts: Sequence[bool],
    match: Match,
    characters: int,
    arguments: Mapping[str, Any],
) -> Batch:
    answered = _answered_apart if rows[0].question.document else _answered
    try:
        out = answered(lm, rows, unit.max_new_tokens, arguments)
    except LogitsError as error:
        broken = [rows[number] for number in error.tokens]
        raise ValueError(f"{_named(broken)}: {error}") from error
    begin = time.perf_counter()
    found = []
    for number, row in enumerate(rows):
        if not counts[number]:
            continue
        question, text = row.question, out.text[number]
        exact, score = judge(
            question.sample, text, by_lines=question.by_lines, match=match
        )
        found.append(
            row.columns
            | {
                "score": score,
                "exact": int(exact),
                "prompt_tokens": len(question.ids),
                "output_tokens": out.lengths[number],
                "truncated": int(out.finish_reason[number] == "length"),
                "cache_bytes": out.stats.cache_bytes // len(rows),
                "outputs": cut(json.dumps(question.sample.outputs), characters),
                "prediction": cut(text, characters),
            }
        )
    return Batch(
        rows=found, stats=out.stats, judging_seconds=time.perf_counter() - begin
    )


def _answered(
    lm: LanguageModel,
    rows: Sequence[Row],
    max_new_tokens: int,
    arguments: Mapping[str, Any],
) -> Completion:
    """Cut documents together with their questions."""
    method = rows[0].method
    return generate(
        lm,
        [row.question.ids for row in rows],
        max_new_tokens=max_new_tokens,
        budget=_budgets(rows),
        prefill=method.prefill,
        decode=method.decode,
        **arguments,
    )


def _answered_apart(
    lm: LanguageModel,
    rows: Sequence[Row],
    max_new_tokens: int,
    arguments: Mapping[str, Any],
) -> Completion:
    """Cut documents, and ask the questions behind what is left of them."""
    reading = {k: v for k, v in arguments.items() if k != "decode_implementation"}
    asking = {k: v for k, v in arguments.items() if k != "prefill_implementation"}
    with stopwatch() as lap:
        context = compress(
            lm,
            [row.question.ids[: row.question.document] for row in rows],
            budget=_budgets(rows),
            prefill=rows[0].method.prefill,
            **reading,
        )
        jax.block_until_ready(context)
        read = lap()
    out = generate(
        lm,
        [row.question.ids[row.question.document :] for row in rows],
        context=context,
        documents=range(len(rows)),
        max_new_tokens=max_new_tokens,
        **asking,
    )
    stats = dataclasses.replace(
        out.stats,
        compile_seconds=out.stats.compile_seconds + read.compiling,
        prefill_seconds=out.stats.prefill_seconds + read.computing,
    )
    return dataclasses.replace(out, stats=stats)


def _budgets(rows: Sequence[Row]) -> Any:
    """Return one budget, or one for each row."""
    budgets: Any = [row.tokens for row in rows]
    return budgets[0] if len(set(budgets)) == 1 else budgets


def _named(rows: Sequence[Row]) -> str:
    """Return what rows of one method ask, for messages."""
    at = dict.fromkeys(map(_at, rows))
    asked: dict[tuple, list[int]] = {}
    for row in rows:
        cell = row.question.cell
        indices = asked.setdefault((cell.task, cell.length), [])
        if row.question.index not in indices:
            indices.append(row.question.index)
    questions = [
        f"question{'s' * (len(some) > 1)} {', '.join(map(str, some[:5]))}"
        f"{', …' * (len(some) > 5)} of {task} at {length} tokens"
        for (task, length), some in asked.items()
    ]
    return f"{', '.join(at)}, {', '.join(questions)}"
