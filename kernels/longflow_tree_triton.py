"""LongFlow along the paths of a tree on NVIDIA GPUs, in Triton, through jax-triton.

Three launches: the first attends from all nodes and leaves their logits, so that keys
and values are read once; the second lists for each node the slots that are worth least
to it; the third follows each node's path along these lists, and joins the splits.
`longflow_tree_triton_body` has the picture.

No vmap and no derivatives: the batch is an explicit axis, and decoding has no backward.

Axis letters: `B` batch, `T` nodes, `N` query heads, `K` key/value heads, `G` query
heads per key/value head, `S` slots, `H` head size, `D` depth of the deepest node, `R`
rows: sequences, or their key/value heads where each has a victim of its own.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.kernels import tree_triton, triton_call
from jaxkv.kernels.cache import Nodes, Slots
from jaxkv.kernels.longflow_triton import score_heads, score_stride
from jaxkv.kernels.scores import ProductScore
from jaxkv.kernels.tree_triton import pack
from jaxkv.kernels.triton_call import next_power_of_2, num_processors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles(tree_triton.Tiles):
    """How the work of one call is cut.

    Attributes:
      chunk: slots that one program of the second launch lists, a power of two.
      listed: how many of them it lists, a power of two.
      heads: key/value heads whose output one program of the third launch makes.
    """

    chunk: int
    listed: int
    heads: int


def choose_tiles(
    batch: int,
    heads: int,
    kv_heads: int,
    nodes: int,
    slots: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    *,
    depth: int,
    shared: bool,
    num_sms: int = 132,
) -> Tiles:
    """Return tiles for a device of `num_sms` processors.

    The first launch is cut as that of `tree_triton`. A chunk fills half of the
    registers of a program of eight warps. Of what a path can overwrite and three slots
    more, chunks share the list, each with room for three times its part.
    """
    attend = tree_triton.choose_tiles(
        *(batch, heads, kv_heads, nodes, slots, head_dim, dtype, num_sms)
    )
    row_heads = score_heads(heads, kv_heads, shared)
    chunk = max(32, 16384 // next_power_of_2(row_heads))
    chunk = min(chunk, 1024, max(32, next_power_of_2(slots)))
    chunks = -(-slots // chunk)
    most = depth + 4
    listed = next_power_of_2(min(most, max(8, -(-3 * most // chunks)), chunk))
    targets = kv_heads if shared else 1
    rows = batch * kv_heads // targets
    together = max(1, targets * rows * nodes // num_sms)
    return Tiles(
        **dataclasses.asdict(attend),
        chunk=chunk,
        listed=listed,
        heads=max(
            x for x in range(1, targets + 1) if not targets % x and x <= together
        ),
    )


def longflow_tree_triton(
    query: jax.Array,
    nodes: Nodes,
    slots: Slots,
    oldest: jax.Array,
    parents: jax.Array,
    depths: jax.Array,
    sink: jax.Array | None = None,
    *,
    n_recent: int,
    depth: int,
    scale: float,
    cap: float | None = None,
    score: ProductScore = "l1",
    shared: bool = True,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Do `longflow_tree.longflow_tree`, whose arguments these are.

    Args:
      query: `[B, T, N, H]`.
      nodes: of the tree.
      slots: of the cache, with norms.
      oldest: int32 `[B]`, the first position that may go.
      parents: int32 `[B, T]`.
      depths: int32 `[B, T]`.
      sink: `[N]`, or None.
      n_recent: how many of the newest tokens may not go.
      depth: of the deepest node.
      scale: factor on the logits.
      cap: bound of the logits, or None.
      score: the norm of the value, "l1" or "l2", or "attention", which leaves it out.
      shared: one victim for all key/value heads, or one for each.
      tiles: how to cut the work; None chooses by shape and device.

    Returns:
      The output `[B, T, N, H]`, and two int32 `[B, K, T]`: the slot of each node, and
      that of a token after it.
    """
    from jaxkv.kernels import longflow_finish_body as finish
    from jaxkv.kernels import longflow_tree_triton_body as body

    batch, num_nodes, heads, head_dim = query.shape
    keys, values, positions, target, norms = slots
    kv_heads, num_slots = positions.shape[1:]
    tiles = tiles or choose_tiles(
        *(batch, heads, kv_heads, num_nodes, num_slots, head_dim, keys.dtype),
        depth=depth,
        shared=shared,
        num_sms=num_processors(),
    )
    row_heads = score_heads(heads, kv_heads, shared)
    rows = batch * heads // row_heads
    nodes = nodes._replace(
        key=nodes.key.astype(keys.dtype), value=nodes.value.astype(values.dtype)
    )
    paths = ancestors_by_depth(parents, depths, depth)
    parts, statistic, logits, new_norms = _attend(
        *(query, nodes, slots, paths, sink),
        **dict(scale=scale, cap=cap, score=score, tiles=tiles),
    )
    row = target, nodes.position, oldest, depths, paths
    launch = dict(aliases={}, num_warps=8, num_stages=1)
    options = query.shape, keys, depth, n_recent, shared, tiles
    second = list_constants(*options)
    chunks = second["CHUNKS"]
    listed = _integers(rows, num_nodes, chunks, tiles.listed)
    whole, orders, found, path_orders = triton_call.call(
        body.list_least,
        (logits, statistic, norms, positions, new_norms, *row),
        (
            _floats(rows, num_nodes, row_heads),
            *(listed, listed, _integers(rows, num_nodes, depth + 1)),
        ),
        grid=(rows * num_nodes, chunks + 1),
        **launch,
        **second,
    )
    lists = whole, orders, found, path_orders
    slot = _integers(batch, kv_heads, num_nodes)
    third = path_constants(*options)
    return triton_call.call(
        finish.finish_paths,
        (
            *(logits, parts, statistic, *lists, values, nodes.value, norms, positions),
            *(new_norms, *row, sink),
        ),
        (jax.ShapeDtypeStruct(query.shape, query.dtype), slot, slot),
        grid=(rows * num_nodes, third["TARGETS"] // tiles.heads),
        **launch,
        **third,
        **triton_call.weighing(sink, cap),
    )


def _attend(query, nodes, slots, paths, sink, *, scale, cap, score, tiles):
    """Launch the first kernel.

    Args:
      query: as for `longflow_tree_triton`, and so are the others.
      nodes: in the dtypes of the cache.
      slots: of the cache.
      paths: of `ancestors_by_depth`.
      sink: `[N]`, or None.
      scale: factor.
      cap: bound of the logits, or None.
      score: of a slot.
      tiles: how the work is cut.

    Returns:
      Parts of the output, their statistic, all logits, and the norms of the nodes.
    """
    from jaxkv.kernels import longflow_tree_triton_body as body

    batch, num_nodes, heads, _ = query.shape
    kv_heads = slots.keys.shape[1]
    group = heads // kv_heads
    node = jnp.arange(num_nodes, dtype=jnp.int32)[None, None, None]
    ancestors = pack((paths[..., None] == node).any(2))
    shape = (tiles.splits, *query.shape)
    constants = attend_constants(query.shape, slots.keys, scale, score, tiles)
    return triton_call.call(
        body.attend_tree,
        (
            *(query, nodes.key, nodes.value, *slots[:4], nodes.position),
            *(ancestors, sink),
        ),
        (
            *(_floats(*shape), _floats(*shape[:-1])),
            _floats(batch, kv_heads, num_nodes, group, constants["STRIDE"]),
            _floats(batch, kv_heads, num_nodes),
        ),
        aliases={},
        grid=(
            batch * kv_heads * -(-num_nodes * group // tiles.rows),
            tiles.splits,
        ),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **constants,
        **triton_call.weighing(sink, cap),
    )


def _floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def ancestors_by_depth(parents: jax.Array, depths: jax.Array, depth: int) -> jax.Array:
    """Return the node of each depth above each node, or -1, int32 `[B, T, D + 1]`.

    All layers of a step need the same, and XLA makes it for them once.

    Args:
      parents: int32 `[B, T]`.
      depths: int32 `[B, T]`.
      depth: `D`; the reach is doubled until it covers it.
    """
    node = jnp.arange(parents.shape[1], dtype=jnp.int32)
    above = parents[:, :, None] == node[None, None]
    above |= (node[:, None] == node[None])[None]
    reach = 1
    while reach < depth:
        above = (above[:, :, :, None] & above[:, None]).any(2)
        reach *= 2
    order = jnp.arange(depth + 1, dtype=jnp.int32)
    there = above[:, :, None] & (depths[:, None] == order[None, :, None])[:, None]
    return jnp.where(there, node[None, None, None], -1).max(-1)


def logits_room(slots: int, nodes: int) -> tuple[int, int]:
    """Return where the logits of nodes begin behind those of slots, and the length."""
    new = score_stride(slots)
    return new, new + -(-nodes // 16) * 16


def attend_constants(
    query_shape: tuple[int, ...],
    keys: jax.Array | jax.ShapeDtypeStruct,
    scale: float,
    score: ProductScore,
    tiles: Tiles,
) -> dict[str, Any]:
    """Return the compile-time arguments of `attend_tree`.

    Args:
      query_shape: `B, T, N, H`.
      keys: of the cache, for its shape and dtype.
      scale: factor on the logits.
      score: of a slot.
      tiles: how the work is cut.
    """
    batch, nodes, heads, head_dim = query_shape
    _, kv_heads, slots, _ = keys.shape
    new, stride = logits_room(slots, nodes)
    return dict(
        SCALE=float(scale) * math.log2(math.e),
        BATCH=batch,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        NODES=nodes,
        SLOTS=slots,
        HEAD_DIM=head_dim,
        NEW=new,
        STRIDE=stride,
        SCORE=score,
        SPLITS=tiles.splits,
        BLOCK=tiles.block,
        ROWS=tiles.rows,
        APART=tiles.apart,
        HEAD_PAD=max(16, next_power_of_2(head_dim)),  # what tensor cores take
        PRECISION="ieee" if jnp.dtype(keys.dtype) == jnp.float32 else "tf32",
    )


def list_constants(
    query_shape: tuple[int, ...],
    keys: jax.Array | jax.ShapeDtypeStruct,
    depth: int,
    n_recent: int,
    shared: bool,
    tiles: Tiles,
) -> dict[str, Any]:
    """Return the compile-time arguments of `list_least`.

    Args:
      query_shape: `B, T, N, H`.
      keys: of the cache, for its shape.
      depth: of the deepest node.
      n_recent: how many of the newest tokens may not go.
      shared: one victim for all key/value heads.
      tiles: how the work is cut.
    """
    batch, nodes, heads, _ = query_shape
    _, kv_heads, slots, _ = keys.shape
    row_heads = score_heads(heads, kv_heads, shared)
    new, stride = logits_room(slots, nodes)
    return dict(
        BATCH=batch,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        TARGETS=kv_heads if shared else 1,
        HEADS=row_heads,
        NODES=nodes,
        DEPTHS=depth + 1,
        SLOTS=slots,
        NEW=new,
        STRIDE=stride,
        RECENT=n_recent,
        SPLITS=tiles.splits,
        CHUNK=tiles.chunk,
        CHUNKS=-(-slots // tiles.chunk),
        LIST=tiles.listed,
        SPLITS_PAD=next_power_of_2(tiles.splits),
        HEADS_PAD=next_power_of_2(row_heads),
        DEPTHS_PAD=next_power_of_2(depth + 1),
    )


def path_constants(
    query_shape: tuple[int, ...],
    keys: jax.Array | jax.ShapeDtypeStruct,
    depth: int,
    n_recent: int,
    shared: bool,
    tiles: Tiles,
) -> dict[str, Any]:
    """Return the compile-time arguments of `finish_paths`; see `list_constants`."""
    constants = list_constants(query_shape, keys, depth, n_recent, shared, tiles)
    del constants["CHUNK"]
    listed = constants.pop("CHUNKS") * tiles.listed
    head_dim = query_shape[-1]
    steps, heads = constants["DEPTHS_PAD"], constants["HEADS_PAD"]
    # Of what is compared or summed along a path, so much fits into the registers.
    shares = 4096 if head_dim <= 128 else 1024
    ranks = min(steps, shares // (steps * heads), 16384 // (steps * listed))
    # The search is rare. A path of 64 leaves registers for 8 slots of it at a time.
    searched, least = (1024, 16) if steps < 64 else (512, 8)
    searched = min(searched // max(heads, steps), next_power_of_2(keys.shape[2]))
    return constants | dict(
        HEAD_DIM=head_dim,
        LISTED=listed,
        LISTED_PAD=next_power_of_2(listed),
        RANKS=1 << max(0, ranks.bit_length() - 1),
        SOME=4,
        SEARCH=max(least, searched),
        SHARED=tiles.heads,
        TARGETS_PAD=next_power_of_2(constants["TARGETS"]),
        GROUP_PAD=next_power_of_2(constants["GROUP"]),
        HEAD_PAD=next_power_of_2(head_dim),
    )
