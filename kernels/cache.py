"""What operations and their backends hand to each other.

Axis letters: `B` batch, `T` tokens, `N` query heads, `K` key/value heads, `S` slots,
`H` head size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class DecodeOutput(NamedTuple):
    """What one decode step of attention returns.

    Attributes:
      out: `[B, N, H]`, in the dtype of the query.
      keys: `[B, K, S, H]`, with the new key in its slot.
      values: `[B, K, S, H]`, with the new value in its slot.
      positions: int32 `[B, K, S]`, with the new position in its slot.
    """

    out: jax.Array
    keys: jax.Array
    values: jax.Array
    positions: jax.Array


class LongFlowOutput(NamedTuple):
    """What one decode step of attention with LongFlow's choice returns.

    Attributes:
      out: `[B, N, H]`, in the dtype of the query.
      keys: `[B, K, S, H]`, with the new key in its slot.
      values: `[B, K, S, H]`, with the new value in its slot.
      positions: int32 `[B, K, S]`, with the new position in its slot.
      norms: float32 `[B, K, S]`, with the norm of the new value in its slot.
      target: int32 `[B, K]`, the slot that the next token overwrites.
    """

    out: jax.Array
    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    norms: jax.Array
    target: jax.Array


class Heads(NamedTuple):
    """Rotated queries `[B, T, N, H]`, rotated keys and values `[B, T, K, H]`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


def write(
    key, value, keys, values, positions, target, position
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Put one token per row into its slot; rows whose position is -1 stay as they are.

    Arguments are those of `decode.decode_attention`.

    Returns:
      The new `keys`, `values` and `positions`.
    """
    where = place_of_token(target, position, keys.shape[2])
    flags = dict(mode="drop", unique_indices=True)
    return (
        keys.at[where].set(key.astype(keys.dtype), **flags),
        values.at[where].set(value.astype(values.dtype), **flags),
        positions.at[where].set(
            jnp.broadcast_to(position[:, None], target.shape), **flags
        ),
    )


def place_of_token(target: jax.Array, position: jax.Array, slots: int):
    """Return where a scatter that drops puts a token: nowhere in a finished row.

    Args:
      target: int32 `[B, K]`.
      position: int32 `[B]`, -1 for finished rows, whose slot lies beyond the end.
      slots: `S`, static.

    Returns:
      Indices of the axes `B`, `K` and `S`, which broadcast to `target`.
    """
    batch, kv_heads = target.shape
    slot = jnp.where(position[:, None] < 0, slots, target)
    return jnp.arange(batch)[:, None], jnp.arange(kv_heads)[None, :], slot
