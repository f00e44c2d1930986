"""Full: keep every token, the ordinary cache.

Every other policy is measured against it.
"""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp

from jaxkv import state as kv
from jaxkv.kernels import shared_slots
from jaxkv.kernels.weighing import PLAIN
from jaxkv.policies.base import PlainAttention, Prompt, WholePrompt
from jaxkv.policies.eviction import attend_and_write, attend_tree_by_depth
from jaxkv.state import KVState
from jaxkv.trees import Pending


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(WholePrompt, PlainAttention):
    """Keep everything: the ordinary cache, and the oracle for all other policies."""

    evicts = False
    spare = 0
    attends_trees = True

    def attends_shared(self, implementation: str | None) -> bool:
        """Return whether rows may attend to slots that no row owns.

        Policies of one's own that lack this know nothing of such slots.

        Args:
          implementation: of `attend`; None is the best that knows them.
        """
        return implementation in (None, *get_args(shared_slots.Implementation))

    def check(self, budget: int) -> None:
        """Accept any budget; the caller sees to it that everything fits."""

    def compress(self, prompt: Prompt, state: KVState, *, budget: int) -> KVState:
        """Keep the whole prompt."""
        del budget
        return kv.fill(state, prompt.keys, prompt.values, prompt.candidates)

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
        """Append; see `DecodePolicy.attend`.

        Prefill fills slots from the first, so without eviction the next slot is free.
        """
        out, state = attend_and_write(
            *(query, key, value, state, position),
            implementation=implementation,
            weighing=weighing,
        )
        target = state.target + (position[:, None] >= 0).astype(jnp.int32)
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
        """Append; see `Speculable.attend_tree`."""
        steps = jnp.arange(depth + 2, dtype=jnp.int32)
        upcoming = state.target[..., None] + steps[None, None]
        return attend_tree_by_depth(
            *(query, key, value, state, position, upcoming, drafts, ancestors),
            implementation=implementation,
            weighing=weighing,
        )
