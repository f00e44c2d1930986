"""Runs every method at every budget over the same questions.

Work is arranged for the compiler: rows of one program (method, padded prompt length,
output buffer) follow each other, all batches of a program have one size, and a batch
holds rows of all budgets where budgets may differ within a batch. Two programs may run
side by side, so that one compiles while the other computes.

On a CPU a process can hold some 130 programs of `needle` (see `jaxkv.inference`), and a
method that evicts the output has one for each budget and length. So all are dropped
when half of the process's memory maps are used; not with programs side by side. There
a larger sweep is cut into several, whose folders `jaxkv eval merge` puts together.
"""

import concurrent.futures
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxkv.arguments import check_fit
from jaxkv.evaluation.folder import Key, key
from jaxkv.evaluation.methods import FULL, Budget, Method, check_budget
from jaxkv.evaluation.questions import Cell, Match, Question, judge
from jaxkv.inference import Stats, generate
from jaxkv.language_model import LanguageModel
from jaxkv.options import Options
from jaxkv.planning import bucket

MAPS = Path("/proc/self/maps")
MOST_MAPS = Path("/proc/sys/vm/max_map_count")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One question to one method at one budget.

    Attributes:
      method: how the cache is kept small.
      budget: as it is named in results.
      tokens: the same in tokens; None keeps everything.
      question: what is asked.
    """

    method: Method
    budget: str
    tokens: int | None
    question: Question

    @property
    def key(self) -> Key:
        """What tells this row from all others, as in `predictions.csv`."""
        return key(self.columns)

    @property
    def columns(self) -> dict[str, Any]:
        """What `predictions.csv` says of the row before it has run."""
        cell = self.question.cell
        return {
            "method": self.method.name,
            "budget": self.budget,
            "budget_tokens": "" if self.tokens is None else self.tokens,
            "task": cell.task,
            "length": cell.length,
            "depth": "" if cell.depth is None else cell.depth,
            "index": self.question.index,
        }


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Unit:
    """Rows that one compiled program serves.

    Attributes:
      rows: of one method and one padded prompt length.
      max_new_tokens: the longest output, the same for all of them.
      size: rows of each batch.
      copies: rows that follow each other and ask the same at another budget.
    """

    rows: Sequence[Row]
    max_new_tokens: int
    size: int
    copies: int = 1

    def batches(self) -> Iterator[tuple[Sequence[Row], Sequence[bool]]]:
        """Yield batches of `size` rows, and which of them count.

        A batch has all its questions at the first budget, then at the second, and so
        on, for `generate` to read each once. Others than the first fill up the last
        batch, since a smaller one would be another program.
        """
        groups = [
            self.rows[i : i + self.copies]
            for i in range(0, len(self.rows), self.copies)
        ]
        count = self.size // self.copies
        for first in range(0, len(groups), count):
            some = groups[first : first + count]
            filled = [*some, *[some[0]] * (count - len(some))]
            yield (
                [group[copy] for copy in range(self.copies) for group in filled],
                [i < len(some) for i in range(count)] * self.copies,
            )


def longest_outputs(
    questions: Sequence[Question], *, by_cell: bool, limit: int | None
) -> dict[Cell, int]:
    """Return how many tokens the outputs of each cell may have.

    Args:
      questions: of all cells.
      by_cell: take each cell's longest answer, instead of its length's.
      limit: the number for all cells, if it is given.
    """
    found: dict[Any, int] = {}
    for q in questions:
        group = q.cell if by_cell else q.cell.length
        found[group] = max(found.get(group, 0), limit or q.sample.max_new_tokens)
    cells = dict.fromkeys(q.cell for q in questions)
    return {cell: found[cell if by_cell else cell.length] for cell in cells}


def plan(
    questions: Sequence[Question],
    methods: Sequence[Method],
    budgets: Sequence[Budget],
    *,
    whole: Callable[[Question], float],
    outputs: Mapping[Cell, int],
    batch_size: int,
    mixed: bool,
    done: set[Key],
) -> list[Unit]:
    """Arrange all rows that are not done yet.

    Args:
      questions: what is asked.
      methods: how caches are kept small; those that evict nothing run once.
      budgets: of all other methods.
      whole: what a budget in per cent is a part of, in tokens.
      outputs: tokens of the longest output; see `longest_outputs`.
      batch_size: most rows of a batch.
      mixed: put rows of different budgets into one batch, where the method's decode
        policy does not evict.
      done: keys of rows to leave out.

    Returns:
      The units, shortest prompts first within a method.

    Raises:
      ValueError: a method cannot work with a budget.
    """
    longest: dict[Cell, int] = {}
    for q in questions:
        longest[q.cell] = max(longest.get(q.cell, 0), len(q.ids))
    programs: dict[tuple[int, ...], list[Row]] = {}
    for number, method in enumerate(methods):
        together = mixed and not method.decode.evicts
        for row in _rows(method, questions, budgets, whole, longest):
            if row.key not in done:
                cell = row.question.cell
                own = 0 if together else row.tokens or 0
                program = number, bucket(longest[cell]), outputs[cell], own
                programs.setdefault(program, []).append(row)
    units = []
    for (_, _, limit, _), rows in sorted(programs.items(), key=lambda item: item[0]):
        # Batches of one size, as full as they can be.
        copies = _copies(rows)
        groups = len(rows) // copies
        count = -(-groups // max(1, batch_size // copies))
        size = copies * -(-groups // count)
        units.append(Unit(rows=rows, max_new_tokens=limit, size=size, copies=copies))
    return units


def _rows(
    method: Method,
    questions: Sequence[Question],
    budgets: Sequence[Budget],
    whole: Callable[[Question], float],
    longest: Mapping[Cell, int],
) -> Iterator[Row]:
    """Yield the rows of one method, question by question, with checked budgets."""
    checked = set()
    for q in questions:
        if not method.bounded:
            yield Row(method=method, budget=FULL, tokens=None, question=q)
            continue
        for budget in budgets:
            tokens = budget.tokens(whole(q))
            case = budget.name, tokens, longest[q.cell]
            if case not in checked:
                check_budget(method, budget, tokens, longest[q.cell])
                checked.add(case)
            yield Row(method=method, budget=budget.name, tokens=tokens, question=q)


def _copies(rows: Sequence[Row]) -> int:
    """Return how many rows in turn have the same question, if all have as many."""
    first = rows[0].question
    copies = next(
        (i for i, row in enumerate(rows) if row.question is not first), len(rows)
    )
    groups = [rows[i : i + copies] for i in range(0, len(rows), copies)]
    same = all(
        len(group) == copies and len({id(row.question) for row in group}) == 1
        for group in groups
    )
    return copies if same else 1


def check_positions(lm: LanguageModel, units: Sequence[Unit]) -> None:
    """Raise ValueError for prompts, outputs or methods that do not fit the model.

    `generate` would say so too, but only when it is that unit's turn.
    """
    for unit in units:
        row = max(unit.rows, key=lambda row: len(row.question.ids))
        longest = len(row.question.ids)
        if longest + unit.max_new_tokens > lm.config.max_positions:
            raise ValueError(
                f"a prompt of {longest} tokens and an output of {unit.max_new_tokens} "
                f"exceed the {lm.config.max_positions} positions that {lm.name} was "
                "made for; ask for shorter --lengths or --max-new-tokens."
            )
        method = row.method
        options = Options(prefill=method.prefill, decode=method.decode)
        budgets = None if row.tokens is None else (row.tokens,)
        try:
            check_fit(lm, [row.question.ids], unit.max_new_tokens, options, budgets)
        except ValueError as error:
            raise ValueError(f"{method.name} at {row.budget}: {error}") from error


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


def run_units(
    lm: LanguageModel,
    units: Sequence[Unit],
    record: Callable[[Batch], Any],
    *,
    match: Match = "all",
    deadline: float | None = None,
    side_by_side: int = 1,
    characters: int = 0,
    **arguments: Any,
) -> bool:
    """Run units and hand over each batch as it ends, one at a time.

    Args:
      lm: the model.
      units: from `plan`.
      record: is given every batch, never two at once.
      match: see `questions.judge`.
      deadline: on the clock of `time.monotonic`; no batch begins after it.
      side_by_side: programs that run at the same time.
      characters: of the outputs that are kept; 0 keeps them whole.
      **arguments: of `jaxkv.generate`, the same for all.

    Returns:
      Whether everything has run; if not, the deadline has passed.
    """
    lock = threading.Lock()
    stop = threading.Event()

    def late() -> bool:
        return deadline is not None and time.monotonic() >= deadline

    def work(unit: Unit) -> bool:
        if side_by_side == 1:  # else another thread may be at work with its program
            let_go_of_programs()
        try:
            for rows, counts in unit.batches():
                if stop.is_set() or late():
                    return False
                batch = _run_batch(lm, unit, rows, counts, match, characters, arguments)
                with lock:
                    record(batch)
        except BaseException:
            stop.set()  # the other threads end with their batch
            raise
        return True

    if side_by_side == 1:
        return all([work(unit) for unit in units])
    with concurrent.futures.ThreadPoolExecutor(side_by_side) as pool:
        futures = [pool.submit(work, unit) for unit in units]
        try:
            return all([future.result() for future in futures])
        finally:
            stop.set()  # an interrupt reaches this thread only


def let_go_of_programs() -> None:
    """Drop all compiled programs if half of the process's memory maps are used."""
    try:
        most = int(MOST_MAPS.read_text())
        maps = MAPS.read_bytes().count(b"\n")
    except OSError:  # another system
        return
    if maps > most / 2:
        jax.clear_caches()


def _run_batch(
    lm: LanguageModel,
    unit: Unit,
    rows: Sequence[Row],
    counts: Sequence[bool],
    match: Match,
    characters: int,
    arguments: Mapping[str, Any],
) -> Batch:
    budgets: Any = [row.tokens for row in rows]
    out = generate(
        lm,
        [row.question.ids for row in rows],
        max_new_tokens=unit.max_new_tokens,
        budget=budgets[0] if len(set(budgets)) == 1 else budgets,
        prefill=rows[0].method.prefill,
        decode=rows[0].method.decode,
        **arguments,
    )
    assert out.text is not None, "the model has a tokenizer"
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
                "outputs": _cut(json.dumps(question.sample.outputs), characters),
                "prediction": _cut(text, characters),
            }
        )
    return Batch(
        rows=found, stats=out.stats, judging_seconds=time.perf_counter() - begin
    )


def _cut(text: str, characters: int) -> str:
    if characters == 0 or len(text) <= characters:
        return text
    return text[: characters - 1] + "…"
