"""Long answers that can be checked line by line: running totals and a state machine.

All totals are kept modulo 100 and written with two digits. What a line needs stands
partly in the prompt (the amount, the next state) and partly in the line before it
(the total), so dropping either from a cache breaks the answer from there on.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from jaxkv.tasks import lexicon
from jaxkv.tasks.lexicon import Split
from jaxkv.tasks.samples import CountTokens, Exchange, Sample, assemble, too_short

LEDGER_HEADS = (
    "Below is a ledger, one entry a line: a name and an amount.",
    "These are the entries of a ledger. Each line has a name and an amount.",
)
LEDGER_QUESTION = (
    "\n\nThe total starts at {start:02d}. Copy every entry in order and write the "
    "total so far, modulo 100, behind it. End with the total.\nLedger:"
)
MACHINE_HEADS = (
    "Below are the rules of a machine, one state a line: the number the state adds "
    "to the total, and the next state if the total is then even or odd.",
    "A machine has the states below. A state adds its number to the total; whether "
    "the total is then even or odd decides the next state.",
)
MACHINE_QUESTION = (
    "\n\nStart in state {state} with total {start:02d} and make {steps} steps. Write "
    "one line a step: steps left, state, number added, total modulo 100, even or "
    "odd, next state. End with the total.\nSteps:"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Room:
    """Tokens still free in the whole sample and in its answer."""

    total: int
    answer: int

    def after(self, *, prompt: int = 0, answer: int = 0) -> "_Room":
        return _Room(total=self.total - prompt - answer, answer=self.answer - answer)

    @property
    def enough(self) -> bool:
        return self.total >= 0 and self.answer >= 0


def _room(length: int | None, answer_tokens: int | None) -> _Room:
    if length is None and answer_tokens is None:
        raise ValueError(
            "Expected length or answer_tokens (or both) as the size of the sample, "
            "got neither. Pass one of them."
        )
    endless = 1 << 30
    return _Room(
        total=endless if length is None else length,
        answer=endless if answer_tokens is None else answer_tokens,
    )


def _head(rng: np.random.Generator, heads: tuple[str, ...], split: Split) -> str:
    index = int(rng.integers(len(heads)))
    return heads[index if split == "train" else 0]


def ledger(
    rng: np.random.Generator,
    *,
    length: int | None = None,
    answer_tokens: int | None = None,
    count_tokens: CountTokens,
    split: Split,
) -> Sample:
    """Copy a list of entries and keep its running total.

    Args:
      rng: Source of randomness.
      length: Bound on the tokens of prompt and answer together.
      answer_tokens: Bound on the tokens of the answer. The sample has as many
        entries as both bounds allow.
      count_tokens: Number of tokens of a text.
      split: Split of the entries' names.
    """
    room = _room(length, answer_tokens)
    start = int(rng.integers(100))
    head = _head(rng, LEDGER_HEADS, split)
    question = LEDGER_QUESTION.format(start=start)
    room = room.after(
        prompt=count_tokens(head) + count_tokens(question),
        answer=count_tokens("\ntotal 48\n"),
    )
    amount_cost, total_cost = count_tokens(" +7"), count_tokens(" 48")
    # No name costs less than two tokens with its line break.
    most = min(room.total // (4 + 2 * amount_cost), room.answer // (2 + amount_cost))
    entries: list[str] = []
    lines: list[str] = []
    total = start
    most = max(most, 1)
    amounts = (rng.integers(1, 10, size=most) * rng.choice([-1, 1], size=most)).tolist()
    for name, amount in zip(lexicon.names(rng, most, split), amounts, strict=True):
        cost = count_tokens("\n" + name) + amount_cost
        room = room.after(prompt=cost, answer=cost + total_cost)
        if not room.enough:
            break
        total = (total + amount) % 100
        entries.append(f"\n{name} {amount:+d}")
        lines.append(f"\n{name} {amount:+d} {total:02d}")
    if not entries:
        raise too_short("ledger", min(length or 1 << 30, answer_tokens or 1 << 30), 128)
    answer = "".join(lines) + f"\ntotal {total:02d}\n"
    return assemble(
        "ledger",
        head + "".join(entries),
        [Exchange(question=question, answer=answer, outputs=(answer.strip(),))],
        count_tokens,
    )


def machine(
    rng: np.random.Generator,
    *,
    length: int | None = None,
    answer_tokens: int | None = None,
    count_tokens: CountTokens,
    split: Split,
    states: int | None = None,
) -> Sample:
    """Run a state machine whose next state depends on the parity of a total.

    Both columns of next states are permutations, so that the walk over (state,
    total) is one too: it comes back late, and the answer cannot be had by copying
    an earlier round of the same walk.

    Args:
      rng: Source of randomness.
      length: Bound on the tokens of prompt and answer together.
      answer_tokens: Bound on the tokens of the answer. The sample makes as many
        steps as both bounds allow.
      count_tokens: Number of tokens of a text.
      split: Split of the states' names.
      states: Number of states; by default 6 to 32, fewer where the table would take
        more than a third of `length`.
    """
    room = _room(length, answer_tokens)
    count = int(rng.integers(6, 33)) if states is None else states
    names = lexicon.names(rng, count, split, syllables=(2, 2))
    head = _head(rng, MACHINE_HEADS, split)
    probe = f"\n{names[0]}: add 7, even {names[1]}, odd {names[2]}"
    if states is None and length is not None:
        # Rules of other names may cost a token or two more than the probe.
        fits = (length // 3) // (count_tokens(probe) + 2)
        count = min(count, max(fits, 3))
        names = names[:count]
    adds = rng.integers(1, 10, size=count).tolist()
    even, odd, start, first = _longest_walk(rng, adds)
    rules = [
        f"\n{name}: add {adds[i]}, even {names[even[i]]}, odd {names[odd[i]]}"
        for i, name in enumerate(names)
    ]
    table = head + "".join(rules)
    # Written with the most digits the number of steps can have; the bound holds.
    question_cost = count_tokens(
        MACHINE_QUESTION.format(state=names[first], start=start, steps=9999)
    )
    room = room.after(
        prompt=count_tokens(table) + question_cost,
        answer=count_tokens("\ntotal 48\n"),
    )
    lines, last = _steps(names, adds, even, odd, start, first, room, count_tokens)
    if not lines:
        raise too_short(
            "machine", min(length or 1 << 30, answer_tokens or 1 << 30), 256
        )
    # Numbered downwards, so that the last line is known by its number.
    numbered = (
        f"\n{n}. {line}"
        for n, line in zip(itertools.count(len(lines), -1), lines, strict=False)
    )
    answer = "".join(numbered) + f"\ntotal {last:02d}\n"
    question = MACHINE_QUESTION.format(
        state=names[first], start=start, steps=len(lines)
    )
    return assemble(
        "machine",
        table,
        [Exchange(question=question, answer=answer, outputs=(answer.strip(),))],
        count_tokens,
    )


def _steps(
    names: Sequence[str],
    adds: Sequence[int],
    even: Sequence[int],
    odd: Sequence[int],
    total: int,
    state: int,
    room: _Room,
    count_tokens: CountTokens,
) -> tuple[list[str], int]:
    """Run the machine while its lines fit; return them and the last total."""
    # Pieces start with a space or a line break, so their counts add up.
    name_cost = [count_tokens(" " + name) for name in names]
    fixed = count_tokens(" +7") + count_tokens(" 48") + count_tokens(" even")
    fixed += count_tokens("\n") + count_tokens(".")
    lines: list[str] = []
    last = total
    while True:
        total = (total + adds[state]) % 100
        parity, after = ("odd", odd[state]) if total % 2 else ("even", even[state])
        step = len(lines) + 1
        room = room.after(
            answer=fixed + len(str(step)) + name_cost[state] + name_cost[after]
        )
        if not room.enough:
            return lines, last
        done = f"{names[state]} +{adds[state]} {total:02d}"
        lines.append(f"{done} {parity} {names[after]}")
        state, last = after, total


def _longest_walk(
    rng: np.random.Generator, adds: list[int]
) -> tuple[list[int], list[int], int, int]:
    """Draw next states and a start, the one of four tries that repeats last.

    Returns:
      Next states after an even total, those after an odd total, the start total and
      the start state.
    """
    count = len(adds)
    longest = 0
    best: tuple[list[int], list[int], int, int] = [], [], 0, 0
    for _ in range(4):
        even = rng.permutation(count).tolist()
        odd = rng.permutation(count).tolist()
        start, first = int(rng.integers(100)), int(rng.integers(count))
        state, total, steps = first, start, 0
        while steps < 1024:
            total = (total + adds[state]) % 100
            state = odd[state] if total % 2 else even[state]
            steps += 1
            if (state, total) == (first, start):
                break
        if steps > longest:
            longest, best = steps, (even, odd, start, first)
        if steps >= 1024:
            break
    return best


def check(sample: Sample, prediction: str) -> tuple[bool, float]:
    """Compare an answer with the gold one, line by line.

    Args:
      sample: A ledger or machine sample.
      prediction: Text the model put behind `sample.prompt`, without special tokens.

    Returns:
      Whether the whole answer is right, and the fraction of the gold lines that
      stand at their place in the prediction.
    """
    gold = sample.answer.strip().split("\n")
    lines = [line.strip() for line in prediction.strip().split("\n")]
    right = sum(a == b for a, b in zip(gold, lines, strict=False))
    return gold == lines, right / len(gold)
