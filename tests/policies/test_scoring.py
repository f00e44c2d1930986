"""What scoring policies share."""

import jax.numpy as jnp
import numpy as np
import pytest
from prompts_by_hand import prompt_of

from jaxkv import state as kv
from jaxkv.policies.base import keep_top
from jaxkv.policies.scoring import keep_anyway, pool, pool_in_budget


def test_ties_favour_the_earlier_token_and_padding_never_wins():
    prompt = prompt_of(np.ones((6, 1)), np.ones((6, 1)), lengths=4, keep=3)
    state = kv.init(batch=1, kv_heads=1, slots=8, head_dim=2, dtype=jnp.float32)
    scores = jnp.asarray([[[1.0, 5.0, 1.0, 1.0, 9.0, jnp.nan]]])
    positions = keep_top(prompt, scores, state, budget=5).positions
    assert positions[0, 0].tolist() == [0, 1, 2] + [kv.FREE] * 5


def test_pooling_masks_padding_before_and_after():
    scores = jnp.asarray([[[3.0, 1.0, 2.0, 8.0, 9.0]]])
    real = jnp.asarray([[True, True, True, False, False]])
    low = -np.inf
    for pooling, want in [
        ("none", [3, 1, 2, low, low]),
        ("max", [3, 3, 2, low, low]),
        ("avg", [4 / 3, 2, 1, low, low]),
    ]:
        got = pool(scores, real, pooling=pooling, kernel_size=3)
        np.testing.assert_allclose(got[0, 0], want, rtol=1e-6)


@pytest.mark.parametrize(
    ("keep", "width"), [(120, 31), (119, 15), (56, 15), (55, 7), (12, 7), (1, 1)]
)
def test_a_small_budget_narrows_the_kernel(keep, width):
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 80)), jnp.float32)
    real = jnp.arange(80)[None] < jnp.asarray([[80], [50]])
    got = pool_in_budget(
        *(scores, real, jnp.asarray([keep, 1000])),
        pooling="max",
        kernel_size=31,
        clusters=4 if keep != 12 else 2,
    )
    for row, size in enumerate((width, 31)):
        wanted = pool(scores, real, pooling="max", kernel_size=size)
        np.testing.assert_array_equal(got[row], wanted[row])


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_a_kernel_wider_than_the_prompt_holds_all_of_it(pooling):
    """Its memory and time are bounded by the prompt, not by what was asked for."""
    scores = jnp.asarray([[[1.0, 3.0, 2.0, 9.0]]])
    real = jnp.asarray([[True, True, True, False]])
    size = 2**30 + 1
    got = pool(scores, real, pooling=pooling, kernel_size=size)[0, 0]
    want = 3.0 if pooling == "max" else 6.0 / size
    np.testing.assert_allclose(got[:3], [want] * 3, rtol=1e-6)
    assert got[3] == -np.inf


def test_kept_anyway_counts_from_each_row_s_end():
    got = keep_anyway(jnp.zeros((2, 1, 5)), jnp.asarray([5, 3]), n_sink=1, n_recent=1)
    assert np.isinf(got[:, 0]).tolist() == [
        [True, False, False, False, True],
        [True, False, True, True, True],  # beyond its end lies padding
    ]
