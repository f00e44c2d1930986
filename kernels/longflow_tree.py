"""Attention of a tree of drafted tokens over a cache that LongFlow evicts from.

A node must see what its ancestors' steps would have left: each of them writes into a
slot and chooses the one that the next overwrites, from its own attention. So the logits
of all nodes against all slots are computed once, the tree is walked from the root on
these logits alone, depth by depth, and the values are multiplied once at the end. Keys
and values are read once, and nothing is written.

Axis letters: `B` batch, `T` nodes, `N` query heads, `K` key/value heads, `G` query
heads per key/value head, `S` slots, `H` head size, `D` depth of the deepest node.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxkv.kernels import dispatch, longflow, tree_attention
from jaxkv.kernels.scores import Score, value_norms
from jaxkv.kernels.shapes import check_groups, check_shape
from jaxkv.kernels.victims import choose_victim

Implementation = Literal["reference", "xla"]


class LongFlowTreeOutput(NamedTuple):
    """What LongFlow would do on the way to each node.

    Attributes:
      out: `[B, T, N, H]`, in the dtype of the query.
      slots: int32 `[B, K, T]`, the slot that each node is written to.
      targets: int32 `[B, K, T]`, the slot that a token after each node overwrites.
    """

    out: jax.Array
    slots: jax.Array
    targets: jax.Array


def longflow_tree(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    norms: jax.Array,
    target: jax.Array,
    position: jax.Array,
    oldest: jax.Array,
    parents: jax.Array,
    depths: jax.Array,
    *,
    n_recent: int,
    depth: int,
    scale: float,
    score: Score = "l1",
    shared: bool = True,
    implementation: Implementation | None = None,
) -> LongFlowTreeOutput:
    """Do `longflow.longflow_attention` along every path of a tree.

    Args:
      query: `[B, T, N, H]`, rotated.
      key: `[B, T, K, H]` of the nodes, rotated.
      value: `[B, T, K, H]` of the nodes.
      keys: `[B, K, S, H]`.
      values: `[B, K, S, H]`; free slots of both may hold anything, NaN included.
      positions: int32 `[B, K, S]`, negative where a slot is free.
      norms: float32 `[B, K, S]`, of the values; see `longflow_attention`.
      target: int32 `[B, K]`, the slot that the root overwrites.
      position: int32 `[B]` of the root; rows of -1 give what means nothing.
      oldest: int32 `[B]`, least position that may be evicted.
      parents: int32 `[B, T]`; the root's is 0.
      depths: int32 `[B, T]`; the root's is 0.
      n_recent: how many of the newest tokens may not be evicted.
      depth: `D`, static.
      scale: factor on the logits.
      score: see `longflow_attention`; "deletion" needs each output before the first
        victim, and is not done here.
      shared: one victim for all heads of a row, or one per key/value head.
      implementation: "reference" (float32, node by node), "xla", or None for the best
        one that can run.

    Returns:
      The output, and the slots.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: the score is "deletion".
    """
    where = "longflow_tree"
    sizes = check_shape(
        where,
        query=(query, "B T N H"),
        key=(key, "B T K H"),
        value=(value, "B T K H"),
        keys=(keys, "B K S H"),
        values=(values, "B K S H"),
        positions=(positions, "B K S"),
        norms=(norms, "B K S"),
        target=(target, "B K"),
        position=(position, "B"),
        oldest=(oldest, "B"),
        parents=(parents, "B T"),
        depths=(depths, "B T"),
    )
    check_groups(where, sizes["N"], sizes["K"])
    if score == "deletion":
        raise NotImplementedError(
            f'{where}: score="deletion" cannot be verified in one pass; use another '
            "score, or decode without drafts."
        )
    arguments = (
        *(query, key, value, keys, values, positions, norms, target, position),
        *(oldest, parents, depths),
    )
    options = dict(
        n_recent=n_recent, depth=depth, scale=scale, score=score, shared=shared
    )
    run = dispatch.resolve(where, implementation or "xla", _RUNS)
    return run(*arguments, **options)


def _reference(
    query,
    key,
    value,
    keys,
    values,
    positions,
    norms,
    target,
    position,
    oldest,
    parents,
    depths,
    *,
    n_recent,
    depth,
    scale,
    score,
    shared,
):
    """Keep a copy of the cache for every node, as its parent's step has left it."""
    del depth
    rows = jnp.arange(query.shape[0])
    left, outs, slots = [], [], []
    for node in range(query.shape[1]):
        cache = (keys, values, positions, norms, target)
        if node:
            stacked = (jnp.stack(x, axis=1) for x in zip(*left, strict=True))
            cache = tuple(x[rows, parents[:, node]] for x in stacked)
        slots.append(cache[4])
        here = position + depths[:, node]
        out, *after = longflow.longflow_attention(
            *(query[:, node], key[:, node], value[:, node], *cache),
            *(here, oldest, here - n_recent),
            scale=scale,
            score=score,
            shared=shared,
            implementation="reference",
        )
        outs.append(out)
        left.append(tuple(after))
    targets = jnp.stack([cache[4] for cache in left], axis=2)
    return LongFlowTreeOutput(jnp.stack(outs, 1), jnp.stack(slots, 2), targets)


class _Walk(NamedTuple):
    """What stays the same while the tree is walked.

    `path` is int32 `[B, T, D + 1]`, the ancestors of each node by depth, itself
    included; `on_path` says where there is one. `old` and `new` are logits against the
    slots and against the ancestors, `old_size` and `new_size` what turns a weight
    into a score.
    """

    path: jax.Array
    on_path: jax.Array
    old: jax.Array
    new: jax.Array
    old_size: jax.Array
    new_size: jax.Array


def _xla(
    query,
    key,
    value,
    keys,
    values,
    positions,
    norms,
    target,
    position,
    oldest,
    parents,
    depths,
    *,
    n_recent,
    depth,
    scale,
    score,
    shared,
):
    """Walk the depths on one set of logits; only nodes of a depth take its answer."""
    occupied = positions >= 0
    path, on_path = _paths(parents, depths, depth)
    old, new = tree_attention.logits_of(
        tree_attention.group(query, keys.shape[1]), key, keys, scale
    )
    along = jnp.broadcast_to(path[:, None, :, None], (*new.shape[:4], depth + 1))
    walk = _Walk(
        path=path,
        on_path=on_path,
        old=old,
        new=jnp.take_along_axis(new, along, axis=4),
        old_size=jnp.where(occupied, norms, 0),
        new_size=value_norms(value, score).swapaxes(1, 2),
    )
    at = jnp.broadcast_to(parents[:, None], (*target.shape, parents.shape[1]))

    def step(d, carry):
        slots, targets = carry
        now = depths[:, None] == d
        given = jnp.where(
            d == 0, target[..., None], jnp.take_along_axis(targets, at, axis=2)
        )
        slots = jnp.where(now, given, slots)
        chosen = _victims(
            walk, slots, positions, position, oldest, n_recent=n_recent, shared=shared
        )
        return slots, jnp.where(now, chosen, targets)

    nothing = jnp.zeros(at.shape, jnp.int32)
    rounds = jnp.minimum(depths.max(), depth) + 1
    slots, targets = jax.lax.fori_loop(0, rounds, step, (nothing, nothing))
    old_weights, path_weights, _ = _weights(walk, slots, occupied)
    # Back from ancestors to nodes, to multiply with each node's value.
    is_node = on_path[..., None] & (path[..., None] == jnp.arange(parents.shape[1]))
    new_weights = jnp.einsum(
        "bktgd,btdu->bktgu",
        path_weights,
        is_node.astype(jnp.float32),
        precision="highest",
    )
    out = tree_attention.combine(old_weights, new_weights, value, values, occupied)
    return LongFlowTreeOutput(out.astype(query.dtype), slots, targets)


_RUNS = {"reference": _reference, "xla": _xla}


def _paths(parents, depths, depth):
    """Return each node's ancestors by depth `[B, T, D + 1]`, and where they are."""
    order = jnp.arange(depth + 1, dtype=jnp.int32)
    node = jnp.broadcast_to(
        jnp.arange(parents.shape[1], dtype=jnp.int32), parents.shape
    )
    path = jnp.zeros((*parents.shape, depth + 1), jnp.int32)
    for _ in range(depth + 1):
        here = jnp.take_along_axis(depths, node, axis=1)
        path = jnp.where(here[..., None] == order, node[..., None], path)
        node = jnp.take_along_axis(parents, node, axis=1)
    return path, order <= depths[..., None]


def _along(x, path):
    """Look `[B, K, T]` up along paths `[B, T, D + 1]`: `[B, K, T, D + 1]`."""
    flat = path.reshape(path.shape[0], 1, -1)
    flat = jnp.broadcast_to(flat, (*x.shape[:2], flat.shape[-1]))
    return jnp.take_along_axis(x, flat, axis=2).reshape(*x.shape, path.shape[-1])


def _weights(walk, slots, occupied):
    """Return the softmax of each node over what its path has left.

    Args:
      walk: the logits.
      slots: int32 `[B, K, T]`, right for every node whose softmax is of interest and
        for its ancestors.
      occupied: bool `[B, K, S]`.

    Returns:
      Weights of the slots `[B, K, T, G, S]`, of the ancestors `[B, K, T, G, D + 1]`,
      and the ancestors' slots `[B, K, T, D + 1]`, -1 where there is none.
    """
    own = jnp.where(walk.on_path[:, None], _along(slots, walk.path), -1)
    order = jnp.arange(own.shape[-1])
    again = (own[..., :, None] == own[..., None, :]) & (order > order[:, None])
    alive = walk.on_path[:, None] & ~again.any(-1)
    overwritten = (own[..., None] == jnp.arange(occupied.shape[2])).any(3)
    old_alive = occupied[:, :, None] & ~overwritten
    old, new = tree_attention.softmax_over_both(
        walk.old, walk.new, old_alive[:, :, :, None], alive[:, :, :, None]
    )
    return old, new, own


def _victims(walk, slots, positions, position, oldest, *, n_recent, shared):
    """Return the slot that a token after each node overwrites, int32 `[B, K, T]`.

    Lays out what every node's cache would hold, slot by slot, in importance and
    position only, and asks the one function that plain decoding asks.
    """
    batch, kv_heads, nodes = slots.shape
    old, new, own = _weights(walk, slots, positions >= 0)
    importance = old.mean(axis=3) * walk.old_size[:, :, None]  # [B, K, T, S]
    mine = new.mean(axis=3) * _along(walk.new_size, walk.path)  # [B, K, T, D + 1]
    held = jnp.broadcast_to(positions[:, :, None], importance.shape)
    slot = jnp.arange(positions.shape[2])
    for d in range(own.shape[-1]):  # a later write comes after an earlier one
        here = own[..., d : d + 1] == slot
        importance = jnp.where(here, mine[..., d : d + 1], importance)
        held = jnp.where(here, position[:, None, None, None] + d, held)

    def by_node(x):  # [B, K, T, S] to [B * T, K, S]
        return x.swapaxes(1, 2).reshape(batch * nodes, *x.shape[1:2], x.shape[3])

    depth = walk.on_path.sum(-1) - 1
    newest = position[:, None] + depth - n_recent
    chosen = choose_victim(
        by_node(importance),
        by_node(held),
        jnp.repeat(oldest, nodes),
        newest.reshape(-1),
        shared=shared,
    )
    return chosen.reshape(batch, nodes, kv_heads).swapaxes(1, 2)
