"""Prompt eviction by the attention that future queries are expected to pay.

Axis letters: `B` batch, `N` query heads, `K` key/value heads, `G = N / K`, `T` tokens,
`H` head size.
"""

import dataclasses
import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from annotated_types import Ge, Le, Lt

from jaxkv.kernels.rotary import rotate, turn
from jaxkv.policies.base import Prompt, WholePrompt
from jaxkv.policies.scoring import check_kept_anyway, keep_anyway

MOST_FUTURE = 1 << 16  # the angles of all of them are held at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedAttention(WholePrompt):
    """Keep what queries like the prompt's would attend to from the coming positions.

    Devoto, Jeblick, Jégou, "Expected Attention: KV Cache Compression by Estimating
    Attention from Future Queries Distribution" (arXiv 2510.00636, section 3): queries
    before their rotation are taken as Gaussian, `q ~ N(m, C)`; with the rotation
    averaged over the next positions, `R`, a key's expected unnormalised attention is
    `z(j) = exp(s (R m)^T k_j + s^2 k_j^T (R C R^T) k_j / 2)`, `s = 1 / sqrt(H)`, and
    `S(j) = (z(j) / sum z + epsilon) ||v_j||`, averaged over the query heads of a group.

    Deviations: mean and covariance come from the prompt's queries themselves, turned
    back, not from hidden states, which a policy does not see; `||v_j||` stands for the
    paper's `||W_o v_j||` for the same reason (the authors' library does so too).

    Attributes:
      n_future_positions: how many coming positions the rotation is averaged over.
      n_sink: first tokens, which are always kept, and left out of the statistics
        because their queries are unlike all others.
      use_covariance: whether the quadratic term is used.
      use_value_norm: whether scores are multiplied by the norms of the values.
      epsilon: see above; with more of it, norms of values count more.
      sinks_share: whether `sum z` goes over the sinks as well. What is kept is decided
        among the others, but of query heads that share a key head, one that would look
        at the sinks then counts less.
    """

    n_future_positions: Annotated[int, Ge(1), Le(MOST_FUTURE)] = 512
    n_sink: Annotated[int, Ge(0)] = 4
    use_covariance: bool = True
    use_value_norm: bool = True
    epsilon: Annotated[float, Ge(0), Lt(math.inf)] = 0.0
    sinks_share: bool = True

    @classmethod
    def kvpress(cls, **options) -> "ExpectedAttention":
        """Return the authors' library as its public board ran it: epsilon of 0.01."""
        theirs = dict(epsilon=1e-2, sinks_share=False)
        return cls(**dict[str, Any](theirs) | options)

    def check(self, budget: int) -> None:
        """Need a slot beside the sinks."""
        check_kept_anyway("ExpectedAttention", budget, n_sink=self.n_sink)

    def scores(self, prompt: Prompt) -> jax.Array:
        """Return the expected attention, weighed by the values."""
        scores = expected_attention(
            prompt,
            n_future_positions=self.n_future_positions,
            n_sink=self.n_sink,
            use_covariance=self.use_covariance,
            sinks_share=self.sinks_share,
        )
        if self.use_value_norm:
            norms = jnp.linalg.norm(prompt.values.astype(jnp.float32), axis=-1)
            scores = (scores + self.epsilon) * norms.swapaxes(1, 2)
        return keep_anyway(scores, prompt.lengths, n_sink=self.n_sink)


def expected_attention(
    prompt: Prompt,
    *,
    n_future_positions: int,
    n_sink: int,
    use_covariance: bool,
    sinks_share: bool = True,
) -> jax.Array:
    """Return the normalised expected attention of each token, float32 `[B, K, T]`."""
    batch, length, kv_heads, head_dim = prompt.keys.shape
    index = jnp.arange(length, dtype=jnp.int32)[None]
    compared = index < prompt.lengths[:, None]
    if not sinks_share:
        # A prompt of nothing but sinks still has a softmax.
        compared &= index >= jnp.minimum(n_sink, prompt.lengths - 1)[:, None]
    mean, covariance = _statistics(prompt, n_sink)
    ahead = (
        prompt.lengths[:, None] + jnp.arange(n_future_positions, dtype=jnp.int32)[None]
    )
    angles = ahead[..., None].astype(jnp.float32) * prompt.frequencies[None, None]
    cos, sin = (f(angles).mean(1)[:, None] for f in (jnp.cos, jnp.sin))  # [B, 1, H / 2]

    keys = prompt.keys.astype(jnp.float32)
    groups = prompt.queries.shape[2] // kv_heads
    shape = (batch, kv_heads, groups)
    mean = turn(mean, cos, sin).reshape(*shape, head_dim)
    logits = prompt.scale * jnp.einsum("btkh,bkgh->bkgt", keys, mean)
    if use_covariance:
        # R C R^T: turn the columns, then the rows.
        cos, sin = cos[:, :, None], sin[:, :, None]
        covariance = turn(covariance, cos, sin).swapaxes(2, 3)
        covariance = turn(covariance, cos, sin).reshape(*shape, head_dim, head_dim)
        spread = jnp.einsum("btkh,bkghi->bkgti", keys, covariance)
        quadratic = jnp.einsum("bkgti,btki->bkgt", spread, keys)
        logits += prompt.scale**2 / 2 * quadratic
    logits = jnp.where(compared[:, None, None], logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1).mean(2)


def _statistics(prompt, n_sink):
    """Return mean `[B, N, H]` and covariance `[B, N, H, H]` of queries turned back."""
    batch, length, _, _ = prompt.queries.shape
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    queries = rotate(prompt.queries.astype(jnp.float32), -index, prompt.frequencies)
    # A prompt of nothing but sinks still has statistics.
    first = jnp.minimum(n_sink, prompt.lengths - 1)[:, None]
    counts = (index >= first) & (index < prompt.lengths[:, None])
    ones = counts.astype(jnp.float32)
    weights = ones / ones.sum(1, keepdims=True)  # [B, T]
    mean = jnp.einsum("bt,btnh->bnh", weights, queries)
    centred = jnp.where(counts[..., None, None], queries - mean[:, None], 0.0)
    covariance = jnp.einsum("bt,btnh,btni->bnhi", weights, centred, centred)
    return mean, covariance
