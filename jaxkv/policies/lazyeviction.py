"""LazyEviction: keep tokens that may soon be attended to again, as they were before.

Zhang et al., arXiv 2506.15969. Axis letters: `B` batch, `K` key/value heads, `S` slots.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from annotated_types import Ge, Gt, Lt

from jaxkv.kernels import decode
from jaxkv.kernels.weighing import PLAIN, scale_of
from jaxkv.policies.base import PlainAttention
from jaxkv.policies.eviction import attend_and_write, check_room, evict_in_bulk
from jaxkv.state import KVState


class Recurrence(NamedTuple):
    """When tokens were attended to.

    Attributes:
      last: int32 `[B, K, S]`, position of the query that was the last to do so; before
        any has, the position before the token, or the last one of the prompt.
      longest: int32 `[B, K, S]`, most positions between two such queries; 0 where none
        has done so.
    """

    last: jax.Array
    longest: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LazyEviction(PlainAttention):
    """Evict, a window at a time, what is not expected to be attended to again.

    Zhang et al., "LazyEviction: Lagged KV Eviction with Attention Pattern Observation
    for Efficient Long Reasoning" (arXiv 2506.15969, section 4). A token is active at
    step `t` if its attention weight is at least `alpha`. With `TS` the last step at
    which it was, and `MRI` the longest interval between two such steps, the last
    `window_size` tokens stay, and of the others those of highest

        2 sigmoid(-(t - TS) / MRI) + 2 sigmoid(-(MRI - 1))

    which is 0 where `MRI` is 0: the token has not been active since it was written.
    Steps before the first activity count from the token itself; those of the prompt's
    tokens from the prompt's end, as in the authors' code.

    Deviations: `budget` includes the window that fills up between two evictions, since
    ours is a bound on the slots, and rows evict when they are full, not at multiples of
    `window_size`. A key/value head evicts for its query heads, of which the highest
    weight counts; the authors repeat keys, and each query head evicts its own. Their
    code has `1 + (t - TS) / MRI` in the first exponent, the paper has not. The paper
    measures `window_size` on a few samples, so that 80 % of intervals are shorter (175
    for a 7B Qwen on MATH-500); ours is a number.

    Attributes:
      alpha: attention weight from which on a token is active; the paper takes 1e-4,
        and 5e-4 for Llama-8B.
      window_size: newest tokens that are kept, and tokens that are evicted at once.
    """

    alpha: Annotated[float, Gt(0), Lt(1)] = 1e-4
    window_size: Annotated[int, Ge(1)] = 128
    evicts = True

    @property
    def spare(self) -> int:
        """Slots that prefill leaves free: a window."""
        return self.window_size

    def check(self, budget: int) -> None:
        """Need room for the newest window, and as many to evict."""
        size = self.window_size
        check_room("LazyEviction", budget, n_recent=size, count=size)

    def begin(self, state: KVState, lengths: jax.Array) -> KVState:
        """Start where no token has been active."""
        none = jnp.zeros(state.positions.shape, jnp.int32)
        end = (lengths - 1).astype(jnp.int32)[:, None, None]
        return dataclasses.replace(state, memory=Recurrence(none + end, none))

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
        weights = decode.decode_weights(
            query,
            state.keys,
            state.positions,
            scale=scale_of(query),
            exact=implementation == "reference",
            **weighing.softmax,
        ).max(axis=2)
        seen = noted(*(state.memory, weights, state.target, position), alpha=self.alpha)
        state = dataclasses.replace(state, memory=seen)

        def importance(rows):
            return recurrence_score(
                Recurrence(seen.last[rows], seen.longest[rows]), position[rows]
            )

        return out, evict_in_bulk(
            state,
            importance,
            position,
            jnp.zeros_like(position),
            position - self.window_size,
            count=self.window_size,
            shared=False,
        )


def noted(
    seen: Recurrence,
    weights: jax.Array,
    target: jax.Array,
    position: jax.Array,
    *,
    alpha: float,
) -> Recurrence:
    """Return what is known of the tokens after one more query.

    Args:
      seen: before it.
      weights: float32 `[B, K, S]`, of its attention.
      target: int32 `[B, K]`, the slot of its own token.
      position: int32 `[B]` of it; -1 for finished rows, which do not change.
      alpha: see `LazyEviction`.
    """
    slots = jnp.arange(weights.shape[2], dtype=jnp.int32)[None, None]
    new = slots == target[..., None]
    now = position[:, None, None]
    last = jnp.where(new, now - 1, seen.last)
    longest = jnp.where(new, 0, seen.longest)
    active = weights >= alpha
    longest = jnp.where(active, jnp.maximum(longest, now - last), longest)
    last = jnp.where(active, now, last)
    running = now >= 0
    return Recurrence(
        jnp.where(running, last, seen.last), jnp.where(running, longest, seen.longest)
    )


def recurrence_score(seen: Recurrence, position: jax.Array) -> jax.Array:
    """Return how likely tokens are to be attended to again, float32 `[B, K, S]`.

    Args:
      seen: of them.
      position: int32 `[B]`, of the newest query.
    """
    since = (position[:, None, None] - seen.last).astype(jnp.float32)
    longest = seen.longest.astype(jnp.float32)
    within = jax.nn.sigmoid(-since / jnp.maximum(longest, 1.0))
    often = jax.nn.sigmoid(1.0 - longest)
    return jnp.where(seen.longest > 0, 2.0 * (within + often), 0.0)
