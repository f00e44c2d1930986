"""AdaKV: heads of a layer share its budget by what their tokens score.

Feng et al., arXiv 2407.11550. Axis letters: `B` batch, `K` heads of the state, `L`
tokens that are scored, `C` the most tokens that a head may keep.
"""

import dataclasses
import math
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le, Lt

from jaxkv.policies.base import Prompt, Ranking
from jaxkv.policies.expected_attention import ExpectedAttention
from jaxkv.policies.snapkv import SnapKV
from jaxkv.policies.wrapping import Wrapper

LOWEST = float(np.finfo(np.float32).min)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaKV(Wrapper):
    """Give the layer's budget to the best tokens of all its heads together.

    Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for
    Efficient LLM Inference" (arXiv 2407.11550, section 3 and algorithm 1): a layer of
    `K` heads keeps the `K x budget` highest scores of the policy within, whichever head
    they are of; each head keeps at least the share `safeguard` of its own budget.
    That is kvpress' reading, with which ours agrees index by index. What a policy keeps
    whatever it scores, SnapKV's window, counts in the share: with budgets not far above
    the window, nothing else of a head is safe. The authors' code (`share="mixed"`)
    leaves it out of all shares, and mixes: of other tokens a head keeps `safeguard`
    times an equal split, and `1 - safeguard` times what it wins. Each head's share is
    rounded there, so that a layer may keep a few tokens more or less than its budget;
    here the largest fractions are rounded up, as many as spend the budget.

    Slots: all heads of a state have equally many, so that shapes are static. A head
    has `most` times the budget, fills as many as it is given, and leaves the others
    free: nothing reads them, but they are there. The cache so takes `most` times the
    bytes of an equal split, while it holds as many tokens. A head that asks for more
    than its slots gets these, and other heads the rest; with `most` at the number of
    key/value heads none ever does, as in the paper, whose storage has no slots.
    A decode policy that evicts is refused, since each head would fill up its slots.

    Attributes:
      policy: any policy of the prompt that scores tokens.
      safeguard: share of its budget that each head keeps in any case, at least one
        token unless it is 0 or shares are mixed.
      share: see above.
      most: the most that a head may keep, in budgets.
    """

    safeguard: Annotated[float, Ge(0), Le(1)] = 0.2
    share: Literal["least", "mixed"] = "least"
    most: Annotated[float, Ge(1), Lt(math.inf)] = 2.0
    same_budgets = False

    @classmethod
    def paper(cls, **options) -> "AdaKV":
        """Return the authors' code, around SnapKV: shares are mixed."""
        return cls(**dict[str, Any](share="mixed", policy=SnapKV()) | options)

    @classmethod
    def board(cls, **options) -> "AdaKV":
        """Return the best single pass on kvpress' board: around expected attention."""
        theirs = dict(policy=ExpectedAttention.kvpress())
        return cls(**dict[str, Any](theirs) | options)

    @property
    def head_share(self) -> float:  # type: ignore[override]
        """The most that a head may keep, in budgets of its layer."""
        return self.most

    def layer_budgets(self, budget: int, num_layers: int) -> tuple[int, ...]:
        """Return the most that a head of each layer keeps."""
        within = self.within.layer_budgets(budget, num_layers)
        return tuple(int(most * self.most) for most in within)

    def rank(self, prompt: Prompt, *, budget: int) -> Ranking:
        """Return the scores within, and what each head keeps."""
        scores, keep = self.within.rank(prompt, budget=budget)
        keep = jnp.broadcast_to(keep, scores.shape[:2])
        budgets = head_budgets if self.share == "least" else mixed_budgets
        shared = budgets(
            *(scores, prompt.candidates, keep),
            safeguard=self.safeguard,
            most=self.most,
            bound=min(budget, scores.shape[2]),
        )
        return Ranking(scores, shared)


def head_budgets(
    scores: jax.Array,
    lengths: jax.Array,
    keep: jax.Array,
    *,
    safeguard: float,
    most: float,
    bound: int,
) -> jax.Array:
    """Return what each head keeps if its layer keeps its best, int32 `[B, K]`.

    Args:
      scores: float32 `[B, K, L]`.
      lengths: int32 `[B]`.
      keep: int32 `[B, K]`, equal shares.
      safeguard: see `AdaKV`.
      most: see `AdaKV`.
      bound: `C`, static.

    Returns:
      Numbers whose sum over the heads is that of `keep`, or all tokens there are.
      Where scores of two heads are equal, the first head gets its token.
    """
    batch, _, length = scores.shape
    index = jnp.arange(length, dtype=jnp.int32)[None]
    real = (index < lengths[:, None])[:, None]
    scores = jnp.where(real, jnp.maximum(scores, LOWEST), -jnp.inf)
    best, _ = jax.lax.top_k(scores, bound)  # [B, K, C]
    rank = jnp.arange(bound, dtype=jnp.int32)[None, None]
    share = keep.astype(jnp.float32)[..., None]
    safe = jnp.floor(share * safeguard).astype(jnp.int32)
    safe = jnp.maximum(safe, 1 if safeguard > 0 else 0)
    limit = jnp.floor(share * most).astype(jnp.int32)
    best = jnp.where((rank < safe) & (best > -jnp.inf), jnp.inf, best)
    best = jnp.where(rank < limit, best, -jnp.inf)
    order = jnp.argsort(-best.reshape(batch, -1), axis=-1, stable=True)
    place = jnp.argsort(order, axis=-1).astype(jnp.int32)
    total = jnp.minimum(keep, lengths[:, None]).sum(1, dtype=jnp.int32)
    chosen = place < total[:, None]
    return chosen.reshape(best.shape).sum(-1, dtype=jnp.int32)


def mixed_budgets(
    scores: jax.Array,
    lengths: jax.Array,
    keep: jax.Array,
    *,
    safeguard: float,
    most: float,
    bound: int,
) -> jax.Array:
    """Return what each head keeps if its share is mixed, int32 `[B, K]`.

    Args:
      scores: float32 `[B, K, L]`; infinity is kept in any case, beside the shares.
      lengths: see `head_budgets`.
      keep: see `head_budgets`.
      safeguard: weight of an equal split.
      most: see `AdaKV`.
      bound: see `head_budgets`.

    Returns:
      Numbers whose sum over the heads is that of `keep`, or all tokens there are. Of
      equal fractions that of the first head is rounded up.
    """
    index = jnp.arange(scores.shape[2], dtype=jnp.int32)[None]
    anyway = jnp.isposinf(scores) & (index < lengths[:, None])[:, None]
    apart = anyway.sum(-1, dtype=jnp.int32)
    base = jnp.maximum(keep - apart, 0)
    won = head_budgets(
        *(jnp.where(anyway, -jnp.inf, scores), lengths, base),
        safeguard=0.0,
        most=most,
        bound=bound,
    )
    more = (won - base).astype(jnp.float32) * (1.0 - safeguard)
    whole = jnp.floor(more)
    order = jnp.argsort(whole - more, axis=-1, stable=True)
    place = jnp.argsort(order, axis=-1).astype(jnp.float32)
    left = jnp.round((more - whole).sum(-1, keepdims=True))
    return apart + base + jnp.where(place < left, whole + 1, whole).astype(jnp.int32)
