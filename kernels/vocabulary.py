"""Choices among the entries of a vocabulary, wherever its parts lie.

Under a mesh the devices of a row hold a run of the logits each. They choose among their
own and tell each other what they chose, a few bytes a row, so that no logits move. The
answers are those of one device, to the last bit.

Axis letters: `B` batch, `V` vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from jaxkv.kernels.per_shard import (
    add_up,
    all_columns,
    columns_per_row,
    first_of_shard,
    per_shard,
)
from jaxkv.kernels.shapes import checked


@checked
def likeliest(logits: Float32[Array, "B V"]) -> Int32[Array, " B"]:
    """Return each row's greatest entry: the lowest of equals, the first NaN if any.

    Raises:
      ValueError: shape or dtype is another.
    """
    if columns_per_row() == 1:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return per_shard(_likeliest_part, likeliest)(logits)


def _likeliest_part(logits):
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)[:, None]
    value = jnp.take_along_axis(logits, best, axis=1)
    best += first_of_shard(logits.shape[1])
    bits = jax.lax.bitcast_convert_type(value, jnp.int32)
    both = all_columns(jnp.stack([bits, best]), axis=2)  # one exchange
    values = jax.lax.bitcast_convert_type(both[0], jnp.float32)
    winner = jnp.argmax(values, axis=-1, keepdims=True)
    return jnp.take_along_axis(both[1], winner, axis=1)[:, 0]


@checked
def at_tokens(
    logits: Float32[Array, "B V"], tokens: Int32[Array, " B"]
) -> Float32[Array, " B"]:
    """Return the logit of each row's token; NaN for a token beyond the vocabulary.

    Raises:
      ValueError: a shape or a dtype is another.
    """
    if columns_per_row() == 1:
        return jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return per_shard(_at_tokens_part, at_tokens)(logits, tokens)


def _at_tokens_part(logits, tokens):
    size = logits.shape[1]
    index = tokens - first_of_shard(size)
    here = (index >= 0) & (index < size)
    index = jnp.clip(index, 0, size - 1)[:, None]
    found = jnp.take_along_axis(logits, index, axis=1)[:, 0]
    # Who holds it says so, too: nobody holds what is beyond.
    parts = jnp.stack([jnp.where(here, found, 0), here.astype(jnp.float32)])
    found, held = add_up(parts)
    return jnp.where(held > 0, found, jnp.nan)


def kth_largest(logits: jax.Array, *, k: int) -> jax.Array:
    """Return each row's `k`-th largest logit, float32 `[B]`.

    Args:
      logits: float32 `[B, V]`.
      k: from 1 to `V`.
    """

    @checked
    def kth(logits: Float32[Array, "B V"]) -> Float32[Array, " B"]:
        return jax.lax.top_k(logits, k)[0][:, -1]

    if columns_per_row() == 1:
        return kth(logits)

    def part(logits):
        best, _ = jax.lax.top_k(logits, min(k, logits.shape[1]))
        return jax.lax.top_k(all_columns(best, axis=1), k)[0][:, -1]

    return per_shard(part, kth)(logits)
