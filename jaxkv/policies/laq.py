"""LAQ: score the prompt with the queries of a sketched answer.

Wang et al., arXiv 2505.20334. Axis letters: `B` batch, `N` sketched tokens.
"""

import dataclasses
from typing import Annotated, Any

import jax
from annotated_types import Ge

from jaxkv.fields import OddSize
from jaxkv.policies.base import Prompt, Sketch, WholePrompt
from jaxkv.policies.dapq import attention_of_pseudo
from jaxkv.policies.scoring import (
    Pooling,
    Reduction,
    check_kept_anyway,
    check_room_for_window,
    keep_anyway,
)
from jaxkv.policies.snapkv import SnapKV


@dataclasses.dataclass(frozen=True, kw_only=True)
class LAQ(WholePrompt):
    """DapQ whose pseudo tokens are the output itself, as a cheap sketch foresees it.

    Wang et al., "Lookahead Q-Cache: Achieving More Consistent KV Cache Eviction via
    Pseudo Query" (arXiv 2505.20334): evict with SnapKV, decode some tokens from what is
    left, and evict the whole prompt, which is held meanwhile, with their queries in
    place of the window's. So the prompt is read once, and keys and values of all of it
    are in memory until the end. Here the sketch gives contents, `N` greedy tokens at
    the same budget; their queries come from running them behind the whole prompt, at
    the positions of the output, as DapQ's do.

    Deviations: the sketch's queries saw all of the prompt, where the paper takes those
    that it was decoded with, `N` tokens' computation more. Nothing is kept whatever it
    scores, so that it differs from DapQ in its contents only; `n_recent` brings the
    paper's window of recent tokens back (LAQ++ lets it score as well).

    Attributes:
      window_size: tokens of the sketch, `N`.
      draft_window_size: of the SnapKV that the sketch is decoded from.
      pooling: of the scores, in both evictions.
      kernel_size: of the pooling, odd.
      reduction: of the scores in the second eviction; see `DapQ`.
      clusters: of the pooling in the second eviction; see `DapQ`.
      n_recent: last tokens of the prompt that stay whatever they score.
    """

    window_size: Annotated[int, Ge(1)] = 32
    draft_window_size: Annotated[int, Ge(1)] = 32
    pooling: Pooling = "max"
    kernel_size: OddSize = 7
    reduction: Reduction = "sum"
    clusters: Annotated[int, Ge(0)] = 0
    n_recent: Annotated[int, Ge(0)] = 0
    sketches = True

    @classmethod
    def recommended(cls, **options) -> "LAQ":
        """Return what finds most with SmolLM2-135M: half the sketch, DapQ's scores.

        `benchmarks/README.md` has the numbers. 8 tokens lose little against 16.
        """
        ours = dict(window_size=16, kernel_size=31, reduction="max", clusters=4)
        return cls(**dict[str, Any](ours) | options)

    @property
    def num_pseudo(self) -> int:
        """All of the sketch."""
        return self.window_size

    @property
    def sketch_policy(self) -> SnapKV:
        """The eviction that the sketch is decoded from."""
        return SnapKV(
            window_size=self.draft_window_size,
            kernel_size=self.kernel_size,
            pooling=self.pooling,
        )

    def check(self, budget: int) -> None:
        """Need a budget that the sketch can do with."""
        check_room_for_window("LAQ", budget)  # of the sketch
        check_kept_anyway("LAQ", budget, n_recent=self.n_recent)

    def pseudo_tokens(
        self, tokens: jax.Array, lengths: jax.Array, *, vocab_size: int, sketch: Sketch
    ) -> jax.Array:
        """Sketch the contents, int32 `[B, N]`; see `policies.PrefillPolicy`."""
        del tokens, lengths, vocab_size
        return sketch(self.sketch_policy, self.window_size)

    def scores(self, prompt: Prompt) -> jax.Array:
        """Return what the sketch pays to the prompt."""
        scores = attention_of_pseudo(
            prompt,
            window=self.window_size,
            pooling=self.pooling,
            kernel_size=self.kernel_size,
            reduction=self.reduction,
            clusters=self.clusters,
        )
        return keep_anyway(scores, prompt.lengths, n_recent=self.n_recent)
