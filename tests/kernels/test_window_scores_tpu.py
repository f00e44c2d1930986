"""Window scores on TPUs without a TPU: interpreted, against an oracle in float64."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxkv.kernels.window_scores_tpu import window_scores_tpu

SCALE = 0.09
TOLERANCE = {"float32": 5e-6, "bfloat16": 2e-2}
HEADS = {"MHA": (2, 2), "GQA": (6, 2), "MQA": (5, 1)}
scores = functools.partial(window_scores_tpu, scale=SCALE, interpret=True)


def draw(heads, keys, window, starts, dtype="float32", head_dim=128):
    """Return query, key and start; NaN lies beyond the last key that a row sees."""
    num_heads, kv_heads = HEADS[heads]
    rng = np.random.default_rng(keys)
    batch = len(starts)
    query = rng.standard_normal((batch, window, num_heads, head_dim))
    key = rng.standard_normal((batch, keys, kv_heads, head_dim))
    for row, start in enumerate(starts):
        key[row, start + window :] = np.nan
    starts = jnp.asarray(starts, jnp.int32)
    return jnp.asarray(query, dtype), jnp.asarray(key, dtype), starts


def oracle(query, key, start, length, count=None, sink=None, cap=None):
    query, key = np.array(query, np.float64), np.array(key, np.float64)
    batch, window, num_heads, _ = query.shape
    keys, kv_heads = key.shape[1:3]
    out = np.zeros((batch, kv_heads, keys))
    groups = num_heads // kv_heads
    for b in range(batch):
        for w in range(window if count is None else int(count[b])):
            seen = int(start[b]) + w + 1
            for n in range(num_heads):
                logits = SCALE * key[b, :seen, n // groups] @ query[b, w, n]
                if cap is not None:
                    logits = cap * np.tanh(logits / cap)
                own = -np.inf if sink is None else float(sink[n])
                top = max(logits.max(), own)
                weights = np.exp(logits - top)
                whole = weights.sum() + np.exp(own - top)
                out[b, n // groups, :seen] += weights / whole / groups
    return out[:, :, :length]


def check(arguments, length, dtype="float32", count=None, interpret=True):
    got = scores(*arguments, length=length, count=count, interpret=interpret)
    assert got.dtype == jnp.float32
    wanted = oracle(*arguments, length, count)
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE[dtype])
    return got, wanted


def test_several_blocks_of_keys_ragged_rows_and_counts():
    """Row 0 sees one block of two; of row 2 one query counts, of row 1 none."""
    arguments = draw("GQA", 1100, 7, [5, 1030, 1093])
    got, wanted = check(arguments, 1050, count=jnp.asarray([7, 0, 1]))
    assert np.asarray(got)[0, :, 12:].max() == 0
    np.testing.assert_allclose(got[1], 0)
    # The oracle must be able to tell a shifted mask.
    query, key, start = arguments
    shifted = oracle(query, key, start - 1, 1050, jnp.asarray([7, 0, 1]))
    assert np.abs(shifted - wanted).max() > 1e-2


def test_sinks_and_caps():
    query, key, start = draw("GQA", 150, 5, [5, 140], head_dim=64)
    kind = dict(sink=jnp.linspace(-1, 5, 6).astype(jnp.bfloat16), cap=0.5)
    count = jnp.asarray([5, 3])
    got = scores(query, key, start, length=145, count=count, **kind)
    again = scores(query, key, start, length=145, count=count, **kind)
    np.testing.assert_array_equal(got, again)
    wanted = oracle(query, key, start, 145, count, **kind)
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE["float32"])
    for other in (
        dict(sink=kind["sink"]),
        dict(cap=0.5),
        dict(sink=kind["sink"][::-1]),
    ):
        other = oracle(query, key, start, 145, count, **other)
        assert np.abs(other - wanted).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_against_oracle(heads, dtype, head_dim):
    check(draw(heads, 333, 5, [100, 328], dtype, head_dim), 300, dtype)


@pytest.mark.slow
def test_more_rows_than_a_tile_holds():
    check(draw("MQA", 300, 60, [100, 240]), 299)


@pytest.mark.slow
def test_memory_that_holds_nan_before_it_is_written():
    interpret = pltpu.InterpretParams(uninitialized_memory="nan")
    check(draw("GQA", 1100, 7, [5, 1030, 1093]), 1100, interpret=interpret)


def test_refusals_name_their_reason():
    query, key, start = draw("GQA", 8, 2, [3])
    with pytest.raises(NotImplementedError, match="bfloat16 or float32, got float16"):
        scores(query.astype("float16"), key, start, length=8)
    with pytest.raises(NotImplementedError, match="multiple of 32, got H=72"):
        scores(*draw("GQA", 8, 2, [3], head_dim=72), length=8)


def test_the_largest_over_the_queries():
    query, key, start = draw("GQA", 130, 3, [5, 60])
    count = jnp.asarray([3, 2])
    got = scores(query, key, start, length=100, count=count, reduction="max")
    wanted = [
        oracle(query[:, i : i + 1], key, start + i, 100, (i < count).astype(int))
        for i in range(3)
    ]
    np.testing.assert_allclose(got, np.max(wanted, axis=0), atol=TOLERANCE["float32"])
