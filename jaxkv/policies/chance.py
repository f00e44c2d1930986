"""Chance: keep tokens at random, for the prompt and for decoding.

No paper: the floor of all comparisons.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Ge

from jaxkv.kernels.weighing import PLAIN
from jaxkv.policies.base import PlainAttention, Prompt, WholePrompt
from jaxkv.policies.eviction import aim_at_least, attend_and_write, check_room
from jaxkv.runtime.seeds import key_of
from jaxkv.state import KVState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(WholePrompt):
    """Keep tokens drawn at random, others for each head: the floor of all comparisons.

    The draw depends on seed, head and position only, so it is the same in each layer,
    each row and each batch.

    Attributes:
      seed: of the draw.
    """

    seed: int = 0

    def scores(self, prompt: Prompt) -> jax.Array:
        """Return the numbers that were drawn."""
        batch, length, kv_heads, _ = prompt.keys.shape
        # One key per position: numbers must not depend on how long the buffer is.
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            key_of(self.seed), jnp.arange(length, dtype=jnp.int32)
        )

        def draw(key):
            return jax.random.uniform(key, (kv_heads,), jnp.float32)

        drawn = jax.vmap(draw)(keys)
        return jnp.broadcast_to(drawn.T, (batch, kv_heads, length))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomDecode(PlainAttention):
    """Evict by lot: the baseline that any score should beat.

    Each token draws a number from its position and the seed when it arrives, and the
    lowest number is evicted, in all heads and layers alike. So what is kept is at every
    step a uniform sample of all tokens so far, and depends on no other row.

    Attributes:
      seed: other seeds, other lots.
      n_sink: how many of the first positions are never evicted.
      n_recent: how many of the newest tokens are never evicted.
    """

    seed: int = 0
    n_sink: Annotated[int, Ge(0)] = 0
    n_recent: Annotated[int, Ge(0)] = 0
    evicts = True
    spare = 1

    def check(self, budget: int) -> None:
        """Need room beside what is protected."""
        check_room("RandomDecode", budget, n_sink=self.n_sink, n_recent=self.n_recent)

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
        """Overwrite the lowest lot; see `DecodePolicy.attend`."""
        out, state = attend_and_write(
            *(query, key, value, state, position),
            implementation=implementation,
            weighing=weighing,
        )
        return out, aim_at_least(
            state,
            lots(state.positions, self.seed),
            position,
            n_sink=self.n_sink,
            n_recent=self.n_recent,
            shared=True,
        )


def lots(positions: jax.Array, seed: int) -> jax.Array:
    """Return a number in [0, 1) per position, float32, the same wherever it lies."""
    # What lies beyond 32 bits of the seed counts, too.
    mixed = seed * 0x9E3779B9 + (seed >> 32) * 0x85EBCA77
    x = positions.astype(jnp.uint32) ^ jnp.uint32(mixed % 2**32)
    # Murmur3's finalizer: every bit of the input changes half of the output's.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    x = x ^ (x >> 16)
    return (x >> 8).astype(jnp.float32) / 2**24
