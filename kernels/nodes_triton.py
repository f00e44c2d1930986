"""Attention of a few drafted tokens on NVIDIA GPUs, with the bits of plain decoding.

`tree_triton` is the way for many. Here every node's output is, bit for bit, what
`decode_triton` gives once the nodes above it are in the cache, whatever else the tree
has. So a tree that is verified by these outputs leaves what plain decoding leaves, in
16 bits, too. It costs more programs: nodes share the tiles of older tokens a few at a
time, and the newest ones not at all.

Axis letters: `B` batch, `T` nodes, `N` query heads, `K` key/value heads, `S` slots, `H`
head size, `D` depth of the deepest node, `W` newest tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.kernels import decode_triton, triton_call
from jaxkv.kernels.cache import Nodes, Slots
from jaxkv.kernels.decode_triton import NEWEST, Tiles
from jaxkv.kernels.triton_call import next_power_of_2

_MOST_AT_ONCE = 32  # rows of one instruction, as in `project_triton`


def takes(batch: int, nodes: int, dtype: jax.typing.DTypeLike) -> bool:
    """Return whether these kernels are for so many nodes.

    They are where the products of so many tokens are those of each alone. A path of so
    many nodes has room among the newest tokens.
    """
    return batch * nodes <= NEWEST and jnp.dtype(dtype).itemsize == 2


def choose_tiles(
    batch: int,
    kv_heads: int,
    slots: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
) -> Tiles:
    """Return the tiles of plain decoding, with more warps for twice as many rows."""
    tiles = decode_triton.choose_tiles(batch, kv_heads, slots, head_dim, dtype)
    return dataclasses.replace(tiles, warps=8)


def attend_nodes_triton(
    query: jax.Array,
    nodes: Nodes,
    slots: Slots,
    upcoming: jax.Array,
    depths: jax.Array,
    ancestors: jax.Array,
    sink: jax.Array | None = None,
    *,
    scale: float,
    cap: float | None = None,
    tiles: Tiles | None = None,
) -> jax.Array:
    """Do `tree_attention.tree_attention`, whose arguments these are.

    Args:
      query: `[B, T, N, H]`.
      nodes: of the tree.
      slots: of the cache.
      upcoming: int32 `[B, K, D + 1]`.
      depths: int32 `[B, T]`.
      ancestors: bool `[B, T, T]`.
      sink: `[N]`, or None.
      scale: factor on the logits.
      cap: bound of the logits, or None.
      tiles: those of `decode_triton`, whose bits these are to be; None is what it
        chooses itself.

    Returns:
      `[B, T, N, H]`.
    """
    out, statistic = attend_parts(
        *(query, nodes, slots, upcoming, depths, ancestors, sink),
        scale=scale,
        cap=cap,
        tiles=tiles,
    )
    if len(out) == 1:
        return out.reshape(query.shape)
    return decode_triton.combine(out, statistic, query)


def attend_parts(
    query: jax.Array,
    nodes: Nodes,
    slots: Slots,
    upcoming: jax.Array,
    depths: jax.Array,
    ancestors: jax.Array,
    sink: jax.Array | None = None,
    *,
    scale: float,
    cap: float | None = None,
    tiles: Tiles | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Do all of `attend_nodes_triton` but the joining of parts.

    Arguments are its own, but for this one:

    Args:
      dtype: of the parts; None is that of the query where there is one part.

    Returns:
      See `decode_triton.combine`.
    """
    from jaxkv.kernels import nodes_triton_body as body

    batch, num_nodes, _, head_dim = query.shape
    kv_heads, num_slots = slots.positions.shape[1:]
    held = slots.keys.dtype
    tiles = tiles or choose_tiles(batch, kv_heads, num_slots, head_dim, held)
    constants = attend_constants(
        *(query.shape, upcoming.shape, slots.keys, scale, tiles)
    )
    blocks = -(-num_nodes // constants["AT_ONCE"])
    alone = tiles.parts > 1  # whether the newest tokens have programs of their own
    new = nodes.key.astype(held), nodes.value.astype(slots.values.dtype)
    shape = (tiles.parts, *query.shape)
    part_dtype = dtype or (jnp.float32 if alone else query.dtype)
    return triton_call.call(
        body.attend_nodes,
        (
            *(query, *new, *slots[:3], upcoming, depths, paths(depths, ancestors)),
            *(nodes.position, sink),
        ),
        (
            jax.ShapeDtypeStruct(shape, part_dtype),
            jax.ShapeDtypeStruct(shape[:-1], jnp.float32),
        ),
        aliases={},
        grid=(
            batch * kv_heads * blocks,
            tiles.splits + alone * constants["AT_ONCE"],
        ),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **constants,
        **triton_call.weighing(sink, cap),
    )


def paths(depths: jax.Array, ancestors: jax.Array) -> jax.Array:
    """Return the node so many above each, or -1, int32 `[B, T, W]`.

    All layers of a step need the same, and XLA makes it for them once.

    Args:
      depths: int32 `[B, T]`.
      ancestors: bool `[B, T, T]`.
    """
    above = depths[:, :, None] - depths[:, None]  # [B, T, T]
    back = jnp.arange(NEWEST, dtype=jnp.int32)
    there = ancestors[..., None] & (above[..., None] == back[None, None, None])
    node = jnp.arange(depths.shape[1], dtype=jnp.int32)
    return jnp.where(there, node[None, None, :, None], -1).max(2)


def attend_constants(
    query_shape: tuple[int, ...],
    upcoming_shape: tuple[int, ...],
    keys: jax.Array | jax.ShapeDtypeStruct,
    scale: float,
    tiles: Tiles,
) -> dict[str, Any]:
    """Return the compile-time arguments of `attend_nodes`.

    Args:
      query_shape: `B, T, N, H`.
      upcoming_shape: `B, K, D + 1`.
      keys: `[B, K, S, H]`; only shape and dtype are looked at.
      scale: factor on the logits.
      tiles: how the work is cut.
    """
    batch, nodes, heads, head_dim = query_shape
    _, kv_heads, num_slots, _ = keys.shape
    constants = decode_triton.attend_constants(
        *(heads, kv_heads, num_slots, head_dim, keys.dtype, scale, tiles)
    )
    group, rows = constants["GROUP"], constants["GROUP_PAD"]
    at_once = 1
    if tiles.parts > 1:
        rows = max(rows, min(_MOST_AT_ONCE, next_power_of_2(nodes * group)))
        at_once = min(nodes, rows // group)
    depths = upcoming_shape[2]
    return (
        constants
        | decode_triton.newest_constants(num_slots, tiles)
        | dict(
            BATCH=batch,
            NODES=nodes,
            DEPTHS=depths,
            DEPTHS_PAD=next_power_of_2(depths),
            AT_ONCE=at_once,
            ROWS=rows,
        )
    )
