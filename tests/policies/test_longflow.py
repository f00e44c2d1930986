"""LongFlow against the simulation, and what each option protects."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from simulation import (
    BATCH,
    HEAD,
    PROMPT,
    SLOTS,
    STEPS,
    assert_all_differ,
    assert_as_simulated,
    assert_reference_decides_the_same,
    protect,
    run,
    tokens,
    weights_of,
)

from jaxkv import LongFlow
from jaxkv import state as kv
from jaxkv.kernels.longflow import token_importance
from jaxkv.policies.eviction import evict_in_bulk


def longflow_rule(norm, **protected):
    def rule(held, queries, keys, values, sums):
        del sums
        weights = weights_of(queries[-1], keys)
        shares = weights[..., None] * values
        if norm == "deletion":
            out = shares.sum(1, keepdims=True)
            without = (out - shares) / (1 - weights)[..., None]
            scores = np.linalg.norm(out - without, axis=-1)
        elif norm == "attention":
            scores = weights
        else:
            scores = np.linalg.norm(shares, ord={"l1": 1, "l2": 2}[norm], axis=-1)
        return protect(scores.mean(0), held, **protected)

    return rule


SIMULATED = {  # policy, and what the simulation is told
    "paper": (LongFlow.paper(), dict(rule=longflow_rule("l1"), shared=True)),
    "l2": (LongFlow(score="l2"), dict(rule=longflow_rule("l2"), shared=True)),
    "attention": (
        LongFlow(score="attention"),
        dict(rule=longflow_rule("attention"), shared=True),
    ),
    "deletion": (
        LongFlow(score="deletion"),
        dict(rule=longflow_rule("deletion"), shared=True),
    ),
    "per head": (LongFlow(shared=False), dict(rule=longflow_rule("l1"))),
    "protected": (
        LongFlow(n_sink=2, n_recent=3),
        dict(rule=longflow_rule("l1", n_sink=2, n_recent=3), shared=True),
    ),
    "in bulk": (
        LongFlow(interval=4, n_recent=1),
        dict(rule=longflow_rule("l1", n_recent=1), shared=True, count=4, early=1),
    ),
    "in bulk, per head": (
        LongFlow(interval=3, shared=False, score="deletion"),
        dict(rule=longflow_rule("deletion"), count=3, early=1),
    ),
}


@pytest.mark.parametrize(("policy", "options"), SIMULATED.values(), ids=SIMULATED)
def test_against_the_simulation(policy, options):
    assert_as_simulated(policy, **options)


def test_reference_arithmetic_decides_the_same():
    assert_reference_decides_the_same(LongFlow(interval=4, n_recent=1))


def newest_survives(held):
    """Whether the newest token was still there a step later, `[STEPS - 1, BATCH]`."""
    steps = np.arange(STEPS - 1)
    return np.stack(
        [held[steps + 1, b, 0, PROMPT[b] + steps] for b in range(BATCH)], axis=1
    )


def test_paper_protects_nothing_not_even_the_current_token():
    assert LongFlow.paper() == LongFlow()
    paper = run(LongFlow.paper()).held
    assert not newest_survives(paper).all()
    assert not paper[-1, :, :, 0].any()
    assert newest_survives(run(LongFlow(n_recent=1)).held).all()


def test_sinks_and_recent_tokens_stay():
    held = run(LongFlow(n_sink=2, n_recent=3)).held
    assert held[..., :2].all()
    for t in range(STEPS):
        for b in range(BATCH):
            assert held[t, b, :, PROMPT[b] + t - 2 : PROMPT[b] + t + 1].all()


def test_prompt_stays_if_it_is_protected():
    held = run(LongFlow(protect_prompt=True)).held
    for b in range(BATCH):
        assert held[:, b, :, : PROMPT[b]].all()
        assert not run(LongFlow()).held[-1, b, :, : PROMPT[b]].all()
    # Where prompt and recents leave nothing, the least of all goes.
    crowded = run(LongFlow(protect_prompt=True, n_recent=5)).held
    assert crowded.sum(-1).max() == SLOTS
    assert not crowded[-1, 0, 0, : PROMPT[0]].all()


def test_heads_share_or_do_not():
    held = run(LongFlow()).held
    np.testing.assert_array_equal(held[:, :, 0], held[:, :, 1])
    held = run(LongFlow(shared=False)).held
    assert (held[:, :, 0] != held[:, :, 1]).any()


def test_each_option_changes_what_is_kept():
    scores = ("l1", "l2", "attention", "deletion")
    assert_all_differ(*(LongFlow(score=score) for score in scores))
    changed = LongFlow(n_sink=1), LongFlow(n_recent=1), LongFlow(interval=2)
    assert_all_differ(LongFlow(), *changed)


def test_bulk_eviction_leaves_room_for_the_interval():
    counts = run(LongFlow(interval=4, n_recent=1)).held.sum(-1)
    assert LongFlow(interval=4).spare == 4
    assert counts.max() == SLOTS - 1
    cycle = counts[SLOTS - PROMPT[0] :, 0, 0]
    assert set(cycle) == {SLOTS - 4, SLOTS - 3, SLOTS - 2, SLOTS - 1}


def test_bulk_eviction_of_one_is_the_fused_choice():
    fused = run(LongFlow()).state
    state = dataclasses.replace(fused, target=jnp.zeros_like(fused.target))
    queries = jnp.asarray(tokens()[0], jnp.float32)
    position = jnp.asarray(PROMPT, jnp.int32) + STEPS - 1
    query = queries[jnp.arange(BATCH), position]
    arrays = query, state.keys, state.values, state.positions

    def importance(rows):
        return token_importance(*(x[rows] for x in arrays), scale=HEAD**-0.5)

    bounds = position, jnp.zeros_like(position), position
    after = evict_in_bulk(state, importance, *bounds, count=1, shared=True)
    np.testing.assert_array_equal(after.target, fused.target)
    freed = np.take_along_axis(
        np.asarray(after.positions), np.asarray(fused.target)[..., None], axis=2
    )
    assert (freed == kv.FREE).all()
    assert (kv.occupancy(after) == SLOTS - 1).all()
