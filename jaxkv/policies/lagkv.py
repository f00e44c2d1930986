"""LagKV: keep what stands out from the tokens that follow it.

Liang et al., arXiv 2504.04704. Axis letters: `B` batch, `K` key/value heads, `T`
tokens, `P` partitions, `L` tokens of a partition, `H` head size.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Ge

from jaxkv.policies.base import Prompt, WholePrompt
from jaxkv.policies.scoring import check_kept_anyway


@dataclasses.dataclass(frozen=True, kw_only=True)
class LagKV(WholePrompt):
    """Keep what varies most, measured by the range of the partition that follows.

    Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens
    Are Important" (arXiv 2504.04704, section 3): behind `n_sink` tokens the prompt is
    cut into partitions of `lag_size`. With the least and the greatest entry of each
    channel in the partition that follows, `m` and `M`, a token's keys and values are
    rescaled to `(x - m) / (M - m)`; the standard deviation over the channels goes
    through a softmax over the partition, for keys and values apart; `S(j)` is the mean
    of both. Each partition keeps its best. The sinks, the last whole partition and what
    lies behind it have no reference, and are kept before all others.

    Here the budget is one number, so that a token's rank in its partition, best 1, is
    its score, and equal ranks favour the earlier partition: each keeps as many but for
    one. Where the budget holds not even what has no reference, or the prompt is shorter
    than two partitions, the sinks and the newest tokens stay. A channel that is
    constant in the reference is left out, which the paper's formula would divide by 0.

    Attributes:
      n_sink: first tokens, which are always kept.
      lag_size: tokens of a partition.
      cross_scoring: compares tokens of all partitions by `S` itself, not by rank.
    """

    n_sink: Annotated[int, Ge(0)] = 4
    lag_size: Annotated[int, Ge(2)] = 128
    cross_scoring: bool = False

    def check(self, budget: int) -> None:
        """Need a slot beside the sinks."""
        check_kept_anyway("LagKV", budget, n_sink=self.n_sink)

    def scores(self, prompt: Prompt) -> jax.Array:
        """Return ranks or scores in [0, 1]; above 1 what has no reference."""
        length = prompt.keys.shape[1]
        index = jnp.arange(length, dtype=jnp.int32)
        # The newest first, should the budget not hold all of them.
        newest = 1 + (1 + index.astype(jnp.float32)) / length
        anyway = jnp.where(index < self.n_sink, jnp.inf, newest)[None, None]
        parts = (length - self.n_sink) // self.lag_size
        if parts < 2:
            shape = prompt.keys.shape[0], prompt.keys.shape[2], length
            return jnp.broadcast_to(anyway, shape)
        end = self.n_sink + parts * self.lag_size
        both = [
            _information(x[:, self.n_sink : end].astype(jnp.float32), parts)
            for x in (prompt.keys, prompt.values)
        ]
        scores = (both[0] + both[1]) / 2  # [B, K, P - 1, L]
        if not self.cross_scoring:
            scores = _ranks(scores) / self.lag_size
        scores = scores.reshape(*scores.shape[:2], -1)
        behind = (0, 0), (0, 0), (self.n_sink, length - self.n_sink - scores.shape[-1])
        scores = jnp.pad(scores, behind)
        whole = (prompt.lengths - self.n_sink) // self.lag_size
        last = self.n_sink + (whole - 1) * self.lag_size
        compared = (index[None] >= self.n_sink) & (index[None] < last[:, None])
        return jnp.where(compared[:, None], scores, anyway)


def _information(states, parts):
    """Return each token's share of its partition's spread, float32 `[B, K, P - 1, L]`.

    Args:
      states: keys or values, float32 `[B, P L, K, H]`.
      parts: `P`.
    """
    batch, length, heads, size = states.shape
    split = states.reshape(batch, parts, length // parts, heads, size)
    split = split.transpose(0, 3, 1, 2, 4)  # [B, K, P, L, H]
    least, most = (
        f(split[:, :, 1:], axis=3, keepdims=True) for f in (jnp.min, jnp.max)
    )
    spread = most - least
    varies = jnp.broadcast_to(spread > 0, split[:, :, 1:].shape)
    scaled = (split[:, :, :-1] - least) / jnp.where(spread > 0, spread, 1.0)
    count = jnp.maximum(varies.sum(-1, keepdims=True), 2).astype(jnp.float32)
    mean = jnp.where(varies, scaled, 0.0).sum(-1, keepdims=True) / count
    squares = jnp.where(varies, (scaled - mean) ** 2, 0.0).sum(-1, keepdims=True)
    deviation = jnp.sqrt(squares / (count - 1))[..., 0]
    return jax.nn.softmax(deviation, axis=-1)


def _ranks(scores):
    """Return the rank of each score in the last axis, float32; the lowest has 0."""
    order = jnp.argsort(scores, axis=-1)
    return jnp.argsort(order, axis=-1).astype(jnp.float32)
