"""The tokens that the network held likeliest along a prompt, for alignment sampling.

Axis letters: `B` batch, `P` padded prompt, `D` hidden, `V` vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.attention import Network

CANDIDATES = 3  # tokens that are noted at each position


def likeliest_tokens(
    network: Network, params: Any, hidden: jax.Array, *, chunk: int = 512
) -> jax.Array:
    """Return the three tokens held likeliest at each position of a prompt.

    Args:
      network: static.
      params: its parameters.
      hidden: `[B, P, D]`, the network's normalised hidden states.
      chunk: tokens whose logits exist at a time, over all rows.

    Returns:
      int32 `[B, P, 3]`; the entry at position `p` comes from the tokens before it, and
      what stands at position 0 means nothing. Equal logits are ordered by token id.
    """
    batch, length, width = hidden.shape
    size = max(1, min(length, chunk // batch))
    number = -(-length // size)
    padded = jnp.pad(hidden, ((0, 0), (0, number * size - length), (0, 0)))
    chunks = padded.reshape(batch, number, size, width).swapaxes(0, 1)

    def best(x):
        return top_three(network.apply({"params": params}, x, method="unembed"))

    found = jax.lax.map(best, chunks).swapaxes(0, 1)
    found = found.reshape(batch, number * size, 3)[:, :length]
    return jnp.roll(found, 1, axis=1)


def top_three(logits: jax.Array, *, block: int = 128) -> jax.Array:
    """Return the ids of the three highest of `V` >= 3 logits, int32 `[..., 3]`.

    Without a sort: they lie in the three blocks with the highest maxima, so that the
    vocabulary is read once. Ties go to the lower id. `jax.lax.top_k` takes 1.5 to 2.2
    times as long on an H200 (`benchmarks/results/2026-11-27-house-h200.json`).
    """
    vocabulary = logits.shape[-1]
    block = min(block, vocabulary // 3)  # at least three blocks
    blocks = -(-vocabulary // block)
    pad = [(0, 0)] * (logits.ndim - 1) + [(0, blocks * block - vocabulary)]
    filled = jnp.pad(logits, pad, constant_values=-jnp.inf)
    filled = filled.reshape(*logits.shape[:-1], blocks, block)
    at = _first_three(filled.max(-1), jnp.arange(blocks, dtype=jnp.int32))
    inside = jnp.arange(block, dtype=jnp.int32).reshape(*(1,) * at.ndim, block)
    ids = at[..., None] * block + inside
    values = jnp.take_along_axis(filled, at[..., None], axis=-2)
    return _first_three(
        values.reshape(*logits.shape[:-1], -1), ids.reshape(*logits.shape[:-1], -1)
    )


def _first_three(values, ids):
    """Return the ids of the three highest values, the lower id on ties."""
    never = jnp.iinfo(jnp.int32).max
    ids = jnp.broadcast_to(ids, values.shape)
    found = []
    for _ in range(3):
        highest = values.max(-1, keepdims=True)
        # With fewer than three finite values an id that was taken is not taken again.
        best = jnp.where((values == highest) & (ids >= 0), ids, never)
        best = best.min(-1, keepdims=True)
        found.append(best)
        taken = ids == best
        values, ids = jnp.where(taken, -jnp.inf, values), jnp.where(taken, -1, ids)
    return jnp.concatenate(found, axis=-1)
