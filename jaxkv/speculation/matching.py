"""Where the text so far has occurred before: n-gram matching inside the loop.

A row's text is its prompt and its output without a gap, so that the token at position
`p` lies at index `p`. The *pool* is the span of the text that may be copied from. An
*end* is the index of the last token of an occurrence; the token after it is the first
one that is copied.

Axis letters: `B` batch, `W` width of the text, `M` occurrences.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

NONE = -1  # in ends: no occurrence


class Context(NamedTuple):
    """What drafts are made from.

    Attributes:
      text: int32 `[B, W]`; what lies beyond `position` is unspecified.
      position: int32 `[B]`, of the newest token.
      prompt: int32 `[B]`, tokens of the prompts.
      pool: int32 `[B, 2]`, first index of the pool and the one after its last.
      likeliest: int32 `[B, P, 3]`, the three tokens that the network held likeliest at
        each position of the prompt, given the tokens before it; None if nobody asked.
        What it says of position 0 means nothing.
    """

    text: jax.Array
    position: jax.Array
    prompt: jax.Array
    pool: jax.Array
    likeliest: jax.Array | None


def with_output(context: Context) -> Context:
    """Return the context with a pool that goes on to the newest token."""
    end = jnp.maximum(context.pool[:, 1], context.position + 1)
    return context._replace(pool=jnp.stack([context.pool[:, 0], end], axis=1))


def match_lengths(context: Context, *, longest: int) -> jax.Array:
    """Count the trailing tokens of the text that equal those before each index.

    Args:
      context: the text and its pool.
      longest: counts stop here.

    Returns:
      int32 `[B, W]`: at `e`, the largest `n <= longest` such that the `n` tokens up to
      `e` lie in the pool and equal the newest `n` tokens; 0 where nothing in the
      pool follows `e`, and at the newest token itself.
    """
    text, position = context.text, context.position
    width = text.shape[1]
    back = position[:, None] - jnp.arange(longest, dtype=jnp.int32)[None]
    newest = jnp.take_along_axis(text, jnp.maximum(back, 0), axis=1)
    newest = jnp.where(back < 0, -2, newest)  # equals nothing, not even the padding
    padded = jnp.pad(text, ((0, 0), (longest, 0)), constant_values=-1)
    running = jnp.ones(text.shape, bool)
    length = jnp.zeros(text.shape, jnp.int32)
    for i in range(longest):
        shifted = jax.lax.slice_in_dim(padded, longest - i, longest - i + width, axis=1)
        running &= shifted == newest[:, i : i + 1]
        length += running.astype(jnp.int32)
    end = jnp.arange(width, dtype=jnp.int32)[None]
    first, after = context.pool[:, :1], context.pool[:, 1:]
    length = jnp.minimum(length, end - first + 1)
    usable = (end >= first) & (end + 1 < after) & (end < position[:, None])
    return jnp.where(usable, length, 0)


def longest_matches(
    context: Context,
    *,
    longest: int,
    shortest: int,
    most: int,
    order: Literal["latest", "earliest"],
) -> jax.Array:
    """Return where the longest match occurs, int32 ends `[B, M]`, `NONE` beyond.

    Args:
      context: the text and its pool.
      longest: tokens to compare.
      shortest: a match of fewer tokens is none.
      most: `M`.
      order: which occurrences come first.
    """
    lengths = match_lengths(context, longest=longest)
    best = lengths.max(axis=1, keepdims=True)
    hits = (lengths == best) & (best >= shortest)
    # The k-th hit is the first index up to which k hits have been counted. Comparing
    # all counts with all k costs one pass and no sort.
    counts = jnp.cumsum(hits, axis=1, dtype=jnp.int32)
    total = counts[:, -1:]
    rank = jnp.arange(most, dtype=jnp.int32)[None]
    wanted = total - rank if order == "latest" else rank + 1
    ends = (counts[:, None] < wanted[..., None]).sum(-1, dtype=jnp.int32)
    return jnp.where((wanted >= 1) & (wanted <= total), ends, NONE)


def continuations(
    context: Context, ends: jax.Array, *, length: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what follows each occurrence.

    Args:
      context: the text and its pool.
      ends: int32 `[B, M]`.
      length: `R`.

    Returns:
      Tokens int32 `[B, M, R]`, whether each one lies in the pool, and its index.
    """
    index = ends[..., None] + 1 + jnp.arange(length, dtype=jnp.int32)[None, None]
    there = (ends[..., None] != NONE) & (index < context.pool[:, 1, None, None])
    clipped = jnp.clip(index, 0, context.text.shape[1] - 1)
    rows = jnp.arange(context.text.shape[0], dtype=jnp.int32)[:, None, None]
    return jnp.where(there, context.text[rows, clipped], 0), there, index
