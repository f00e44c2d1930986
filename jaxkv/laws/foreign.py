"""Laws of any cache of fixed size, by three functions; see `jaxkv.testing.Cache`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Trial:
    """A cache, and what it is tried with.

    Attributes:
      cache: see `jaxkv.testing.Cache`.
      prompts: token ids of each row.
      budget: the most tokens that a head may hold.
      steps: tokens behind each prompt.
      tolerance: of logits.
    """

    cache: Any
    prompts: Sequence[Sequence[int]]
    budget: int
    steps: int
    tolerance: float

    def run(self, prompts, budget, tokens=None):
        """Return the logits of all steps, the tokens, and the positions after each.

        Args:
          prompts: to read.
          budget: to keep.
          tokens: `[steps][B]`, to feed; None feeds the likeliest.
        """
        logits, cache = self.cache.read(prompts, budget)
        seen, fed, held = [np.asarray(logits, np.float32)], [], []
        for step in range(self.steps):
            likeliest = seen[-1].argmax(-1).tolist()
            fed.append(likeliest if tokens is None else tokens[step])
            held.append([np.array(x) for x in self.cache.positions(cache)])
            logits, cache = self.cache.step(cache, fed[-1])
            seen.append(np.asarray(logits, np.float32))
        held.append([np.array(x) for x in self.cache.positions(cache)])
        return np.stack(seen), fed, held

    def same(self, one, two):
        """Raise AssertionError unless logits agree."""
        scale = max(float(np.abs(two).max()), 1.0)
        np.testing.assert_allclose(one, two, rtol=0, atol=self.tolerance * scale)


def cache_at_full_budget_is_exact(trial):
    """With room for all, logits are those without a budget."""
    whole, fed, _ = trial.run(trial.prompts, None)
    room = max(map(len, trial.prompts)) + trial.steps
    got, _, _ = trial.run(trial.prompts, room, fed)
    trial.same(got, whole)


def cache_equals_recomputation(trial):
    """Without a budget, a step gives what reading all tokens anew gives."""
    whole, fed, _ = trial.run(trial.prompts, None)
    for step in range(1, trial.steps + 1):
        longer = [
            [*prompt, *(tokens[row] for tokens in fed[:step])]
            for row, prompt in enumerate(trial.prompts)
        ]
        logits, _ = trial.cache.read(longer, None)
        trial.same(np.asarray(logits, np.float32), whole[step])


def cache_is_bounded(trial):
    """Never more tokens than the budget, each once, the newest among them."""
    _, _, held = trial.run(trial.prompts, trial.budget)
    lengths = np.array([len(prompt) for prompt in trial.prompts])
    for step, layers in enumerate(held):
        for positions in layers:
            count = (positions >= 0).sum(-1)
            assert count.max() <= trial.budget, (
                f"{count.max()} tokens of {trial.budget} after {step} steps"
            )
            for row in positions.reshape(-1, positions.shape[-1]):
                real = row[row >= 0].tolist()
                twice = sorted({x for x in real if real.count(x) > 1})
                assert not twice, f"positions {twice} are held twice, step {step}"
            newest = lengths + step - 1
            beyond = (positions > newest[:, None, None]).any()
            assert not beyond, f"a position beyond the newest token, step {step}"
            if step:
                there = (positions == newest[:, None, None]).any(-1).all()
                assert there, f"the newest token is not held, step {step}"


def cache_in_a_batch_equals_singles(trial):
    """A row gives in a batch what it gives alone."""
    together, fed, _ = trial.run(trial.prompts, trial.budget)
    for row, prompt in enumerate(trial.prompts):
        own = [[tokens[row]] for tokens in fed]
        alone, _, _ = trial.run([prompt], trial.budget, own)
        trial.same(alone[:, 0], together[:, row])


def cache_is_pure(trial):
    """The same again gives the same."""
    first, fed, held = trial.run(trial.prompts, trial.budget)
    second, _, again = trial.run(trial.prompts, trial.budget, fed)
    np.testing.assert_array_equal(first, second)
    for one, two in zip(held, again, strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)


LAWS = (
    cache_at_full_budget_is_exact,
    cache_equals_recomputation,
    cache_is_bounded,
    cache_in_a_batch_equals_singles,
    cache_is_pure,
)
