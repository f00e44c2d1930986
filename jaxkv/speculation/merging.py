"""Many possible continuations of a text, merged into one tree of drafts.

A sequence here is a possible continuation. Equal beginnings of sequences become one
node of the tree.

Axis letters: `B` batch, `Q` sequences, `R` their length.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkv.trees import DraftTree, below_root


class Sequences(NamedTuple):
    """Possible continuations.

    Attributes:
      tokens: int32 `[B, Q, R]`.
      there: bool `[B, Q, R]`; where false, all later ones of the sequence are too.
      kinds: int32 `[B, Q, R]`, indices into `trees.KINDS`.
      copied: bool `[B, Q]`: whether the sequence occurs in the pool. Only these are
        counted, and they come first.
    """

    tokens: jax.Array
    there: jax.Array
    kinds: jax.Array
    copied: jax.Array


def merge(
    newest: jax.Array, sequences: Sequences, *, nodes: int, main: int | None = None
) -> DraftTree:
    """Merge sequences into a tree, equal beginnings being one node.

    Args:
      newest: int32 `[B]`, the token at the root.
      sequences: the latest first; it gives a node its kind.
      nodes: of the tree, without the root. The most frequent ones are kept; of equally
        frequent ones the shallower, then the later occurrence.
      main: how many copied nodes come before those that only a sequence which is not
        copied has; None is all of them.

    Returns:
      The trees; parents come before their children.
    """
    batch, number, length = sequences.tokens.shape
    first, count = _prefixes(sequences)
    order = jnp.arange(number, dtype=jnp.int32)[None, :, None]
    is_node = sequences.there & (first == order)
    depth = jnp.arange(length, dtype=jnp.int32)[None, None]
    identity = depth * number + order  # [1, Q, R]
    size = length * number
    # Less is better, and no two are equal: frequent, then shallow, then late.
    key = (number - count) * size + identity
    never = jnp.iinfo(jnp.int32).max
    if main is not None:
        frequent = _ranks(jnp.where(is_node & (count > 0), key, never))
        own = jnp.take_along_axis(frequent, first, axis=1)
        # A node's ancestors are the earlier tokens of its own sequence.
        kept = jnp.cumsum((count > 0) & (own >= main), axis=2, dtype=jnp.int32) == 0
        group = jnp.where(count > 0, jnp.where(kept, 0, 2), jnp.where(kept, 1, 3))
        key += group * (number + 1) * size
    rank = _ranks(jnp.where(is_node, key, never))

    # Of each rank there is one node at most, so that a sum looks it up.
    wanted = jnp.arange(nodes, dtype=jnp.int32)[None, :, None]
    hit = jnp.where(is_node, rank, -1).reshape(batch, 1, size) == wanted
    index = jnp.arange(size, dtype=jnp.int32)[None, None]
    chosen = jnp.where(hit, index, 0).sum(-1, dtype=jnp.int32)  # [B, nodes], into Q * R
    valid = hit.any(-1)
    sequence, at = chosen // length, chosen % length
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    above = first[rows, sequence, jnp.maximum(at - 1, 0)]
    parent = jnp.where(at > 0, 1 + rank[rows, above, jnp.maximum(at - 1, 0)], 0)
    return below_root(
        newest,
        tokens=jnp.where(valid, sequences.tokens[rows, sequence, at], 0),
        parents=jnp.where(valid, parent, 0),
        depths=jnp.where(valid, at + 1, 1),
        valid=valid,
        kinds=jnp.where(valid, sequences.kinds[rows, sequence, at], 0),
    )


def _prefixes(sequences):
    """Return of each beginning its first sequence and how many copied ones have it.

    Both int32 `[B, Q, R]`; at `[b, q, r]` they speak of the first `r + 1` tokens of
    sequence `q`.
    """
    tokens, there = sequences.tokens, sequences.there
    number, length = tokens.shape[1:]
    running: Any = True
    common: Any = 0
    for r in range(length):  # of elementwise operations, which become one
        mine, held = tokens[..., r], there[..., r]
        running &= (mine[:, :, None] == mine[:, None]) & held[:, :, None]
        running &= held[:, None]
        common += running.astype(jnp.int32)  # [B, Q, Q], equal tokens from the first on
    depth = jnp.arange(length, dtype=jnp.int32)[None, None, :, None]
    same = common[:, :, None] > depth  # [B, Q, R, Q]
    order = jnp.arange(number, dtype=jnp.int32)[None, None, None]
    first = jnp.where(same, order, number - 1).min(-1)
    copied = same & sequences.copied[:, None, None]
    return first, copied.sum(-1, dtype=jnp.int32)


def _ranks(key):
    """Return how many keys of the row are less than each, by comparing all pairs."""
    flat = key.reshape(key.shape[0], -1)
    ranks = (flat[:, None] < flat[:, :, None]).sum(-1, dtype=jnp.int32)
    return ranks.reshape(key.shape)
