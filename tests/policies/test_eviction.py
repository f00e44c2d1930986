"""What decode policies share: free slots come first, bulk eviction, finished rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulation import BATCH, PROMPT, SLOTS, STEPS, run, tokens

from jaxkv import RKV, VATP, H2ODecode, LazyEviction, LongFlow
from jaxkv import state as kv
from jaxkv.policies.eviction import evict_in_bulk

SMALL_RKV = RKV(mix_lambda=0.3, window_size=3, kernel_size=3, buffer=4)


def test_free_slots_come_first_and_hold_the_tokens_in_order():
    for policy in (LongFlow(interval=4, n_recent=1), H2ODecode(), SMALL_RKV):
        held = run(policy).held
        for b in range(BATCH):
            for t in range(SLOTS - PROMPT[b] - 1):
                assert held[t, b, :, : PROMPT[b] + t + 1].all()


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
        LazyEviction(alpha=0.1, window_size=3),
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
