"""Which path of a tree becomes output, given what the network says at each node.

Axis letters: `B` batch, `T` nodes of a tree, `V` vocabulary, `E` stop ids.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxkv.sampling import Greedy, Sampler, pick_next
from jaxkv.speculation import contract
from jaxkv.speculation.rules import Rule, View
from jaxkv.trees import DraftTree


class Verdict(NamedTuple):
    """What passes.

    Attributes:
      picks: int32 `[B, T]`, the token that plain decoding chooses after each node; -1
        at nodes that drawing has not reached.
      end: int32 `[B]`, the last node of the longest path that passes.
      accepted: int32 `[B]`, its depth.
    """

    picks: jax.Array
    end: jax.Array
    accepted: jax.Array


def decide(
    logits: jax.Array,
    tree: DraftTree,
    above: jax.Array,
    stop_ids: jax.Array,
    *,
    rule: Rule,
    sampler: Sampler,
    position: jax.Array,
    rngs: jax.Array,
    seen: jax.Array | None,
    running: jax.Array,
) -> Verdict:
    """Choose the longest path that passes; of equals, the likeliest.

    Args:
      logits: float32 `[B, T, V]`, of the token after each node.
      tree: the drafts.
      above: bool `[B, T, T]`, from `trees.ancestors`.
      stop_ids: int32 `[E]`, or `[B, E]`, of each row.
      rule: static.
      sampler: static; greedy if the rule is lossy.
      position: int32 `[B]`, of the root.
      rngs: PRNG keys `[B]`.
      seen: bool `[B, V]` for the repetition penalty, or None.
      running: bool `[B]`; what is said of the other rows means nothing.
    """
    if rule.exact and sampler != Greedy():
        picks = _walk(logits, tree, sampler, position, rngs, seen, running)
    else:
        picks = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if rule.exact:
        ok = tree.tokens == jnp.take_along_axis(picks, tree.parents, axis=1)
        merit = jnp.zeros(picks.shape, jnp.float32)
    else:
        viewed = view(logits, tree, picks, stop_ids)
        ok = contract.passes(rule, viewed)
        merit = jnp.log(jnp.maximum(viewed.probability, 1e-30))
    return Verdict(picks, *_longest(tree, above, ok, merit))


def view(
    logits: jax.Array, tree: DraftTree, picks: jax.Array, stop_ids: jax.Array
) -> View:
    """Return what the network says of each drafted token.

    Args:
      logits: float32 `[B, T, V]`, of the token after each node.
      tree: the drafts.
      picks: int32 `[B, T]`, what plain decoding chooses after each node.
      stop_ids: int32 `[E]`, or `[B, E]`, of each row; those outside the vocabulary,
        such as -1, are none.

    Returns:
      The view, from each node's parent on its token.
    """
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    total = jax.nn.logsumexp(logits, axis=-1)  # [B, T], by parent
    top = logits.max(-1)
    centred = logits - total[..., None]
    entropy = -jnp.where(logits > -jnp.inf, jnp.exp(centred) * centred, 0.0).sum(-1)
    real = (stop_ids >= 0) & (stop_ids < logits.shape[-1])
    real = real[:, None] if real.ndim == 2 else real[None, None]
    at = stop_ids[:, None] if stop_ids.ndim == 2 else stop_ids[None, None]
    at = jnp.broadcast_to(jnp.maximum(at, 0), (*logits.shape[:2], at.shape[-1]))
    stops = jnp.take_along_axis(logits, at, axis=-1, mode="clip")
    stops = jnp.where(real, stops, -jnp.inf).max(-1)
    own = logits[rows, tree.parents, tree.tokens]

    def parent(x):
        return jnp.take_along_axis(x, tree.parents, axis=1)

    # Only TopK asks for the rank; for the others the compiler drops this line.
    rank = (logits[rows, tree.parents] > own[..., None]).sum(-1, dtype=jnp.int32)
    return View(
        chosen=tree.tokens == parent(picks),
        probability=jnp.exp(own - parent(total)),
        highest=jnp.exp(parent(top - total)),
        entropy=parent(entropy),
        rank=rank,
        stop=jnp.exp(parent(stops - total)),
        vocabulary=logits.shape[-1],
    )


def _walk(logits, tree, sampler, position, rngs, seen, running):
    """Pick at the root, go to the child that was picked, and so on: int32 `[B, T]`.

    One node per row at a time, because drawing at every node of a tree would cost more
    than the network, and because a penalty must know the tokens on the way. Nodes
    that are not reached hold -1.
    """
    rows = jnp.arange(tree.tokens.shape[0], dtype=jnp.int32)

    def step(carry):
        node, going, picks, seen = carry
        next_ = position + tree.depths[rows, node] + 1
        token = pick_next(sampler, logits[rows, node], rngs, next_, seen)
        picks = picks.at[rows, jnp.where(going, node, picks.shape[1])].set(
            token, mode="drop"
        )
        if seen is not None:
            seen = seen.at[rows, token].max(going)
        child = tree.valid & (tree.parents == node[:, None])
        child &= (tree.tokens == token[:, None]) & (tree.depths > 0)
        going &= child.any(-1)
        node = jnp.where(going, jnp.argmax(child, axis=-1).astype(jnp.int32), node)
        return node, going, picks, seen

    root = jnp.zeros(rows.shape, tree.parents.dtype)
    picks = jnp.full(tree.tokens.shape, -1, jnp.int32)
    carry = (root, running, picks, seen)
    return jax.lax.while_loop(lambda c: c[1].any(), step, carry)[2]


def _longest(tree, above, ok, merit):
    """Return the end of the longest path that passes, and its depth, int32 `[B]`.

    Of equally long ones, the one whose tokens are likeliest together.
    """
    is_root = jnp.arange(ok.shape[1], dtype=jnp.int32)[None] == 0
    ok = (ok & tree.valid) | is_root
    whole = ~(above & ~ok[:, None]).any(-1)
    reached = jnp.where(whole, tree.depths, -1)
    accepted = reached.max(-1)
    merit = jnp.where(is_root, 0.0, merit)
    total = jnp.where(above, merit[:, None], 0.0).sum(-1)
    best = jnp.where(reached == accepted[:, None], total, -jnp.inf)
    return jnp.argmax(best, axis=-1).astype(jnp.int32), accepted
