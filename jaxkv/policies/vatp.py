"""VATP: H2O's sum of attention, times the norm of the value.

Guo et al., arXiv 2406.12335.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Ge

from jaxkv.kernels.weighing import PLAIN
from jaxkv.policies.base import PlainAttention
from jaxkv.policies.eviction import (
    Recent,
    aim_at_least,
    attend_and_sum,
    check_room,
    start_sums,
)
from jaxkv.state import KVState


@dataclasses.dataclass(frozen=True, kw_only=True)
class VATP(PlainAttention):
    """H2O's sum of attention, times the norm of the token's value.

    Guo et al., "Attention Score is Not All You Need for Token Importance Indicator in
    KV Cache Reduction: Value Also Matters" (arXiv 2406.12335, section 4):
    `S * ||v||_1` with H2O's `S`; the first tokens, whose values are small although all
    depend on them, are kept. Deviations: those of `H2ODecode`.

    Attributes:
      n_sink: how many of the first positions are never evicted; the paper's is 20.
      n_recent: as for `H2ODecode`.
    """

    n_sink: Annotated[int, Ge(0)] = 20
    n_recent: Recent = 0.5
    evicts = True
    spare = 1

    def check(self, budget: int) -> None:
        """Need room beside sinks and recent tokens."""
        check_room("VATP", budget, n_sink=self.n_sink, n_recent=self.n_recent)

    def begin(self, state: KVState, lengths: jax.Array) -> KVState:
        """Start all sums at 0."""
        del lengths
        return start_sums(state)

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
        """Overwrite the least sum times norm; see `DecodePolicy.attend`."""
        out, state = attend_and_sum(
            *(query, key, value, state, position),
            implementation=implementation,
            weighing=weighing,
        )
        values = jnp.where((state.positions >= 0)[..., None], state.values, 0)
        norms = jnp.abs(values.astype(jnp.float32)).sum(-1)
        return out, aim_at_least(
            state,
            state.memory * norms,
            position,
            n_sink=self.n_sink,
            n_recent=self.n_recent,
            shared=False,
        )
