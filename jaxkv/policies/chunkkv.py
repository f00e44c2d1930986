"""ChunkKV: keep whole chunks of neighbouring tokens, by any policy's scores.

Liu et al., arXiv 2502.00299. Axis letters: `B` batch, `L` tokens that are scored.
"""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge

from jaxkv.policies.base import Prompt, Ranking
from jaxkv.policies.wrapping import Wrapper

LOWEST = float(np.finfo(np.float32).min)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkKV(Wrapper):
    """Keep the chunks of the highest mean score, the same for all heads of a layer.

    Liu et al., "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient
    Long-Context LLM Inference" (arXiv 2502.00299, section 3.2 and algorithm 1): the
    prompt is cut into chunks of `chunk_length` tokens, counted from its start; a
    chunk's score is the mean over its tokens of the scores of the policy within, summed
    over the heads; the best chunks stay whole. The paper scores by the attention of a
    window as `SnapKV` does, which stays whatever it scores.

    Deviations: the last chunk that fits in part is kept in part, its first tokens, so
    that the budget is used up. The paper's reuse of one layer's choice in the next is
    left out.

    Attributes:
      policy: any policy of the prompt that scores tokens.
      chunk_length: tokens of a chunk.
      anyway: tokens that the policy within keeps whatever they score are "apart": kept,
        and left out of the mean of their chunk. Or they count as "best", one more than
        the highest score of all, and their chunks win by that, as in kvpress.
    """

    chunk_length: Annotated[int, Ge(1)] = 20
    anyway: Literal["apart", "best"] = "apart"

    @classmethod
    def kvpress(cls, **options) -> "ChunkKV":
        """Return what the kvpress library does."""
        return cls(**dict[str, Any](anyway="best") | options)

    def rank(self, prompt: Prompt, *, budget: int) -> Ranking:
        """Return the scores of the chunks, the same for all heads."""
        scores, keep = self.within.rank(prompt, budget=budget)
        chunks = chunk_scores(
            scores,
            prompt.candidates,
            chunk_length=self.chunk_length,
            best=self.anyway == "best",
        )
        keep = jnp.broadcast_to(keep, scores.shape[:2]).max(1, keepdims=True)
        return Ranking(jnp.broadcast_to(chunks, scores.shape), keep)


def chunk_scores(
    scores: jax.Array, lengths: jax.Array, *, chunk_length: int, best: bool
) -> jax.Array:
    """Return each token's score as one of its chunk, float32 `[B, 1, L]`.

    Args:
      scores: float32 `[B, heads, L]`.
      lengths: int32 `[B]`; the others do not count.
      chunk_length: see `ChunkKV`.
      best: what has an infinite score counts as one more than the highest.

    Returns:
      Infinity where a head has it, unless `best`.
    """
    batch, _, length = scores.shape
    index = jnp.arange(length, dtype=jnp.int32)
    real = (index[None] < lengths[:, None])[:, None]  # [B, 1, L]
    finite = jnp.isfinite(scores) & real
    if best:
        most = jnp.where(finite, scores, LOWEST).max((1, 2), keepdims=True)
        scores = jnp.where(scores == jnp.inf, most + 1, scores)
        finite = jnp.broadcast_to(real, scores.shape)
    total = jnp.where(finite, scores, 0.0).sum(1)  # [B, L]
    counts = finite.any(1)
    padding = ((0, 0), (0, -length % chunk_length))
    total, counts = (jnp.pad(x, padding) for x in (total, counts))
    shape = batch, -1, chunk_length
    number = counts.reshape(shape).sum(-1, dtype=jnp.int32)
    mean = total.reshape(shape).sum(-1) / jnp.maximum(number, 1).astype(jnp.float32)
    of_tokens = jnp.repeat(mean, chunk_length, axis=1)[:, None, :length]
    if best:
        return of_tokens
    always = (scores == jnp.inf).any(1, keepdims=True)
    return jnp.where(always, jnp.inf, of_tokens)
