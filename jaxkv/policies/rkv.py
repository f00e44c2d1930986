"""R-KV: evict what is neither attended to nor unlike the rest, a buffer at a time.

Axis letters: `B` batch, `K` key/value heads, `S` slots, `W` observation window,
`H` head size.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le

from jaxkv.fields import OddSize
from jaxkv.kernels import decode
from jaxkv.kernels.weighing import PLAIN, scale_of
from jaxkv.policies.base import PlainAttention
from jaxkv.policies.eviction import attend_and_write, check_room, evict_in_bulk
from jaxkv.state import KVState

# In the memory: a finite number, since `jax_debug_infs` looks at what programs return.
_NO_LOGIT = float(np.finfo(np.float32).min)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RKV(PlainAttention):
    """Weigh a token's importance against how redundant its key is.

    Cai et al., "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models"
    (arXiv 2505.24133, section 3). When the buffer is full, each head keeps the last
    `window_size` tokens, and of the others those of highest

        mix_lambda * I - (1 - mix_lambda) * R

    `I`: attention weights of the last `window_size` queries on the tokens before them,
    with the largest logit of the query heads that share a key, averaged over the
    queries, then max-pooled over `kernel_size` neighbours. `R`: softmax over the tokens
    of the mean cosine similarity to all other keys, where each key forgives the most
    recent of those more similar to it than `threshold`.

    Deviations: `budget` includes the buffer, since ours is a bound on the slots. In
    place of the last queries, `memory` holds their logits, float32 `[B, K, W, S]`. That
    gives the same numbers (a slot that was overwritten meanwhile holds a token of the
    window, which is no candidate) and reads the keys once less per query. A key that is
    similar to none forgives none; the authors' code then forgives the oldest.

    Attributes:
      mix_lambda: weight of importance against redundancy.
      window_size: last queries that observe, and last tokens that are kept.
      kernel_size: of the max-pooling, odd; neighbours are those in order of position.
      buffer: tokens that are evicted at once.
      threshold: cosine similarity from which on keys count as similar.
    """

    mix_lambda: Annotated[float, Ge(0), Le(1)] = 0.1
    window_size: Annotated[int, Ge(1)] = 8
    kernel_size: OddSize = 7
    buffer: Annotated[int, Ge(1)] = 128
    threshold: float = 0.5
    evicts = True

    @property
    def spare(self) -> int:
        """Slots that prefill leaves free: the buffer."""
        return self.buffer

    def check(self, budget: int) -> None:
        """Need room for window and buffer."""
        check_room("RKV", budget, n_recent=self.window_size, count=self.buffer)

    def begin(self, state: KVState, lengths: jax.Array) -> KVState:
        """Start with a window that has seen no query."""
        del lengths
        batch, kv_heads, slots = state.positions.shape
        shape = (batch, kv_heads, self.window_size, slots)
        return dataclasses.replace(
            state, memory=jnp.full(shape, _NO_LOGIT, jnp.float32)
        )

    def attend(
        self,
        query,
        key,
        value,
        state,
        position,
        *,
        implementation=None,
        weighing=PLAIN,
    ) -> tuple[jax.Array, KVState]:
        """Overwrite what earlier bulk evictions freed; see `DecodePolicy.attend`."""
        out, state = attend_and_write(
            *(query, key, value, state, position),
            implementation=implementation,
            weighing=weighing,
        )
        logits = decode.decode_logits(
            query,
            state.keys,
            state.positions,
            scale=scale_of(query),
            cap=weighing.cap,
            exact=implementation == "reference",
        ).max(axis=2)
        # The scatter drops a row beyond the window: finished rows write nowhere.
        row = jnp.where(position >= 0, position % self.window_size, self.window_size)
        rows = jnp.arange(len(position), dtype=jnp.int32)
        logits = jnp.maximum(logits, _NO_LOGIT)
        window = state.memory.at[rows, :, row].set(logits, mode="drop")
        state = dataclasses.replace(state, memory=window)
        newest = position - self.window_size

        def importance(rows):
            positions = state.positions[rows]
            attended = attended_importance(
                window[rows], positions, newest[rows], kernel_size=self.kernel_size
            )
            redundant = redundancy(
                state.keys[rows], positions, threshold=self.threshold
            )
            return self.mix_lambda * attended - (1 - self.mix_lambda) * redundant

        return out, evict_in_bulk(
            state,
            importance,
            position,
            jnp.zeros_like(position),
            newest,
            count=self.buffer,
            shared=False,
        )


def attended_importance(
    window: jax.Array, positions: jax.Array, newest: jax.Array, *, kernel_size: int
) -> jax.Array:
    """Return how much the window's queries attend to the tokens before it.

    Args:
      window: float32 `[B, K, W, S]`, logits; a row without any is no query.
      positions: int32 `[B, K, S]`.
      newest: int32 `[B]`, position of the last token before the window.
      kernel_size: of the max-pooling over neighbours in order of position.

    Returns:
      Float32 `[B, K, S]`; what the window's own tokens have is not meant to be read.
    """
    before = (positions >= 0) & (positions <= newest[:, None, None])
    weights = decode.softmax(jnp.where(before[:, :, None], window, -jnp.inf))
    queries = (window > _NO_LOGIT).any(-1).sum(-1, dtype=jnp.int32, keepdims=True)
    mean = weights.sum(axis=2) / jnp.maximum(queries, 1).astype(jnp.float32)
    last = jnp.iinfo(jnp.int32).max
    order = jnp.argsort(jnp.where(before, positions, last), axis=-1)
    pooled = jax.lax.reduce_window(
        jnp.take_along_axis(mean, order, axis=-1),
        -jnp.inf,
        jax.lax.max,
        (1, 1, kernel_size),
        (1, 1, 1),
        "SAME",
    )
    return jnp.take_along_axis(pooled, jnp.argsort(order, axis=-1), axis=-1)


def redundancy(
    keys: jax.Array, positions: jax.Array, *, threshold: float, block: int = 256
) -> jax.Array:
    """Return a softmax over the slots of the mean similarity to all other keys.

    Args:
      keys: `[B, K, S, H]`.
      positions: int32 `[B, K, S]`.
      threshold: see `RKV`.
      block: keys that are compared with all others at a time; `S x S` similarities
        are never in memory together.

    Returns:
      Float32 `[B, K, S]`, 0 where a slot is free.
    """
    occupied = positions >= 0
    unit = jnp.where(occupied[..., None], keys, 0).astype(jnp.float32)
    unit = unit / (jnp.linalg.norm(unit, axis=-1, keepdims=True) + 1e-8)
    slots = positions.shape[2]
    block = min(block, slots)
    blocks = -(-slots // block)
    padded = jnp.pad(unit, ((0, 0), (0, 0), (0, blocks * block - slots), (0, 0)))

    def add(total, start):
        rows = jax.lax.dynamic_slice_in_dim(padded, start, block, axis=2)
        similarity = jnp.einsum("bkrh,bksh->bkrs", rows, unit)
        itself = (start + jnp.arange(block, dtype=jnp.int32))[:, None] == jnp.arange(
            slots, dtype=jnp.int32
        )[None]
        similarity = jnp.where(itself[None, None], 0, similarity)
        similar = jnp.where(similarity > threshold, positions[:, :, None], -1)
        latest = similar.max(-1, keepdims=True)
        forgiven = (similar == latest) & (similar >= 0)
        return total + jnp.where(forgiven, 0, similarity).sum(axis=2), None

    starts = block * jnp.arange(blocks, dtype=jnp.int32)
    total, _ = jax.lax.scan(add, jnp.zeros(positions.shape, jnp.float32), starts)
    number = jnp.maximum(occupied.sum(-1, dtype=jnp.int32, keepdims=True), 1)
    mean = total / number.astype(jnp.float32)
    return decode.softmax(jnp.where(occupied, mean, -jnp.inf))
