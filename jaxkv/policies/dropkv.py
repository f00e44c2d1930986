"""DropKV: keep what the outputs of the prompt's end would miss most.

"DropKV: Decoupled Residual-Output Perturbation" (openreview MqfNzH3TVH). Axis letters:
`B` batch, `K` key/value heads, `G` query heads of each, `W` window, `T` tokens.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Ge

from jaxkv.fields import OddSize
from jaxkv.policies.base import Prompt, WholePrompt
from jaxkv.policies.scoring import (
    check_room_for_window,
    keep_anyway,
    pool,
    probabilities_of_last,
    window_of,
)

_LEAST_REST = 1e-6  # a query that looks at one token only has nothing else


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropKV(WholePrompt):
    """Keep the tokens without which the window's outputs change most.

    Of a query `i` with probabilities `p_ij` and output `o_i`, evicting token `j` alone
    moves the output by exactly `p_ij / (1 - p_ij) (o_i - v_j)`. So (openreview
    MqfNzH3TVH, and NVIDIA/kvpress issue 284, by its author) `S(j) = sum_i (p_ij / (1 -
    p_ij))^2 ||v_j - o_i||^2` over the last `window_size` queries, whose tokens stay.
    The author's code (NVIDIA/kvpress pull request 285), which we agree with index by
    index, takes the mean over the query heads of a key/value head, and average-pools
    along the prompt, which the formula does not say and a needle needs. Without pooling
    (`kernel_size=1`), `LongFlow(score="deletion")` is the same for one query while
    decoding. Scores are distances, hence comparable among heads, as `AdaKV` needs it.

    Deviation: a budget within the window shortens it, as it does `SnapKV`'s.

    Attributes:
      window_size: last tokens of the prompt that score, and that are always kept.
      kernel_size: of the pooling, odd.
    """

    window_size: Annotated[int, Ge(1)] = 32
    kernel_size: OddSize = 7

    def check(self, budget: int) -> None:
        """Need a window, and a slot beside it."""
        check_room_for_window("DropKV", budget)

    def scores(self, prompt: Prompt) -> jax.Array:
        """Return by how much the window's outputs would change."""
        window = window_of(prompt, self.window_size)
        weights = probabilities_of_last(prompt, self.window_size, count=window)
        values = prompt.values.astype(jnp.float32)
        outputs = jnp.einsum("bkgwt,btkh->bkgwh", weights, values)
        both = jnp.einsum("bkgwh,btkh->bkgwt", outputs, values)
        size = (values**2).sum(-1).swapaxes(1, 2)[:, :, None, None]
        distance = size - 2 * both + (outputs**2).sum(-1, keepdims=True)
        odds = weights / (1 - weights + _LEAST_REST)
        scores = (odds**2 * jnp.maximum(distance, 0.0)).sum(3).mean(2)
        index = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None]
        scores = pool(
            scores,
            index < prompt.lengths[:, None],
            pooling="avg",
            kernel_size=self.kernel_size,
        )
        return keep_anyway(scores, prompt.lengths, n_recent=window)
