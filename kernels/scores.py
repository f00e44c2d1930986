"""What a slot's share of the attention output is, where it is weight times norm.

Axis letters: `B` batch, `K` key/value heads, `S` slots, `H` head size.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxkv.kernels.cache import place_of_token

Score = Literal["l1", "l2", "attention", "deletion"]
# Those that are a product of the weight and `value_norms`: all that the kernels do.
ProductScore = Literal["l1", "l2", "attention"]


def value_norms(values: jax.Array, score: Score) -> jax.Array:
    """Return what turns the weight of a slot into its score, where that is a product.

    Args:
      values: `[..., H]`.
      score: see `longflow.longflow_attention`.

    Returns:
      Float32 `[...]`: the norm of the values for "l1" and "l2", 1 for the others.
    """
    v = values.astype(jnp.float32)
    match score:
        case "l1":
            return jnp.abs(v).sum(-1)
        case "l2":
            return jnp.sqrt(jnp.square(v).sum(-1))
    return jnp.ones(v.shape[:-1], jnp.float32)


def write_norm(
    value: jax.Array,
    norms: jax.Array,
    target: jax.Array,
    position: jax.Array,
    score: Score,
) -> jax.Array:
    """Put the norms of new values `[B, K, H]` where the values go.

    Other arguments are those of `longflow.longflow_attention`.

    Returns:
      The new `norms`.
    """
    place = place_of_token(target, position, norms.shape[2])
    new = value_norms(value, score)
    return norms.at[place].set(new, mode="drop", unique_indices=True)
