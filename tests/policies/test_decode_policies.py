"""Decode policies against a simulation in plain NumPy, and what each option changes.

The simulation keeps lists of tokens per head and knows nothing of slots; each method is
one rule, written from its paper.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import RKV, VATP, H2ODecode, LongFlow, RandomDecode, TOVADecode
from jaxkv import state as kv
from jaxkv.kernels.longflow import token_importance
from jaxkv.policies.chance import lots
from jaxkv.policies.eviction import evict_in_bulk

BATCH, KV_HEADS, GROUPS, SLOTS, HEAD, STEPS, PROMPT = 2, 2, 2, 14, 8, 30, (9, 4)


@functools.cache
def tokens():
    """Return queries, keys and values of all tokens, `[BATCH, position, heads, HEAD]`.

    Keys come in three kinds, so that some are redundant.
    """
    rng = np.random.default_rng(0)
    length = max(PROMPT) + STEPS
    kinds = 2 * rng.standard_normal((3, HEAD))
    keys = rng.standard_normal((BATCH, length, KV_HEADS, HEAD))
    keys += kinds[rng.integers(0, 3, (BATCH, length, KV_HEADS))]
    queries = 2 * rng.standard_normal((BATCH, length, KV_HEADS * GROUPS, HEAD))
    values = rng.standard_normal((BATCH, length, KV_HEADS, HEAD))
    values *= rng.lognormal(size=(BATCH, length, KV_HEADS, 1))
    return queries, keys, values


class Run(NamedTuple):
    """What a policy did.

    Attributes:
      held: which positions each head holds after each step, bool
        `[STEPS, BATCH, KV_HEADS, position]`.
      state: at the end.
    """

    held: np.ndarray
    state: Any


@functools.cache
def run(policy, implementation="xla") -> Run:
    """Let a policy decode `STEPS` tokens of both rows after prompts that fit."""
    queries, keys, values = (jnp.asarray(x, jnp.float32) for x in tokens())
    policy.check(SLOTS)
    lengths = jnp.asarray(PROMPT, jnp.int32)
    state = kv.init(
        batch=BATCH, kv_heads=KV_HEADS, slots=SLOTS, head_dim=HEAD, dtype=jnp.float32
    )
    prompt = (x[:, : max(PROMPT)] for x in (keys, values))
    state = policy.begin(kv.fill(state, *prompt, lengths), lengths)
    rows = jnp.arange(BATCH)

    def step(state, t):
        position = lengths + t
        new = (x[rows, position] for x in (queries, keys, values))
        _, state = policy.attend(*new, state, position, implementation=implementation)
        return state, state.positions

    state, positions = jax.jit(
        lambda state: jax.lax.scan(step, state, jnp.arange(STEPS))
    )(state)
    length = keys.shape[1]
    held = np.asarray(positions)[..., None] == np.arange(length)
    return Run(held.any(-2), state)


def weights_of(query, keys):
    """Return the attention weights of the query heads `[GROUPS, tokens]`."""
    logits = query @ keys.T / np.sqrt(HEAD)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def simulate(rule, *, count=1, shared=False, early=0):
    """Return `Run.held` of a method that keeps at most `SLOTS` tokens.

    Args:
      rule: of (held positions, queries of this and earlier steps, keys, values, sums)
        to the importance of the held tokens; `inf` never goes.
      count: tokens that go at once.
      shared: all heads let the same go, by the mean.
      early: 1 if a full cache evicts after the step, 0 if before the next one.
    """
    queries, keys, values = tokens()
    result = np.zeros((STEPS, BATCH, KV_HEADS, keys.shape[1]), bool)
    for b in range(BATCH):
        held = [list(range(PROMPT[b])) for _ in range(KV_HEADS)]
        sums = np.zeros((KV_HEADS, keys.shape[1]))
        leaving = [[] for _ in range(KV_HEADS)]
        for t in range(STEPS):
            now = PROMPT[b] + t
            scores = []
            for k in range(KV_HEADS):
                held[k] = [p for p in held[k] if p not in leaving[k]] + [now]
                group = slice(k * GROUPS, (k + 1) * GROUPS)
                weights = weights_of(queries[b, now, group], keys[b, held[k], k])
                sums[k, held[k]] += weights.mean(0)
                seen = queries[b, PROMPT[b] : now + 1, group]
                scores.append(
                    rule(
                        np.array(held[k]),
                        seen,
                        keys[b, held[k], k],
                        values[b, held[k], k],
                        sums[k, held[k]],
                    )
                )
            if shared:
                scores = [np.mean(scores, 0)] * KV_HEADS
            leaving = [
                [held[k][i] for i in np.argsort(scores[k], kind="stable")[:count]]
                if len(held[k]) == SLOTS
                else []
                for k in range(KV_HEADS)
            ]
            for k in range(KV_HEADS):
                if early:
                    held[k] = [p for p in held[k] if p not in leaving[k]]
                result[t, b, k, held[k]] = True
    return result


def protect(importance, held, *, n_sink=0, n_recent=0):
    safe = (held < n_sink) | (held > held[-1] - n_recent)
    return np.where(safe, np.inf, importance)


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


def h2o_rule(held, queries, keys, values, sums):
    return protect(sums, held, n_recent=SLOTS // 2)


def vatp_rule(held, queries, keys, values, sums):
    return protect(sums * np.abs(values).sum(-1), held, n_sink=2, n_recent=3)


@functools.cache
def all_lots():
    return np.asarray(lots(jnp.arange(max(PROMPT) + STEPS), 3))


def random_rule(held, queries, keys, values, sums):
    return protect(all_lots()[held], held, n_recent=2)


def rkv_rule(held, queries, keys, values, sums, *, mix=0.3, window=3, kernel=3):
    old = len(held) - window
    logits = (queries[-window:] @ keys[:old].T / np.sqrt(HEAD)).max(1)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    mean = (weights / weights.sum(-1, keepdims=True)).mean(0)
    padded = np.pad(mean, kernel // 2)
    important = np.lib.stride_tricks.sliding_window_view(padded, kernel).max(-1)
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, 0)
    for row in similarity:
        if (row > 0.5).any():
            row[np.flatnonzero(row > 0.5)[-1]] = 0
    redundant = np.exp(similarity.mean(0))
    redundant /= redundant.sum()
    score = mix * important - (1 - mix) * redundant[:old]
    return np.concatenate([score, np.full(window, np.inf)])


SMALL_RKV = RKV(mix_lambda=0.3, window_size=3, kernel_size=3, buffer=4)
SIMULATED = {  # policy, and what the simulation is told
    "longflow": (LongFlow.paper(), dict(rule=longflow_rule("l1"), shared=True)),
    "longflow, l2": (LongFlow(score="l2"), dict(rule=longflow_rule("l2"), shared=True)),
    "longflow, attention": (
        LongFlow(score="attention"),
        dict(rule=longflow_rule("attention"), shared=True),
    ),
    "longflow, deletion": (
        LongFlow(score="deletion"),
        dict(rule=longflow_rule("deletion"), shared=True),
    ),
    "longflow, per head": (LongFlow(shared=False), dict(rule=longflow_rule("l1"))),
    "longflow, protected": (
        LongFlow(n_sink=2, n_recent=3),
        dict(rule=longflow_rule("l1", n_sink=2, n_recent=3), shared=True),
    ),
    "longflow, in bulk": (
        LongFlow(interval=4, n_recent=1),
        dict(rule=longflow_rule("l1", n_recent=1), shared=True, count=4, early=1),
    ),
    "longflow, in bulk, per head": (
        LongFlow(interval=3, shared=False, score="deletion"),
        dict(rule=longflow_rule("deletion"), count=3, early=1),
    ),
    "tova": (TOVADecode(), dict(rule=longflow_rule("attention"), shared=True)),
    "h2o": (H2ODecode(), dict(rule=h2o_rule)),
    "vatp": (VATP(n_sink=2, n_recent=3), dict(rule=vatp_rule)),
    "random": (RandomDecode(seed=3, n_recent=2), dict(rule=random_rule, shared=True)),
    "r-kv": (SMALL_RKV, dict(rule=rkv_rule, count=4, early=1)),
}


@pytest.mark.parametrize("name", SIMULATED)
def test_against_the_simulation(name):
    policy, options = SIMULATED[name]
    wanted = simulate(**options)
    assert wanted.sum(-1).max() <= SLOTS
    assert not wanted[-1, :, :, : min(PROMPT)].all()  # something real was evicted
    np.testing.assert_array_equal(run(policy).held, wanted)


@pytest.mark.parametrize("name", ["longflow, in bulk", "h2o", "r-kv"])
def test_reference_arithmetic_decides_the_same(name):
    policy, _ = SIMULATED[name]
    np.testing.assert_array_equal(run(policy, "reference").held, run(policy).held)


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
    for policy in (LongFlow(), TOVADecode(), RandomDecode()):
        held = run(policy).held
        np.testing.assert_array_equal(held[:, :, 0], held[:, :, 1])
    for policy in (LongFlow(shared=False), H2ODecode(), SMALL_RKV):
        held = run(policy).held
        assert (held[:, :, 0] != held[:, :, 1]).any()


@pytest.mark.parametrize(
    "variants",
    [
        [LongFlow(score=score) for score in ("l1", "l2", "attention", "deletion")],
        [LongFlow(), LongFlow(n_sink=1), LongFlow(n_recent=1), LongFlow(interval=2)],
        [H2ODecode(n_recent=0), H2ODecode(n_recent=4), H2ODecode(n_recent=0.5)],
        [VATP(n_sink=0), VATP(n_sink=3), VATP(n_sink=3, n_recent=2)],
        [RandomDecode(), RandomDecode(seed=1), RandomDecode(n_sink=2)],
        [
            SMALL_RKV,
            dataclasses.replace(SMALL_RKV, mix_lambda=0.9),
            dataclasses.replace(SMALL_RKV, window_size=2),
            dataclasses.replace(SMALL_RKV, kernel_size=1),
            dataclasses.replace(SMALL_RKV, buffer=2),
            dataclasses.replace(SMALL_RKV, threshold=0.95),
        ],
    ],
    ids=lambda variants: type(variants[0]).__name__,
)
def test_options_change_what_is_kept(variants):
    kept = [run(policy).held.tobytes() for policy in variants]
    assert len(set(kept)) == len(kept)


def test_free_slots_come_first_and_hold_the_tokens_in_order():
    for name in ("longflow, in bulk", "h2o", "r-kv"):
        policy, _ = SIMULATED[name]
        held = run(policy).held
        for b in range(BATCH):
            for t in range(SLOTS - PROMPT[b] - 1):
                assert held[t, b, :, : PROMPT[b] + t + 1].all()


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


@pytest.mark.parametrize("at_once", [1, 2, 3, 8])
def test_full_rows_evict_whatever_their_number(at_once):
    rng = np.random.default_rng(at_once)
    batch, heads, slots = 7, 2, 6
    positions = np.broadcast_to(np.arange(slots), (batch, heads, slots)).copy()
    positions[1, :, 4:] = kv.FREE
    state = kv.KVState(
        keys=jnp.zeros((batch, heads, slots, 1)),
        values=jnp.zeros((batch, heads, slots, 1)),
        positions=jnp.asarray(positions, jnp.int32),
        target=jnp.zeros((batch, heads), jnp.int32),
    )
    scores = rng.random((batch, heads, slots), np.float32)
    position = np.full(batch, slots - 1, np.int32)
    position[4] = -1
    bounds = jnp.asarray(position), jnp.zeros(batch, jnp.int32), jnp.asarray(position)
    after = evict_in_bulk(
        *(state, lambda rows: jnp.asarray(scores)[rows], *bounds),
        count=2,
        shared=False,
        at_once=at_once,
    )
    least = np.argsort(scores, axis=-1)[..., :2]
    expected = positions.copy()
    np.put_along_axis(expected, least, kv.FREE, axis=-1)
    expected[[1, 4]] = positions[[1, 4]]
    np.testing.assert_array_equal(after.positions, expected)


def test_finished_rows_keep_even_what_is_remembered():
    for policy in (
        LongFlow(protect_prompt=True),
        H2ODecode(),
        VATP(n_sink=1),
        SMALL_RKV,
    ):
        state = run(policy).state
        queries, keys, values = (jnp.asarray(x[:, 0], jnp.float32) for x in tokens())
        position = jnp.asarray([PROMPT[0] + STEPS, -1], jnp.int32)
        attend = jax.jit(functools.partial(policy.attend, implementation="xla"))
        out, after = attend(queries, keys, values, state, position)
        assert np.isfinite(out).all()
        moved = []
        for old, new in zip(
            jax.tree.leaves(state), jax.tree.leaves(after), strict=True
        ):
            np.testing.assert_array_equal(old[1], new[1])
            moved.append((np.asarray(old[0]) != np.asarray(new[0])).any())
        assert any(moved)
