"""Sequences grow by one token or by several in the same way."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given

from jaxkv import sequences
from jaxkv.sequences import Generation

ROWS, OUT, NEW, VOCABULARY = 3, 12, 5, 7
append, write = jax.jit(sequences.append), jax.jit(sequences.write)


def begun(rng):
    """Return sequences of different lengths, with token 1 as the newest."""
    lengths = rng.integers(1, OUT - NEW + 1, ROWS)
    tokens = rng.integers(0, VOCABULARY, (ROWS, OUT))
    tokens = np.where(np.arange(OUT) < lengths[:, None], tokens, -1)
    as_array = functools.partial(jnp.asarray, dtype=jnp.int32)
    return Generation(
        tokens=as_array(tokens),
        lengths=as_array(lengths),
        done=jnp.zeros(ROWS, bool),
        finite=jnp.ones(ROWS, bool),
        last=as_array(tokens[np.arange(ROWS), lengths - 1]),
        position=as_array(10 + lengths),
        cache=(),
        rngs=jax.random.split(jax.random.key(0), ROWS),
        seen=jnp.asarray(rng.random((ROWS, VOCABULARY)) < 0.2),
        speculation=(),
    )


@given(seed=st.integers(0, 2**20))
def test_append_of_several_tokens_is_that_of_one_after_another(seed):
    rng = np.random.default_rng(seed)
    g = begun(rng)
    count = rng.integers(0, NEW + 1, ROWS)
    new = rng.integers(0, VOCABULARY, (ROWS, NEW))
    # A stop id is the last of these tokens in some rows, and behind them anywhere.
    new = np.where(np.arange(NEW) < count[:, None], new % (VOCABULARY - 1), new)
    rows = np.flatnonzero((rng.random(ROWS) < 0.5) & (count > 0))
    new[rows, count[rows] - 1] = VOCABULARY - 1
    stop_ids = jnp.asarray([-1, VOCABULARY - 1])
    seen = np.array(g.seen)
    for row in range(ROWS):
        seen[row, new[row, : count[row]]] = True
    new, count = jnp.asarray(new, jnp.int32), jnp.asarray(count, jnp.int32)
    got = append(g, new, count, stop_ids)
    for i in range(NEW):
        one = (i < count).astype(jnp.int32)
        g = append(g, new[:, i : i + 1], one, stop_ids)
    for field in dataclasses.fields(g):
        a, b = getattr(got, field.name), getattr(g, field.name)
        if field.name != "rngs":
            jax.tree.map(np.testing.assert_array_equal, a, b)
    assert got.done.tolist() == [r in rows for r in range(ROWS)]
    np.testing.assert_array_equal(got.seen, seen)
    for row in range(ROWS):
        end = int(got.lengths[row])
        assert got.last[row] == got.tokens[row, end - 1]
        np.testing.assert_array_equal(
            got.tokens[row, end - int(count[row]) : end], new[row, : int(count[row])]
        )


def test_rows_may_have_stop_ids_of_their_own():
    tokens = jnp.asarray([[1, 2, 3], [1, 2, 3]], jnp.int32)
    stops = jnp.asarray([[3, -1], [1, 2]], jnp.int32)
    want = [[False, False, True], [True, True, False]]
    assert sequences.is_stop(tokens, stops).tolist() == want


def test_write_by_hand():
    buffer = jnp.full((3, 5), -1, jnp.int32)
    new = jnp.asarray([[1, 2, 3], [4, 5, 6], [7, 8, 9]], jnp.int32)
    got = write(buffer, new, jnp.asarray([0, 3, 1]), jnp.asarray([2, 3, 0]))
    want = [[1, 2, -1, -1, -1], [-1, -1, -1, 4, 5], [-1] * 5]  # the 6 has no place
    assert got.tolist() == want
