"""LazyEviction against the simulation, and its score by hand."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from simulation import (
    KV_HEADS,
    PROMPT,
    STEPS,
    assert_all_differ,
    assert_as_simulated,
    assert_reference_decides_the_same,
    protect,
    run,
    weights_of,
)

from jaxkv import LazyEviction
from jaxkv.policies.lazyeviction import Recurrence, noted, recurrence_score

SMALL = LazyEviction(alpha=0.1, window_size=3)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def rule_of(alpha, window):
    """Return the rule; it remembers, and is called row by row, step by step."""
    calls, last, longest = itertools.count(), {}, {}

    def rule(held, queries, keys, values, sums):
        call = next(calls)
        row, head, now = call // (STEPS * KV_HEADS), call % KV_HEADS, held[-1]
        scores = []
        for position, weight in zip(
            held, weights_of(queries[-1], keys).max(0), strict=True
        ):
            at = row, head, position
            before = last.get(at, max(position - 1, PROMPT[row] - 1))
            if weight >= alpha:
                longest[at] = max(longest.get(at, 0), now - before)
                before = now
            last[at] = before
            mri = longest.get(at, 0)
            score = 2 * sigmoid(-(now - before) / mri) if mri else 0
            scores.append(score + 2 * sigmoid(1 - mri) if mri else 0)
        return protect(np.array(scores), held, n_recent=window)

    return rule


def test_against_the_simulation():
    assert_as_simulated(SMALL, rule_of(0.1, 3), count=3, early=1)
    assert_reference_decides_the_same(SMALL)
    held = run(SMALL).held
    assert (held[:, :, 0] != held[:, :, 1]).any()


def test_each_option_changes_what_is_kept():
    assert_all_differ(
        SMALL,
        LazyEviction(alpha=0.3, window_size=3),
        LazyEviction(alpha=0.1, window_size=2),
    )


def test_the_score_by_hand():
    """At step 10: just active each step; 4 of 2 steps ago; 2 of 4; never."""
    seen = Recurrence(
        jnp.asarray([[[10, 6, 8, 9]]], jnp.int32),
        jnp.asarray([[[1, 2, 4, 0]]], jnp.int32),
    )
    want = [
        2 * sigmoid(0) + 2 * sigmoid(0),
        2 * sigmoid(-2) + 2 * sigmoid(-1),
        2 * sigmoid(-0.5) + 2 * sigmoid(-3),
        0,
    ]
    got = recurrence_score(seen, jnp.asarray([10], jnp.int32))
    np.testing.assert_allclose(got[0, 0], want, rtol=1e-6)


def test_what_is_noted_of_a_query():
    """Slot 3 is new, 0 and 3 are attended to; the other row has finished."""
    begun = Recurrence(
        jnp.full((2, 1, 4), 4, jnp.int32), jnp.asarray([[[2, 1, 9, 7]]] * 2, jnp.int32)
    )
    weights = jnp.asarray([[[0.5, 0.1, 0.0, 0.4]]] * 2)
    target, position = jnp.full((2, 1), 3, jnp.int32), jnp.asarray([9, -1], jnp.int32)
    after = noted(begun, weights, target, position, alpha=0.25)
    assert after.last[0, 0].tolist() == [9, 4, 4, 9]
    assert after.longest[0, 0].tolist() == [5, 1, 9, 1]
    for old, new in zip(begun, after, strict=True):
        np.testing.assert_array_equal(old[1], new[1])


def test_two_windows_are_needed():
    with pytest.raises(ValueError, match="LazyEviction: budget=5 is too small for 0"):
        SMALL.check(5)
    SMALL.check(6)
