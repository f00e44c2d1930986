"""Attention that a window of queries pays to keys, on NVIDIA GPUs, in Triton.

Two launches; `window_scores_triton_body` has the picture. No derivatives and no vmap.

Axis letters: `B` batch, `W` queries of the window, `N` query heads, `K` key/value
heads, `G` query heads per key/value head, `T` keys, `H` head size.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.kernels import triton_call
from jaxkv.kernels.triton_call import next_power_of_2, num_processors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the work of one call is cut.

    Attributes:
      splits: programs per key/value head, and per chunk of rows in the first pass.
      rows: query rows, windows x heads, per chunk; a power of two.
      block: keys per tile, a power of two.
      warps: warps per program.
      stages: depth of the software pipeline.
    """

    splits: int
    rows: int
    block: int
    warps: int
    stages: int


def choose_tiles(
    batch: int,
    kv_heads: int,
    rows: int,
    keys: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    num_sms: int = 132,
) -> Tiles:
    """Return tiles for `rows` query rows per key/value head, and so many keys.

    As many rows at once as the registers hold, up to 128, and 16 in float32, for which
    there are no tensor cores; tiles of at most 16 KiB of keys; splits for two programs
    per processor, with four tiles each at least.
    """
    itemsize = jnp.dtype(dtype).itemsize
    rows = max(16, min(next_power_of_2(rows), 128 if itemsize == 2 else 16))
    row_bytes = next_power_of_2(head_dim) * itemsize
    block = 16 if itemsize == 4 else max(16, min(64, 16384 // row_bytes))
    tiles = -(-keys // block)
    splits = max(1, min(2 * num_sms // (batch * kv_heads), tiles // 4))
    return Tiles(
        splits=splits, rows=rows, block=block, warps=8 if rows > 64 else 4, stages=3
    )


def window_scores_triton(
    query: jax.Array,
    key: jax.Array,
    start: jax.Array,
    sink: jax.Array | None = None,
    *,
    scale: float,
    length: int,
    cap: float | None = None,
    count: jax.Array | None = None,
    reduction: str = "sum",
    tiles: Tiles | None = None,
) -> jax.Array:
    """Return the probability that the window's queries give to each of the first keys.

    Query `w` of row `b` stands at index `start[b] + w` of the key axis and sees the
    keys up to there. Its softmax is over all that it sees; the result keeps the first
    `length` keys, summed over queries and averaged over the heads of the group.

    Args:
      query: `[B, W, N, H]`.
      key: `[B, T, K, H]`; keys that no query sees may hold anything, NaN included.
      start: int32 `[B]`, not negative.
      sink: `[N]`, or None.
      scale: factor on the logits.
      length: the number of keys that get a score, from the first on.
      cap: bound of the logits, or None.
      count: int32 `[B]`, how many queries of each row contribute, from the first on;
        None for all.
      reduction: "sum", or "max" over the queries, which are then taken in portions
        that fill a chunk of rows.
      tiles: how to cut the work; None chooses by shape and device.

    Returns:
      float32 `[B, K, length]`, 0 where no query sees the key.
    """
    from jaxkv.kernels import window_scores_triton_body as body

    batch, window, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    rows = window * heads // kv_heads
    tiles = tiles or choose_tiles(
        batch, kv_heads, rows, keys, head_dim, key.dtype, num_processors()
    )
    if count is None:
        count = jnp.full((batch,), window, jnp.int32)
    group = heads // kv_heads
    if reduction == "max":
        tiles = dataclasses.replace(tiles, rows=max(tiles.rows, next_power_of_2(group)))
        portion = tiles.rows // group
        if window > portion:
            arrays = query, key, start, count, sink
            how = dict(scale=scale, length=length, cap=cap, tiles=tiles)
            return _by_portions(*arrays, portion, **how)
    sizes = window, heads, kv_heads, keys, head_dim
    constants = statistic_constants(*sizes, key.dtype, scale, tiles)
    weighing = triton_call.weighing(sink, cap)
    chunks = constants["CHUNKS"]
    shape = (batch, kv_heads, tiles.splits, chunks * tiles.rows)
    options = dict(aliases={}, num_warps=tiles.warps, num_stages=tiles.stages)
    (statistic,) = triton_call.call(
        body.window_statistic,
        (query, key, start, count, sink),
        (jax.ShapeDtypeStruct(shape, jnp.float32),),
        grid=(batch * kv_heads, tiles.splits, chunks),
        **options,
        **constants,
        **weighing,
    )
    (scores,) = triton_call.call(
        body.window_probabilities,
        (query, key, start, count, statistic),
        (jax.ShapeDtypeStruct((batch, kv_heads, length), jnp.float32),),
        grid=(batch * kv_heads, tiles.splits),
        **options,
        **probability_constants(constants, length, tiles, reduction),
        CAP=weighing["CAP"],
    )
    return scores


def _by_portions(query, key, start, count, sink, portion, **options):
    """Take the maximum over portions of the window that fill a chunk of rows each."""
    parts = [
        window_scores_triton(
            # Where no query is left, nothing beyond the last key is read.
            *(query[:, i : i + portion], key, start + jnp.minimum(i, count), sink),
            count=jnp.maximum(count - i, 0),
            reduction="max",
            **options,
        )
        for i in range(0, query.shape[1], portion)
    ]
    return functools.reduce(jnp.maximum, parts)


def statistic_constants(
    window: int,
    heads: int,
    kv_heads: int,
    keys: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    scale: float,
    tiles: Tiles,
) -> dict[str, Any]:
    """Return the compile-time arguments of `window_statistic`."""
    group = heads // kv_heads
    return dict(
        SCALE=float(scale) * math.log2(math.e),
        KV_HEADS=kv_heads,
        GROUP=group,
        ROWS=window * group,
        ROWS_PAD=tiles.rows,
        CHUNKS=-(-window * group // tiles.rows),
        KEYS=keys,
        HEAD_DIM=head_dim,
        HEAD_PAD=next_power_of_2(head_dim),
        BLOCK=tiles.block,
        SPLITS=tiles.splits,
        PRECISION="ieee" if jnp.dtype(dtype) == jnp.float32 else "tf32",
    )


def probability_constants(
    constants: dict[str, Any], length: int, tiles: Tiles, reduction: str
) -> dict[str, Any]:
    """Return the compile-time arguments of `window_probabilities`."""
    splits = next_power_of_2(tiles.splits)
    return constants | dict(LENGTH=length, SPLITS_PAD=splits, REDUCTION=reduction)
