"""Attention of a tree, and the writing of a path, on NVIDIA GPUs, through jax-triton.

Attention is one kernel over shares of the slots and a small one that joins the shares;
writing is one kernel. `tree_triton_body` has the picture. A step has these launches in
each layer, and no others around them: masks are made inside of the kernels.

No vmap and no derivatives: the batch is an explicit axis, and decoding has no backward.

Axis letters: `B` batch, `T` nodes, `N` query heads, `K` key/value heads, `S` slots,
`H` head size, `D` depth of the deepest node, `W` words of 32 nodes.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.kernels import decode_triton, triton_call
from jaxkv.kernels.cache import Nodes, Slots
from jaxkv.kernels.triton_call import next_power_of_2, num_processors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the work of one call is cut.

    Attributes:
      rows: rows of a block, a power of two; a row is one query head of one node.
      splits: programs per key/value head and block of rows; 1 needs no second kernel.
      block: slots per tile, a power of two.
      warps: warps per program.
      stages: depth of the software pipeline.
      apart: whether the last split has the nodes, and no slots; needs two splits.
    """

    rows: int
    splits: int
    block: int
    warps: int
    stages: int
    apart: bool = False


def choose_tiles(
    batch: int,
    heads: int,
    kv_heads: int,
    nodes: int,
    slots: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    num_sms: int = 132,
) -> Tiles:
    """Return tiles for a device of `num_sms` processors.

    The rows of a tree make a real matrix product of what is a sum of vectors in plain
    decoding, so one program fills a processor, and there are as many splits as give
    every processor one program and every program two tiles to overlap. Tiles are small,
    because registers are what runs out: rows x (block + head size) of them in float32.
    """
    wide = jnp.dtype(dtype).itemsize == 4  # no tensor cores: products from registers
    large = wide or head_dim > 128
    group_rows = nodes * heads // kv_heads
    most = 16 if wide else 64 if large else 128
    rows = min(most, max(16, next_power_of_2(group_rows)))
    block = max(16, min(16 if wide else 32, next_power_of_2(slots)))
    programs = batch * kv_heads * -(-group_rows // rows)
    splits = max(1, min(num_sms // programs, -(-slots // block) // 2))
    warps = 8 if rows == 128 or large else 4
    return Tiles(
        rows=rows,
        splits=splits,
        block=block,
        warps=warps,
        stages=2 if large else 3,
        # Nodes wait for a chain of small loads, which takes as long as some tiles.
        apart=splits >= 16,
    )


def tree_attention_triton(
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
      tiles: how to cut the work; None chooses by shape and device.

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
    """Do all of `tree_attention_triton` but the joining of parts.

    Arguments are its own, but for this one:

    Args:
      dtype: of the parts; None is that of the query where there is one part.

    Returns:
      See `decode_triton.combine`.
    """
    from jaxkv.kernels import tree_triton_body as body

    batch, num_nodes, heads, head_dim = query.shape
    keys, values, positions, _, _ = slots
    kv_heads, num_slots = positions.shape[1:]
    tiles = tiles or choose_tiles(
        *(batch, heads, kv_heads, num_nodes, num_slots, head_dim, keys.dtype),
        num_processors(),
    )
    part_dtype = dtype or (query.dtype if tiles.splits == 1 else jnp.float32)
    shape = (tiles.splits, *query.shape)
    row_blocks = -(-num_nodes * (heads // kv_heads) // tiles.rows)
    new = nodes.key.astype(keys.dtype), nodes.value.astype(values.dtype)
    return triton_call.call(
        body.attend_tree_split,
        (
            *(query, *new, keys, values, positions, upcoming, depths),
            *(pack(ancestors), sink),
        ),
        (
            jax.ShapeDtypeStruct(shape, part_dtype),
            jax.ShapeDtypeStruct(shape[:-1], jnp.float32),
        ),
        aliases={},
        grid=(batch * kv_heads * row_blocks, tiles.splits),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **attend_constants(query.shape, upcoming.shape, keys, scale, tiles),
        **triton_call.weighing(sink, cap),
    )


def pack(ancestors: jax.Array) -> jax.Array:
    """Return a mask `[B, T, T]` as int32 `[B, T, W]`, node `u` in bit `u % 32`.

    All layers of a step pack the same mask, and XLA does it for them once.
    """
    batch, nodes, _ = ancestors.shape
    padded = jnp.pad(ancestors, ((0, 0), (0, 0), (0, -nodes % 32)))
    bits = padded.reshape(batch, nodes, -1, 32).astype(jnp.uint32)
    place = jnp.arange(32, dtype=jnp.uint32)[None, None, None]
    words = (bits << place).sum(-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def write_path_triton(
    nodes: Nodes, slots: Slots, path: jax.Array, upcoming: jax.Array, count: jax.Array
) -> Slots:
    """Do `tree_write.write_path`, whose arguments these are, in place where XLA can."""
    from jaxkv.kernels import tree_triton_body as body

    batch, kv_heads, num_slots, head_dim = slots.keys.shape
    sizes = nodes.key.shape[1], path.shape[1], num_slots, head_dim
    cache = slots[:4]
    written = triton_call.call(
        body.write_path,
        (nodes.key, nodes.value, *cache, upcoming, path, count, nodes.position),
        tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache),
        aliases={2: 0, 3: 1, 4: 2, 5: 3},
        grid=(batch * kv_heads,),
        num_warps=4,
        num_stages=1,
        **write_constants(kv_heads, *sizes),
    )
    keys, values, positions, target = written
    return Slots(keys, values, positions, target, slots.norms)


def attend_constants(
    query_shape: tuple[int, ...],
    upcoming_shape: tuple[int, ...],
    keys: jax.Array | jax.ShapeDtypeStruct,
    scale: float,
    tiles: Tiles,
) -> dict[str, Any]:
    """Return the compile-time arguments of `attend_tree_split`.

    Args:
      query_shape: `B, T, N, H`.
      upcoming_shape: `B, K, D + 1`.
      keys: of the cache, for its shape and dtype.
      scale: factor on the logits.
      tiles: how the work is cut.
    """
    batch, nodes, heads, head_dim = query_shape
    _, kv_heads, slots, _ = keys.shape
    return dict(
        SCALE=float(scale) * math.log2(math.e),
        BATCH=batch,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        NODES=nodes,
        DEPTHS=upcoming_shape[2],
        SLOTS=slots,
        HEAD_DIM=head_dim,
        SPLITS=tiles.splits,
        BLOCK=tiles.block,
        ROWS=tiles.rows,
        APART=tiles.apart,
        DEPTHS_PAD=next_power_of_2(upcoming_shape[2]),
        HEAD_PAD=max(16, next_power_of_2(head_dim)),  # what tensor cores take
        PRECISION="ieee" if jnp.dtype(keys.dtype) == jnp.float32 else "tf32",
    )


def write_constants(
    kv_heads: int, nodes: int, steps: int, slots: int, head_dim: int
) -> dict[str, int]:
    """Return the compile-time arguments of `write_path`."""
    return dict(
        KV_HEADS=kv_heads,
        NODES=nodes,
        STEPS=steps,
        SLOTS=slots,
        HEAD_DIM=head_dim,
        STEPS_PAD=next_power_of_2(steps),
        HEAD_PAD=next_power_of_2(head_dim),
    )
