"""Haystacks: needles on lines of their own, in noise or among other needles.

The noise sentences are the ones of Mohtashami and Jaggi 2023 (arXiv:2305.16300).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxkv.tasks.samples import CountTokens, Exchange, too_short

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """An exchange with the needles its answer stands in."""

    exchange: Exchange
    needles: tuple[str, ...]


def make_noise(budget: int, count_tokens: CountTokens, first: int) -> list[str]:
    """Return as many noise sentences as `budget` tokens hold."""
    sentences = [NOISE[(first + i) % len(NOISE)] for i in range(len(NOISE))]
    # A sentence stands after a space or, behind a needle, after a line break.
    costs = [max(count_tokens(" " + s), count_tokens(s)) for s in sentences]
    rounds = max(budget, 0) // sum(costs)
    noise = sentences * rounds
    left = budget - rounds * sum(costs)
    for sentence, cost in zip(sentences, costs, strict=True):
        if cost > left:
            break
        noise.append(sentence)
        left -= cost
    return noise


def hide(
    rng: np.random.Generator,
    needles: Sequence[str],
    noise: Sequence[str],
    depth: float | None = None,
) -> str:
    """Put needles, in their order, on lines of their own between noise sentences.

    Each needle's depth is uniform over the gaps between sentences, unless it is given.
    """
    gaps = np.sort(rng.integers(0, len(noise) + 1, size=len(needles))).tolist()
    if depth is not None:
        gaps = [round(depth * len(noise))] * len(needles)
    lines: list[str] = []
    start = 0
    for needle, gap in zip(needles, gaps, strict=True):
        if gap > start:
            lines.append(" ".join(noise[start:gap]))
        lines.append(needle)
        start = gap
    if start < len(noise):
        lines.append(" ".join(noise[start:]))
    return "\n".join(lines)


def _line_cost(line: str, count_tokens: CountTokens, *, in_noise: bool) -> int:
    # The line break before the line; in noise also the one behind it.
    return count_tokens("\n" + line) + in_noise


def fit_questions(
    task: str,
    asks: Sequence[Ask],
    *,
    length: int,
    head_cost: int,
    in_noise: bool,
    count_tokens: CountTokens,
) -> tuple[list[Ask], int]:
    """Keep the first asks that leave room for a haystack.

    Returns:
      The asks kept, at least one, and the tokens still free.
    """
    kept: list[Ask] = []
    left = length - head_cost
    for ask in asks:
        cost = count_tokens(ask.exchange.question) + count_tokens(ask.exchange.answer)
        cost += sum(
            _line_cost(needle, count_tokens, in_noise=in_noise)
            for needle in ask.needles
        )
        if kept and left - cost < length // 3:
            break
        if cost > left:
            raise too_short(task, length, head_cost + cost)
        kept.append(ask)
        left -= cost
    return kept, left


def fill(
    lines: Sequence[str], left: int, count_tokens: CountTokens, *, in_noise: bool
) -> tuple[list[str], int]:
    """Take lines while they fit; return them and the tokens still free."""
    taken: list[str] = []
    for line in lines:
        cost = _line_cost(line, count_tokens, in_noise=in_noise)
        if cost > left:
            break
        taken.append(line)
        left -= cost
    return taken, left


def interleave(rng: np.random.Generator, chains: Sequence[Sequence[str]]) -> list[str]:
    """Mix chains at random; the lines of one chain keep their order."""
    order = np.repeat(np.arange(len(chains)), [len(chain) for chain in chains])
    rng.shuffle(order)
    ahead = [iter(chain) for chain in chains]
    return [next(ahead[i]) for i in order.tolist()]
