"""TOVA: keep what the newest token attends to.

Oren et al., arXiv 2401.06104, for the prompt and for decoding.
"""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from annotated_types import Ge

from jaxkv.kernels import decode, longflow
from jaxkv.kernels.weighing import PLAIN
from jaxkv.policies.base import PlainAttention, Prompt, WholePrompt
from jaxkv.policies.longflow import LongFlow
from jaxkv.policies.scoring import (
    attention_of_last,
    check_kept_anyway,
    keep_anyway,
)
from jaxkv.state import KVState


@dataclasses.dataclass(frozen=True, kw_only=True)
class TOVA(WholePrompt):
    """Keep what the last token attends to, the same tokens for all heads of a layer.

    Oren et al., "Transformers are Multi-State RNNs" (arXiv 2401.06104, section 3.2):
    `S(j)` is the last query's attention, averaged over the heads of the layer.
    Deviation: evicted once at the end of the prompt, not at every token.

    Attributes:
      n_recent: last tokens of the prompt that stay whatever they score.
    """

    n_recent: Annotated[int, Ge(0)] = 0

    @classmethod
    def kvpress(cls, **options) -> "TOVA":
        """Return what the kvpress library does: it always keeps the last token."""
        return cls(**dict[str, Any](n_recent=1) | options)

    def check(self, budget: int) -> None:
        """Need a slot beside what stays."""
        check_kept_anyway("TOVA", budget, n_recent=self.n_recent)

    def scores(self, prompt: Prompt) -> jax.Array:
        """Return the mean attention, the same for all heads."""
        scores = attention_of_last(prompt, 1)
        mean = scores.mean(1, keepdims=True)
        scores = jnp.broadcast_to(mean, scores.shape)
        return keep_anyway(scores, prompt.lengths, n_recent=self.n_recent)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TOVADecode(PlainAttention):
    """Evict the token that the current one attends to least.

    Oren et al., "Transformers are Multi-State RNNs" (arXiv 2401.06104, section 4): the
    lowest attention weight of the newest query, averaged over the heads of a layer;
    nothing is protected. This is LongFlow's op with the weight alone as the score.
    Deviation: a prompt is cut by the prefill policy, not token by token.
    """

    evicts = True
    spare = 1

    def check(self, budget: int) -> None:
        """Accept any budget."""

    def default_implementation(self, platform: str) -> decode.Implementation:
        """Return the implementation that `None` stands for."""
        return longflow.choose(platform, "attention")

    def begin(self, state: KVState, lengths: jax.Array) -> KVState:
        """Begin as LongFlow does, with ones for norms."""
        return LongFlow(score="attention").begin(state, lengths)

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
        """Overwrite the least attended token; see `DecodePolicy.attend`."""
        return LongFlow(score="attention").attend(
            *(query, key, value, state, position),
            implementation=implementation,
            weighing=weighing,
        )
