"""The suite for others: what keeps the laws passes, what breaks one is told which."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import KNorm, LongFlow, StreamingLLM, testing
from jaxkv.policies.base import WholePrompt


def test_a_good_policy_of_prompts_passes():
    testing.check_prefill_policy(KNorm())


@pytest.mark.slow
def test_a_good_policy_of_decoding_passes():
    testing.check_decode_policy(StreamingLLM(n_sink=1))


@dataclasses.dataclass(frozen=True)
class Hoarding(WholePrompt):
    """Keeps one token more than it may."""

    def rank(self, prompt, *, budget):
        scores, keep = KNorm().rank(prompt, budget=budget)
        return scores, keep + 1


@dataclasses.dataclass(frozen=True)
class Crowded(WholePrompt):
    """Scores by what is in the other rows."""

    def scores(self, prompt):
        norms = jnp.linalg.norm(prompt.keys, axis=-1).swapaxes(1, 2)
        return jnp.cos(norms * norms.sum())


@pytest.mark.parametrize(
    ("policy", "law"),
    [
        (Hoarding(), "prompt_is_bounded"),
        (Crowded(), "prompt_in_a_batch_equals_singles"),
    ],
)
def test_a_broken_law_of_prompts_is_named(policy, law):
    message = rf"{type(policy).__name__} breaks the law {law} \(.*\), on prompts of"
    with pytest.raises(testing.LawBroken, match=message) as caught:
        testing.check_prefill_policy(policy)
    assert caught.value.law == law


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aiming(StreamingLLM):
    """Aims at the first slot, wherever its token stands."""

    attends_trees = False

    def attend(self, *args, **how):
        out, state = super().attend(*args, **how)
        free = (state.positions < 0).any(-1)
        target = jnp.where(free, state.target, 0)
        return out, dataclasses.replace(state, target=target)


def test_a_broken_law_of_decoding_is_named():
    with pytest.raises(testing.LawBroken, match="Aiming breaks the law") as caught:
        testing.check_decode_policy(Aiming())
    assert caught.value.law in ("order_free", "finished_rows_do_not_change")


def test_what_is_no_policy_or_has_no_room_is_told_at_once():
    with pytest.raises(ValueError, match="LongFlow is no PrefillPolicy: it has no "):
        testing.check_prefill_policy(LongFlow())
    with pytest.raises(ValueError, match="KNorm is no DecodePolicy: it has no evicts"):
        testing.check_decode_policy(KNorm())
    with pytest.raises(ValueError, match="budget=9 leaves no slot beside n_sink=9"):
        testing.check_decode_policy(StreamingLLM(n_sink=9))


# A cache that is not ours: its logits are a sum over what it holds.
TABLE = np.random.default_rng(0).normal(size=(11, 7))


class Foreign:
    """Keeps the newest tokens of each row."""

    def read(self, prompts, budget):
        rows = [list(enumerate(prompt)) for prompt in prompts]
        return self._looked_at(rows, budget)

    def step(self, cache, tokens):
        rows, budget = cache
        rows = [
            [*row, (row[-1][0] + 1, token)]
            for row, token in zip(rows, tokens, strict=True)
        ]
        return self._looked_at(rows, budget)

    def positions(self, cache):
        rows, _ = cache
        held = np.full((len(rows), 1, max(map(len, rows))), -1)
        for row, one in zip(held[:, 0], rows, strict=True):
            row[: len(one)] = [position for position, _ in one]
        return [held]

    def _looked_at(self, rows, budget):
        rows = [row if budget is None else self.kept(row, budget) for row in rows]
        logits = [
            sum(np.cos(position) * TABLE[token] for position, token in row)
            for row in rows
        ]
        return np.stack(logits), (rows, budget)

    def kept(self, row, budget):
        return row[-budget:]


class Lossy(Foreign):
    def kept(self, row, budget):
        return row[-min(budget, 4) :]


class Renumbering(Foreign):
    def step(self, cache, tokens):
        logits, cache = super().step(cache, tokens)
        return np.roll(logits, 1), cache


class Overfull(Foreign):
    def kept(self, row, budget):
        return row[-budget - 1 :]


class Twice(Foreign):
    def kept(self, row, budget):
        return row if len(row) <= budget else [row[-1], *row[-budget + 1 :]]


class Stale(Foreign):
    def kept(self, row, budget):
        return row[:budget]


class Mixing(Foreign):
    def _looked_at(self, rows, budget):
        logits, cache = super()._looked_at(rows, budget)
        few = budget is not None and budget < 9
        return logits + few * logits.sum(0, keepdims=True), cache


class Counting(Foreign):
    calls = 0

    def _looked_at(self, rows, budget):
        self.calls += 1
        logits, cache = super()._looked_at(rows, budget)
        return logits + 1e-6 * self.calls, cache


PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [10, 3, 5]]


def test_a_cache_that_keeps_the_laws():
    testing.check_cache(Foreign(), PROMPTS, budget=5)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (Lossy(), r"Lossy breaks the law cache_at_full_budget_is_exact \(With room fo"),
        (Renumbering(), "breaks the law cache_equals_recomputation"),
        (
            Overfull(),
            r"cache_is_bounded .* on prompts of \[9, 3\] .*: 6 tokens of",
        ),
        (Twice(), r"cache_is_bounded .* positions \[8\] are held twice, step 0"),
        (Stale(), "cache_is_bounded .* the newest token is not held, step 1"),
        (Mixing(), "breaks the law cache_in_a_batch_equals_singles"),
        (Counting(), "breaks the law cache_is_pure"),
    ],
)
def test_a_broken_law_of_a_cache_is_named(cache, message):
    with pytest.raises(testing.LawBroken, match=message):
        testing.check_cache(cache, PROMPTS, budget=5)


def test_prompts_that_try_nothing_are_refused():
    for prompts in ([[1, 2], [3, 4]], [[1, 2], [3]]):
        with pytest.raises(ValueError, match="check_cache: prompts need two lengths"):
            testing.check_cache(Foreign(), prompts, budget=5)
