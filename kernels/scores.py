"""What a slot's share of the attention output is, where it is weight times norm.

Axis letters: `B` batch, `K` key/value heads, `S` slots, `H` head size.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxkv.kernels.cache import Slots, Token, place_of_token

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


def write_norm(token: Token, slots: Slots, score: Score) -> jax.Array:
    """Return the norms of the slots, with that of the new value where the value goes.

    Args:
      token: the new one.
      slots: as they were before it.
      score: see `longflow.longflow_attention`.

    Returns:
      Float32 `[B, K, S]`.
    """
    norms = slots.norms
    assert norms is not None, "a scored cache has norms"
    place = place_of_token(slots.target, token.position, norms.shape[2])
    new = value_norms(token.value, score)
    return norms.at[place].set(new, mode="drop", unique_indices=True)
