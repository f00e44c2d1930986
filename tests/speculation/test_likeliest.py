"""The tokens that the network held likeliest along a prompt, against all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import CONFIG, NETWORK, params

from jaxkv.speculation.likeliest import likeliest_tokens, top_three

LENGTH = 16


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_likeliest_tokens_are_those_of_all_logits(chunk):
    hidden = jax.random.normal(jax.random.key(1), (2, LENGTH, CONFIG.hidden_size))
    found = likeliest_tokens(NETWORK, params(), hidden, chunk=chunk)
    assert found.shape == (2, LENGTH, 3)
    logits = NETWORK.apply({"params": params()}, hidden, method="unembed")
    want = np.argsort(-np.asarray(logits), axis=-1, kind="stable")[..., :3]
    np.testing.assert_array_equal(found[:, 1:], want[:, :-1])


@pytest.mark.parametrize("size", [3, 8, 300])
def test_top_three_takes_the_lower_id_on_ties(size):
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 4, (50, size)).astype(np.float32)
    logits[0] = -np.inf
    logits[1, 1:] = -np.inf
    want = np.argsort(-logits, axis=-1, kind="stable")[:, :3]
    got = top_three(jnp.asarray(logits), block=8)
    np.testing.assert_array_equal(got, want)
