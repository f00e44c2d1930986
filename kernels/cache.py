"""What the decode operations return, for their backends to import without a cycle.

Axis letters: `B` batch, `N` query heads, `K` key/value heads, `S` slots, `H` head size.
"""

from typing import NamedTuple

import jax


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
