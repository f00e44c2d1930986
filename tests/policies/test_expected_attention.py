"""Expected attention against the mean over drawn queries."""

import jax.numpy as jnp
import numpy as np

from jaxkv import ExpectedAttention
from jaxkv import state as kv
from jaxkv.kernels.rotary import rotate
from jaxkv.policies.base import Prompt
from jaxkv.policies.expected_attention import expected_attention


def test_expected_attention_is_the_mean_over_gaussian_queries():
    rng = np.random.default_rng(0)
    length, head_dim = 6, 4
    frequencies = jnp.asarray([1.0, 0.1])
    index = jnp.arange(length)[None]
    plain = jnp.asarray(rng.normal(size=(1, length, 1, head_dim)), jnp.float32)
    keys = jnp.asarray(rng.normal(size=(1, length, 1, head_dim)), jnp.float32)
    values = jnp.asarray(rng.normal(size=(1, length, 1, head_dim)), jnp.float32)
    prompt = Prompt(
        queries=rotate(plain, index, frequencies),
        keys=keys,
        values=values,
        lengths=jnp.asarray([length], jnp.int32),
        keep=jnp.asarray([2], jnp.int32),
        frequencies=frequencies,
        scale=0.5,
    )
    # Draw queries like the prompt's but its first, and turn them by the mean rotation.
    q = np.asarray(plain, np.float64)[0, 1:, 0]
    drawn = rng.multivariate_normal(q.mean(0), np.cov(q.T, bias=True), size=200_000)
    ahead = np.array([6, 7, 8])[:, None] * np.array([1.0, 0.1])
    cos, sin = np.cos(ahead).mean(0), np.sin(ahead).mean(0)
    turned = np.concatenate(
        [
            drawn[:, :2] * cos - drawn[:, 2:] * sin,
            drawn[:, 2:] * cos + drawn[:, :2] * sin,
        ],
        axis=1,
    )
    z = np.exp(0.5 * turned @ np.asarray(keys)[0, :, 0].T).mean(0)
    want = z / z.sum()
    got = expected_attention(
        prompt, n_future_positions=3, n_sink=1, use_covariance=True
    )
    np.testing.assert_allclose(got[0, 0], want, rtol=0.02)
    # Without the spread, a plain softmax of the mean query.
    mean = np.exp(0.5 * turned.mean(0) @ np.asarray(keys)[0, :, 0].T)
    got = expected_attention(
        prompt, n_future_positions=3, n_sink=1, use_covariance=False
    )
    np.testing.assert_allclose(got[0, 0], mean / mean.sum(), rtol=0.02)

    def best(**options):
        policy = ExpectedAttention(n_future_positions=3, n_sink=1, **options)
        return kept_of_four(policy, prompt)

    norms = np.linalg.norm(np.asarray(values)[0, :, 0], axis=-1)
    for options, scores in [
        ({}, want * norms),
        (dict(use_value_norm=False), want),
        (dict(epsilon=10.0), norms),
    ]:
        assert best(**options) == sorted([0, 1 + int(np.argmax(scores[1:]))]), options


def kept_of_four(policy, prompt):
    state = kv.init(batch=1, kv_heads=1, slots=4, head_dim=4, dtype=jnp.float32)
    positions = policy.compress(prompt, state, budget=2).positions
    return positions[0, 0, :2].tolist()
