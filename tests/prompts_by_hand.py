"""Prompts of one row whose attention is worked out by hand."""

import jax.numpy as jnp
import numpy as np

from jaxkv import state as kv
from jaxkv.policies.base import Prompt

LOG = float(np.log(2.0))


def prompt_of(queries, keys, values=None, *, lengths=None, keep=2):
    """One row; `queries` `[T, N]` and `keys` `[T, K]` are the first of two entries.

    The second entry of each is 0, so logits are plain products.
    """
    queries, keys = (
        jnp.stack([jnp.asarray(x, jnp.float32), jnp.zeros_like(jnp.asarray(x), float)])
        .transpose(1, 2, 0)[None]
        .astype(jnp.float32)
        for x in (queries, keys)
    )
    return Prompt(
        queries=queries,
        keys=keys,
        values=keys if values is None else values,
        lengths=jnp.asarray([lengths or queries.shape[1]], jnp.int32),
        keep=jnp.asarray([keep], jnp.int32),
        frequencies=jnp.ones(1),
        scale=1.0,
        implementation="reference",
    )


def kept(policy, prompt, *, heads=None):
    """Return the positions that each head keeps, as lists."""
    heads = heads or prompt.keys.shape[2]
    budget = int(prompt.keep.max())
    policy.check(budget)
    state = kv.init(batch=1, kv_heads=heads, slots=8, head_dim=2, dtype=jnp.float32)
    state = policy.compress(prompt, state, budget=budget)
    return [row[row >= 0].tolist() for row in np.asarray(state.positions)[0]]


# Two heads, five tokens. The last query looks at keys whose weights are powers of two:
# head 0: 1, 4, 1, 8, 2 of 16; head 1: 4, 1, 2, 1, 8 of 16.
KEYS = LOG * np.array([[0, 2], [2, 0], [0, 1], [3, 0], [1, 3]])
ONES = np.ones((5, 2))
