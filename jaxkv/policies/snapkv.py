"""SnapKV: keep what the end of the prompt attends to.

Li et al., arXiv 2404.14469.
"""

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from annotated_types import Ge

from jaxkv.fields import OddSize
from jaxkv.policies.base import Prompt, WholePrompt
from jaxkv.policies.scoring import (
    Pooling,
    attention_of_last,
    check_room_for_window,
    keep_anyway,
    pool,
    window_of,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(WholePrompt):
    """Keep what the end of the prompt attends to, smoothed, and that end itself.

    Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation"
    (arXiv 2404.14469, section 4): with the window's queries `q_i`, `S(j) = sum_i
    softmax(q_i K^T / sqrt(H))_j` for `j` before the window, pooled along `j`; keep the
    window and the `budget - window_size` best. The defaults are those of the paper's
    LongBench runs. Deviation: where its code refuses a budget within the window, here
    the window is the last `budget - 1` tokens.

    Attributes:
      window_size: last tokens of the prompt that score, and that are always kept.
      kernel_size: of the pooling, odd.
      pooling: "max", "avg" or "none".
      offset: positions that the window's queries are turned ahead by before they
        score; 0 is the paper. With `window_size` they stand where the output will:
        DapQ's idea without pseudo tokens, with the prompt's end as the content.
    """

    window_size: Annotated[int, Ge(1)] = 32
    kernel_size: OddSize = 7
    pooling: Pooling = "max"
    offset: Annotated[int, Ge(0)] = 0

    @classmethod
    def longbench(cls, **options) -> "SnapKV":
        """Return the setting of the paper's LongBench runs: 32, max-pooling by 7."""
        paper = dict(window_size=32, kernel_size=7, pooling="max")
        return cls(**dict[str, Any](paper) | options)

    @classmethod
    def kvpress(cls, **options) -> "SnapKV":
        """Return the default of the kvpress library: 64, average pooling by 5."""
        theirs = dict(window_size=64, kernel_size=5, pooling="avg")
        return cls(**dict[str, Any](theirs) | options)

    def check(self, budget: int) -> None:
        """Need a window, and a slot beside it."""
        check_room_for_window(type(self).__name__, budget)

    def scores(self, prompt: Prompt) -> jax.Array:
        """Return what the window pays to what lies before it, pooled."""
        window = window_of(prompt, self.window_size)
        scores = attention_of_last(
            prompt, self.window_size, count=window, offset=self.offset
        )
        index = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None]
        before = index < (prompt.lengths - window)[:, None]
        scores = pool(
            scores, before, pooling=self.pooling, kernel_size=self.kernel_size
        )
        return keep_anyway(scores, prompt.lengths, n_recent=window)
