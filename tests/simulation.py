"""A cache of lists, which knows nothing of slots, and a policy that runs beside it.

Each method is one rule, written from its paper in plain NumPy.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import state as kv

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


def assert_as_simulated(policy, rule, **options):
    """Compare what a policy holds after each step with what its rule says."""
    wanted = simulate(rule, **options)
    assert wanted.sum(-1).max() <= SLOTS
    assert not wanted[-1, :, :, : min(PROMPT)].all()  # something real was evicted
    np.testing.assert_array_equal(run(policy).held, wanted)


def assert_all_differ(*policies):
    """Check that each of them keeps something else."""
    kept = [run(policy).held.tobytes() for policy in policies]
    assert len(set(kept)) == len(kept)


def assert_reference_decides_the_same(policy):
    """Check that the arithmetic of another implementation changes no choice."""
    np.testing.assert_array_equal(run(policy, "reference").held, run(policy).held)
