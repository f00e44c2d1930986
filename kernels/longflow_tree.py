"""Attention of a tree of drafted tokens over a cache that LongFlow evicts from.

A node must see what its ancestors' steps would have left: each of them writes into a
slot and chooses the one that the next overwrites, from its own attention. So the logits
of all nodes against all slots are computed once, and the tree is walked from the root
on these logits alone, depth by depth. Keys and values are read once, and nothing is
written.

Axis letters: `B` batch, `T` nodes, `N` query heads, `K` key/value heads, `G` query
heads per key/value head, `S` slots, `H` head size, `D` depth of the deepest node.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxkv.kernels import dispatch, longflow, tree_attention
from jaxkv.kernels.cache import Nodes, Slots, Token
from jaxkv.kernels.longflow_tree_triton import longflow_tree_triton
from jaxkv.kernels.per_shard import DATA, MESH_AXES, devices_per_row, per_shard
from jaxkv.kernels.scores import Score, value_norms
from jaxkv.kernels.shapes import check_groups, checked
from jaxkv.kernels.victims import choose_victim

Implementation = Literal["reference", "xla", "triton", "pallas_tpu"]


class LongFlowTreeOutput(NamedTuple):
    """What LongFlow would do on the way to each node.

    Attributes:
      out: in the dtype of the query.
      slots: the slot that each node is written to.
      targets: the slot that a token after each node overwrites.
    """

    out: Float[Array, "B T N H"]
    slots: Int32[Array, "B K T"]
    targets: Int32[Array, "B K T"]


@checked
def longflow_tree(
    query: Float[Array, "B T N H"],
    nodes: Nodes,
    slots: Slots,
    oldest: Int32[Array, " B"],
    parents: Int32[Array, "B T"],
    depths: Int32[Array, "B T"],
    sink: Float[Array, " N"] | None = None,
    *,
    n_recent: int,
    depth: int,
    scale: float,
    cap: float | None = None,
    score: Score = "l1",
    shared: bool = True,
    implementation: Implementation | None = None,
) -> LongFlowTreeOutput:
    """Do `longflow.longflow_attention` along every path of a tree.

    Args:
      query: rotated.
      nodes: of the tree; rows whose root's position is -1 give what means nothing.
      slots: with norms; `slots.target` is the one that the root overwrites.
      oldest: least position that may be evicted.
      parents: of the nodes; the root's is 0.
      depths: of the nodes; the root's is 0.
      n_recent: how many of the newest tokens may not be evicted.
      depth: `D`, static.
      sink: see `decode.decode_attention`.
      scale: factor on the logits.
      cap: see `decode.decode_attention`.
      score: see `longflow_attention`; "deletion" needs each output before the first
        victim, and is not done here.
      shared: one victim for all heads of a row, or one per key/value head.
      implementation: "reference" (float32, node by node), "xla" (anywhere), "triton"
        (NVIDIA, through jax-triton), "pallas_tpu" (TPU), or None for the best one that
        can run; `choose` says which.

    Returns:
      The output, and the slots.

    Raises:
      ValueError: shapes disagree, the norms are missing, or the implementation is
        unknown.
      NotImplementedError: the score is "deletion", or a named implementation cannot run
        here.
    """
    where = "longflow_tree"
    check_groups(where, query.shape[2], slots.keys.shape[1])
    longflow.check_norms(where, slots)
    if score == "deletion":
        raise NotImplementedError(
            f'{where}: score="deletion" cannot be verified in one pass; use another '
            "score, or decode without drafts."
        )
    implementation = implementation or choose(
        jax.default_backend(), query, slots.keys, shared=shared
    )
    reason = unsupported(implementation, query, slots.keys, shared=shared)
    unable: dict[str, str] = {implementation: reason}
    run = functools.partial(
        dispatch.resolve(where, implementation, _RUNS, unable=unable),
        n_recent=n_recent,
        depth=depth,
        scale=scale,
        cap=cap,
        score=score,
        shared=shared,
        axis=MESH_AXES["K"] if shared and devices_per_row() > 1 else None,
    )
    arrays = query, nodes, slots, oldest, parents, depths, *dispatch.arrays(sink)
    return per_shard(run, longflow_tree)(*arrays)


def choose(platform: str, query, keys, *, shared: bool) -> Implementation:
    """Return the implementation that `None` stands for.

    Args:
      platform: of the device, as `jax.default_backend()` names it.
      query: `[B, T, N, H]`, or a `jax.ShapeDtypeStruct`.
      keys: `[B, K, S, H]`, likewise.
      shared: one victim for all heads of a row.
    """
    best: dict[str, Implementation] = {"gpu": "triton", "tpu": "pallas_tpu"}
    name = best.get(platform, "xla")
    if name == "triton" and dispatch.triton_unavailable():
        return "xla"
    return "xla" if unsupported(name, query, keys, shared=shared) else name


def unsupported(implementation: str, query, keys, *, shared: bool) -> str:
    """Return why an implementation cannot take these arrays, or an empty string.

    Args:
      implementation: by name.
      query: `[B, T, N, H]`; only shape and dtype are looked at.
      keys: `[B, K, S, H]`, likewise.
      shared: one victim for all heads of a row.
    """
    if implementation not in ("triton", "pallas_tpu"):
        return ""
    if shared and devices_per_row() > 1:
        return (
            "chooses from heads that are all on one device, and they lie on "
            f"{devices_per_row()}; use 'xla' or None."
        )
    if implementation == "triton":
        return tree_attention.unsupported(query, keys)
    from jaxkv.kernels import longflow_tree_tpu

    return longflow_tree_tpu.unsupported(query, keys, shared=shared)


def _reference(
    query,
    nodes,
    slots,
    oldest,
    parents,
    depths,
    sink=None,
    *,
    n_recent,
    depth,
    scale,
    cap,
    score,
    shared,
    axis,
):
    """Keep a copy of the cache for every node, as its parent's step has left it."""
    del depth
    rows = jnp.arange(query.shape[0], dtype=jnp.int32)
    outs, written = [], []
    left: list[Slots] = []

    def left_by(node):
        return jax.tree.map(lambda *x: jnp.stack(x, 1)[rows, node], *left)

    for node in range(query.shape[1]):
        if node:
            slots = left_by(parents[:, node])
        written.append(slots.target)
        here = nodes.position + depths[:, node]
        token = Token(nodes.key[:, node], nodes.value[:, node], here)
        out, after = longflow.reference(
            *(query[:, node], token, slots, oldest, here - n_recent, sink),
            scale=scale,
            cap=cap,
            score=score,
            shared=shared,
            axis=axis,
        )
        outs.append(out)
        left.append(after)
    targets = jnp.stack([after.target for after in left], axis=2)
    return LongFlowTreeOutput(jnp.stack(outs, 1), jnp.stack(written, 2), targets)


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
    sink: jax.Array | None


def _xla(
    query,
    nodes,
    slots,
    oldest,
    parents,
    depths,
    sink=None,
    *,
    n_recent,
    depth,
    scale,
    cap,
    score,
    shared,
    axis,
):
    """Walk the depths on one set of logits; only nodes of a depth take its answer."""
    keys, values, positions, target, norms = slots
    occupied = positions >= 0
    path, on_path = _paths(parents, depths, depth)
    old, new = tree_attention.logits_of(
        tree_attention.group(query, keys.shape[1]), nodes.key, keys, scale, cap
    )
    along = jnp.broadcast_to(path[:, None, :, None], (*new.shape[:4], depth + 1))
    walk = _Walk(
        path=path,
        on_path=on_path,
        old=old,
        new=jnp.take_along_axis(new, along, axis=4),
        old_size=jnp.where(occupied, norms, 0),
        new_size=value_norms(nodes.value, score).swapaxes(1, 2),
        sink=sink,
    )
    at = jnp.broadcast_to(parents[:, None], (*target.shape, parents.shape[1]))

    def step(d, carry):
        written, targets = carry
        now = depths[:, None] == d
        given = jnp.where(
            d == 0, target[..., None], jnp.take_along_axis(targets, at, axis=2)
        )
        written = jnp.where(now, given, written)
        chosen = _victims(
            *(walk, written, positions, nodes.position, oldest),
            n_recent=n_recent,
            shared=shared,
            axis=axis,
        )
        return written, jnp.where(now, chosen, targets)

    nothing = jnp.zeros(at.shape, jnp.int32)
    rounds = jnp.minimum(depths.max(), depth) + 1
    if axis is not None:  # all devices meet in every round
        rounds = jax.lax.pmax(rounds, DATA)
    written, targets = jax.lax.fori_loop(0, rounds, step, (nothing, nothing))
    old_weights, path_weights, _ = _weights(walk, written, occupied)
    new_weights = _by_node(walk, path_weights)
    out = tree_attention.combine(
        old_weights, new_weights, nodes.value, values, occupied
    )
    return LongFlowTreeOutput(out.astype(query.dtype), written, targets)


def _triton(*arguments, axis, **options):
    assert axis is None, "heads of a row lie on one device"
    return LongFlowTreeOutput(*longflow_tree_triton(*arguments, **options))


def _pallas_tpu(*arguments, axis, **options):
    from jaxkv.kernels import longflow_tree_tpu as tpu

    assert axis is None, "heads of a row lie on one device"
    return LongFlowTreeOutput(*tpu.longflow_tree_tpu(*arguments, **options))


_RUNS = {
    "reference": _reference,
    "xla": _xla,
    "triton": _triton,
    "pallas_tpu": _pallas_tpu,
}


def _paths(parents, depths, depth):
    """Return each node's ancestors by depth `[B, T, D + 1]`, and where they are."""
    order = jnp.arange(depth + 1, dtype=jnp.int32)[None, None]
    node = jnp.broadcast_to(
        jnp.arange(parents.shape[1], dtype=jnp.int32), parents.shape
    )
    path = jnp.zeros((*parents.shape, depth + 1), jnp.int32)
    for _ in range(depth + 1):
        here = jnp.take_along_axis(depths, node, axis=1)
        path = jnp.where(here[..., None] == order, node[..., None], path)
        node = jnp.take_along_axis(parents, node, axis=1)
    return path, order <= depths[..., None]


def _by_node(walk, weights):
    """Turn weights of ancestors `[B, K, T, G, D + 1]` into `[B, K, T, G, T]`."""
    nodes = jnp.arange(walk.path.shape[1], dtype=jnp.int32)[None, None, None]
    is_node = walk.on_path[..., None] & (walk.path[..., None] == nodes)
    return jnp.einsum(
        "bktgd,btdu->bktgu", weights, is_node.astype(jnp.float32), precision="highest"
    )


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
    order = jnp.arange(own.shape[-1], dtype=jnp.int32)
    again = own[..., :, None] == own[..., None, :]
    again &= (order[None, :] > order[:, None])[None, None, None]
    alive = walk.on_path[:, None] & ~again.any(-1)
    slot = jnp.arange(occupied.shape[2], dtype=jnp.int32)[None, None, None, None]
    overwritten = (own[..., None] == slot).any(3)
    old_alive = occupied[:, :, None] & ~overwritten
    old, new, _ = tree_attention.softmax_over_both(
        *(walk.old, walk.new, old_alive[:, :, :, None], alive[:, :, :, None]),
        sink=walk.sink,
    )
    return old, new, own


def _victims(walk, slots, positions, position, oldest, *, n_recent, shared, axis):
    """Return the slot that a token after each node overwrites, int32 `[B, K, T]`.

    Lays out what every node's cache would hold, slot by slot, in importance and
    position only, and asks the one function that plain decoding asks.
    """
    batch, kv_heads, nodes = slots.shape
    old, new, own = _weights(walk, slots, positions >= 0)
    importance = old.mean(axis=3) * walk.old_size[:, :, None]  # [B, K, T, S]
    mine = new.mean(axis=3) * _along(walk.new_size, walk.path)  # [B, K, T, D + 1]
    held = jnp.broadcast_to(positions[:, :, None], importance.shape)
    slot = jnp.arange(positions.shape[2], dtype=jnp.int32)[None, None, None]
    for d in range(own.shape[-1]):  # a later write comes after an earlier one
        here = own[..., d : d + 1] == slot
        importance = jnp.where(here, mine[..., d : d + 1], importance)
        held = jnp.where(here, position[:, None, None, None] + d, held)

    def by_node(x):  # [B, K, T, S] to [B * T, K, S]
        return x.swapaxes(1, 2).reshape(batch * nodes, *x.shape[1:2], x.shape[3])

    depth = walk.on_path.sum(-1, dtype=jnp.int32) - 1
    newest = position[:, None] + depth - n_recent
    chosen = choose_victim(
        by_node(importance),
        by_node(held),
        jnp.repeat(oldest, nodes),
        newest.reshape(-1),
        shared=shared,
        axis=axis,
    )
    return chosen.reshape(batch, nodes, kv_heads).swapaxes(1, 2)
