"""StreamingLLM: keep the first tokens and the most recent ones, in both phases.

Xiao et al., arXiv 2309.17453. Axis letters: `B` batch, `K` key/value heads, `S` slots.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Ge

from jaxkv.kernels.weighing import PLAIN
from jaxkv.policies.base import PlainAttention, Prompt, WholePrompt
from jaxkv.policies.eviction import attend_and_write, attend_tree_by_depth
from jaxkv.state import KVState
from jaxkv.trees import Pending


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingLLM(WholePrompt, PlainAttention):
    """Keep the first tokens (attention sinks) and the most recent ones.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks"
    (arXiv 2309.17453, section 3.2). Deviation: the paper renumbers positions inside
    the cache; here, as everywhere in this library, keys keep the rotation of their
    original position.

    Attributes:
      n_sink: how many of the first positions are never evicted.
    """

    n_sink: Annotated[int, Ge(0)] = 4
    evicts = True
    spare = 0
    attends_trees = True

    def check(self, budget: int) -> None:
        """Need room for the sinks and one recent token."""
        if budget <= self.n_sink:
            raise ValueError(
                f"StreamingLLM: budget={budget} leaves no slot beside "
                f"n_sink={self.n_sink} sinks; use a budget of at least "
                f"{self.n_sink + 1} or fewer sinks."
            )

    def scores(self, prompt: Prompt) -> jax.Array:
        """Return the positions, with sinks as the highest."""
        batch, length, kv_heads, _ = prompt.keys.shape
        order = jnp.arange(length, dtype=jnp.float32)
        scores = jnp.where(order < self.n_sink, jnp.inf, order)
        return jnp.broadcast_to(scores, (batch, kv_heads, length))

    def begin(self, state: KVState, lengths: jax.Array) -> KVState:
        """Aim at the oldest token that is not a sink, if no slot is free."""
        del lengths
        return dataclasses.replace(state, target=oldest(state, n_sink=self.n_sink))

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
        """Overwrite the oldest token that is not a sink; see `DecodePolicy.attend`."""
        out, state = attend_and_write(
            *(query, key, value, state, position),
            implementation=implementation,
            weighing=weighing,
        )
        target = oldest(state, n_sink=self.n_sink)
        return out, dataclasses.replace(state, target=target)

    def attend_tree(
        self,
        query,
        key,
        value,
        state,
        position,
        drafts,
        ancestors,
        *,
        depth,
        implementation=None,
        weighing=PLAIN,
    ) -> tuple[jax.Array, Pending]:
        """Overwrite the oldest tokens in turn; see `Speculable.attend_tree`."""
        upcoming = next_oldest(state, position, n_sink=self.n_sink, count=depth + 2)
        return attend_tree_by_depth(
            *(query, key, value, state, position, upcoming, drafts, ancestors),
            implementation=implementation,
            weighing=weighing,
        )


def oldest(state: KVState, *, n_sink: int) -> jax.Array:
    """Return the first free slot, else the oldest non-sink one, int32 `[B, K]`."""
    return jnp.argmin(_age(state, n_sink=n_sink), axis=-1).astype(jnp.int32)


def next_oldest(
    state: KVState, position: jax.Array, *, n_sink: int, count: int
) -> jax.Array:
    """Return what `oldest` would give at each of the next writes, without writing.

    Args:
      state: of one layer.
      position: int32 `[B]`, of the first token to be written.
      n_sink: see `StreamingLLM`.
      count: how many writes to look ahead.

    Returns:
      int32 `[B, K, count]`. First come the slots in the order of their age; once all of
      them have been written, the writes go round. A token that is itself a sink keeps
      its slot, so that the circle shrinks by it.
    """
    age = _age(state, n_sink=n_sink)
    known = min(count, state.slots)
    _, order = jax.lax.top_k(-age, known)
    evictable = age != jnp.iinfo(jnp.int32).max
    evictable = evictable.sum(-1, dtype=jnp.int32, keepdims=True)
    step = jnp.arange(count, dtype=jnp.int32)[None, None]
    sinks = jnp.clip(n_sink - position, 0, count)[:, None, None]
    circle = jnp.maximum(evictable - sinks, 1)
    turn = jnp.where(step < sinks, step, sinks + (step - sinks) % circle)
    return jnp.take_along_axis(order, jnp.minimum(turn, known - 1), axis=-1)


def _age(state, *, n_sink):
    """Return positions, with sinks as the youngest; a free slot (-1) is the oldest."""
    is_sink = (state.positions >= 0) & (state.positions < n_sink)
    return jnp.where(is_sink, jnp.iinfo(jnp.int32).max, state.positions)
