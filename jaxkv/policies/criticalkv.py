"""CriticalKV: weigh scores by what a value writes into the residual stream.

Feng et al., arXiv 2502.03805. Axis letters: `B` batch, `N` query heads, `K` key/value
heads, `T` tokens, `H` head size, `D` hidden size, `L` tokens that are scored.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
from annotated_types import Ge, Le, Lt

from jaxkv.policies.base import Prompt, Ranking
from jaxkv.policies.wrapping import Wrapper

_CHUNK = 1024  # tokens whose projections are held at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticalKV(Wrapper):
    """Keep what scores high, then what scores high times the norm of its output.

    Feng et al., "Identify Critical KV Cache in LLM Inference from an Output
    Perturbation Perspective" (arXiv 2502.03805, section 4 and algorithm 1): of a head's
    budget, the share `first_stage` goes to the highest scores `S(j)` of the policy
    within; the rest to the highest `(S(j) + epsilon) ||W_o v_j||_1` of all others.
    Norms are averaged over the query heads of a key/value head. Around `AdaKV`, heads
    have the budgets that `AdaKV` gives them.

    Deviation: what the policy within keeps whatever it scores is kept here as well,
    where the authors' code may drop it in the second stage. With `ExpectedAttention`
    take `use_value_norm=false`, or values count twice.

    Attributes:
      policy: any policy of the prompt that scores tokens.
      epsilon: see above.
      first_stage: share of the budget that goes to the first stage; at least one token
        does, unless the share is 0.
    """

    epsilon: Annotated[float, Ge(0), Lt(math.inf)] = 1e-4
    first_stage: Annotated[float, Ge(0), Le(1)] = 0.5
    reads_output = True

    def rank(self, prompt: Prompt, *, budget: int) -> Ranking:
        """Return infinity for the first stage, and weighted scores for the second."""
        scores, keep = self.within.rank(prompt, budget=budget)
        norms = output_norms(prompt)
        if scores.shape[1] == norms.shape[1]:  # selection is by query head
            norms = norms[:, :, : scores.shape[2]]
        else:
            groups = norms.shape[1] // scores.shape[1]
            norms = norms.reshape(*scores.shape[:2], groups, -1).mean(2)
            norms = norms[:, :, : scores.shape[2]]
        index = jnp.arange(scores.shape[2], dtype=jnp.int32)[None]
        real = (index < prompt.candidates[:, None])[:, None]
        scores = jnp.where(real, scores, -jnp.inf)
        first = jnp.floor(keep.astype(jnp.float32) * self.first_stage)
        first = jnp.maximum(first, 1.0 if self.first_stage > 0 else 0.0)
        size = min(budget, scores.shape[2])
        _, best = jax.lax.top_k(scores, size)
        chosen = jnp.arange(size, dtype=jnp.float32)[None, None] < first[..., None]
        chosen = jnp.broadcast_to(chosen, best.shape)
        taken = _scatter(chosen, best, scores.shape[2]) | (scores == jnp.inf)
        weighted = (jnp.where(real, scores, 0.0) + self.epsilon) * norms
        weighted = jnp.where(real, weighted, -jnp.inf)
        return Ranking(jnp.where(taken, jnp.inf, weighted), keep)


def _scatter(chosen, index, length):
    """Return bool `[B, heads, L]`, true at the indices that are chosen."""
    batch, heads, _ = index.shape
    where = (
        jnp.arange(batch, dtype=jnp.int32)[:, None, None],
        jnp.arange(heads, dtype=jnp.int32)[None, :, None],
        index,
    )
    return jnp.zeros((batch, heads, length), bool).at[where].set(chosen)


def output_norms(prompt: Prompt, *, order: int = 1) -> jax.Array:
    """Return `||W_o v_j||` of each query head and token, float32 `[B, N, T]`.

    Args:
      prompt: of one layer, with `output`.
      order: of the norm, 1 or 2.

    Raises:
      ValueError: the prompt has no output projection.
    """
    output = prompt.output
    if output is None:
        raise ValueError(
            "output_norms: the prompt has no output projection; give Prompt(output=)."
        )
    batch, length, kv_heads, head_dim = prompt.values.shape
    heads = output.shape[0]
    chunk = min(_CHUNK, length)
    padding = ((0, 0), (0, -length % chunk), (0, 0), (0, 0))
    values = jnp.pad(prompt.values, padding)
    chunks = values.reshape(batch, -1, chunk, kv_heads, head_dim).swapaxes(0, 1)

    def of_head(head):
        of = head // (heads // kv_heads)
        weight = output[head].astype(jnp.float32)  # [H, D]

        def of_chunk(values):
            own = jax.lax.dynamic_index_in_dim(values, of, axis=2, keepdims=False)
            written = own.astype(jnp.float32) @ weight  # [B, chunk, D]
            return jnp.linalg.norm(written, ord=order, axis=-1)

        return jax.lax.map(of_chunk, chunks)  # [chunks, B, chunk]

    norms = jax.lax.map(of_head, jnp.arange(heads, dtype=jnp.int32))
    return norms.transpose(2, 0, 1, 3).reshape(batch, heads, -1)[..., :length]
