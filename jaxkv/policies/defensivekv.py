"""DefensiveKV: keep what any one query needs, not what all need on average.

Feng et al., arXiv 2510.13334. Axis letters: `B` batch, `K` key/value heads, `G` query
heads of each, `W` window, `T` tokens.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Ge, Le

from jaxkv.fields import OddSize
from jaxkv.policies.base import Prompt, WholePrompt
from jaxkv.policies.criticalkv import output_norms
from jaxkv.policies.scoring import (
    check_room_for_window,
    keep_anyway,
    pool,
    probabilities_of_last,
    window_of,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DefensiveKV(WholePrompt):
    """Keep the tokens of the largest attention, whichever query of the window pays it.

    Feng et al., "Taming the Fragility of KV Cache Eviction in LLM Inference"
    (arXiv 2510.13334, section 4), with the details of its code: the attention of each
    query of the window is average-pooled along the prompt, and scaled to the mass it
    had; its maximum over the window and over the query heads of the group is a token's
    worst case; no token counts less than the mean of its head. It is weighed by the
    share that a token's value has of `||W_o v||_1` of all heads, after a first stage,
    as in `CriticalKV`: the tokens that gather `mass` of the window's mean attention to
    the tokens before it. Two details are the code's alone: `mass` is less by what the
    window pays, in the mean of all heads, to as many tokens just before it; and of `T`
    tokens the first stage has at most `floor(budget (T - window) / T) - window`.
    Heads share the layer's budget there: `adakv:policy=defensivekv,safeguard=0` keeps,
    with `most` at the number of heads, what the code at 9251b95 keeps, index by index.

    That floor has a price: all tokens below the mean are equal but for their norms. On
    SmolLM2-135M a head has nine in ten of them, and loses needles that the same maximum
    without the floor keeps (benchmarks/README.md).

    Deviations: `Layer-DefensiveKV`, which lets layers share too, is left out; without
    `AdaKV` all heads have equal budgets; a budget within the window shortens it.

    Attributes:
      window_size: last tokens of the prompt that score, and that are always kept.
      kernel_size: of the pooling, odd.
      mass: of the first stage.
    """

    window_size: Annotated[int, Ge(1)] = 32
    kernel_size: OddSize = 5
    mass: Annotated[float, Ge(0), Le(1)] = 0.9
    reads_output = True

    def check(self, budget: int) -> None:
        """Need a window, and a slot beside it."""
        check_room_for_window("DefensiveKV", budget)

    def scores(self, prompt: Prompt) -> jax.Array:
        """Return the worst cases, weighed; infinity for the first stage."""
        batch, length, kv_heads, _ = prompt.keys.shape
        window = window_of(prompt, self.window_size)
        index = jnp.arange(length, dtype=jnp.int32)[None]
        before = index < (prompt.lengths - window)[:, None]  # [B, T]
        paid = probabilities_of_last(prompt, self.window_size, count=window)
        paid = jnp.where(before[:, None, None, None], paid, 0.0)
        pooled = pool(
            paid.reshape(batch, -1, length),
            before,
            pooling="avg",
            kernel_size=self.kernel_size,
        ).reshape(paid.shape)
        pooled = jnp.where(before[:, None, None, None], pooled, 0.0)
        mass, own = (x.sum(-1, keepdims=True) for x in (paid, pooled))
        worst = (pooled * mass / jnp.where(own > 0, own, 1.0)).max((2, 3))  # [B, K, T]
        count = jnp.maximum(before.sum(-1), 1).astype(jnp.float32)[:, None, None]
        worst = jnp.maximum(worst, worst.sum(-1, keepdims=True) / count)
        norms = output_norms(prompt).reshape(batch, kv_heads, -1, length).mean(2)
        total = norms.sum(1, keepdims=True)
        worst = worst * norms / jnp.where(total > 0, total, 1.0)

        queries = jnp.maximum(window, 1).astype(jnp.float32)[:, None, None]
        mean = paid.mean(2).sum(2) / queries  # over the group, then the window
        near = index >= (prompt.lengths - 2 * window)[:, None]
        near = jnp.where(near[:, None], mean, 0.0).sum(-1).mean(1)  # of all heads
        first = _gathering(mean, self.mass - near[:, None, None])
        own = -(-prompt.keep * window // jnp.maximum(prompt.lengths, 1))  # rounded up
        room = (prompt.keep - own - window)[:, None, None]
        worst = jnp.where((first >= 0) & (first < room), jnp.inf, worst)
        return keep_anyway(worst, prompt.lengths, n_recent=window)


def _gathering(mean, mass):
    """Return the rank of the tokens that gather `mass`, int32 `[B, K, T]`, else -1.

    Args:
      mean: attention, float32 `[B, K, T]`.
      mass: float32 `[B, K, 1]`; of 1.
    """
    order = jnp.argsort(-mean, axis=-1, stable=True)
    share = mean / jnp.maximum(mean.sum(-1, keepdims=True), 1e-12)
    gathered = jnp.cumsum(jnp.take_along_axis(share, order, axis=-1), axis=-1)
    rank = jnp.argsort(order, axis=-1).astype(jnp.int32)
    enough = jnp.take_along_axis(gathered, rank, axis=-1)
    return jnp.where(enough < mass, rank, -1)
