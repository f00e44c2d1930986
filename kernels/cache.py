"""The cache of one layer as operations take and return it, and what is written to it.

Axis letters: `B` batch, `T` tokens, `N` query heads, `K` key/value heads, `S` slots,
`H` head size, `D` documents, `P` slots of a document.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


class Token(NamedTuple):
    """One new token per row.

    Attributes:
      key: of the token, rotated.
      value: of the token.
      position: in its sequence; -1 for a finished row, which writes nothing.
    """

    key: Float[Array, "B K H"]
    value: Float[Array, "B K H"]
    position: Int32[Array, " B"]


class Nodes(NamedTuple):
    """One tree of drafted tokens per row, which no cache holds yet.

    Attributes:
      key: of the nodes, rotated.
      value: of the nodes.
      position: of the root in its sequence; -1 for a finished row.
    """

    key: Float[Array, "B T K H"]
    value: Float[Array, "B T K H"]
    position: Int32[Array, " B"]


class Slots(NamedTuple):
    """The cache of one layer.

    Attributes:
      keys: rotated; free slots of these and of the values may hold anything, NaN
        included.
      values: of the same tokens.
      positions: of the token in each slot, negative where a slot is free.
      target: the slot that the next token overwrites.
      norms: `scores.value_norms` of the values, kept from step to step, so that scoring
        reads no value twice. None where nobody scores.
    """

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]
    positions: Int32[Array, "B K S"]
    target: Int32[Array, "B K"]
    norms: Float32[Array, "B K S"] | None = None


class SharedSlots(NamedTuple):
    """Slots that rows attend to beside their own, held once for all rows of a document.

    Attributes:
      keys: rotated; free slots of these and of the values may hold anything.
      values: of the same tokens.
      positions: of the token in each slot, negative where a slot is free.
      owner: the document of each row.
    """

    keys: Float[Array, "D K P H"]
    values: Float[Array, "D K P H"]
    positions: Int32[Array, "D K P"]
    owner: Int32[Array, " B"]


class Heads(NamedTuple):
    """Rotated queries and keys of tokens, and their values."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]


def write(token: Token, slots: Slots) -> Slots:
    """Put one token per row into its slot; rows whose position is -1 stay as they are.

    Returns:
      The slots, `target` and `norms` as they were.
    """
    where = place_of_token(slots.target, token.position, slots.keys.shape[2])
    flags: dict[str, Any] = dict(mode="drop", unique_indices=True)
    keys, values, positions, target, _ = slots
    return slots._replace(
        keys=keys.at[where].set(token.key.astype(keys.dtype), **flags),
        values=values.at[where].set(token.value.astype(values.dtype), **flags),
        positions=positions.at[where].set(
            jnp.broadcast_to(token.position[:, None], target.shape), **flags
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
    return (
        jnp.arange(batch, dtype=jnp.int32)[:, None],
        jnp.arange(kv_heads, dtype=jnp.int32)[None, :],
        slot,
    )
