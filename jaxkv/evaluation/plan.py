"""The order of the work: which rows share a compiled program, and which a batch.

Work is arranged for the compiler: rows of one program (method, padded prompt length,
output buffer) follow each other, all batches of a program have one size, and a batch
holds rows of all budgets where budgets may differ within a batch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxkv.evaluation.methods import FULL, Budget, Method, check_budget
from jaxkv.evaluation.questions import Cell, Question
from jaxkv.evaluation.rows import Key, key
from jaxkv.language_model import LanguageModel
from jaxkv.options import Options
from jaxkv.text.arguments import check_fit
from jaxkv.text.planning import bucket


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, slots=True)
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

    def behind(self, batches: int) -> "Unit":
        """Return what is left when some batches have run."""
        return dataclasses.replace(self, rows=self.rows[batches * self.size :])

    def halved(self) -> "Unit | None":
        """Return the same rows in batches of about half the size, None of one row."""
        if self.size == 1:
            return None
        if self.size == self.copies:  # budgets of one question
            return dataclasses.replace(self, size=self.size // 2, copies=1)
        groups = self.size // self.copies
        return dataclasses.replace(self, size=groups // 2 * self.copies)


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
    apart: bool = False,
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
      apart: pad each prompt by its own length, as where those of a cell differ much,
        not all by the longest of their cell.
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
                prompt = len(row.question.ids) if apart else longest[cell]
                program = number, bucket(prompt), outputs[cell], own
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
