"""One LongFlow decode step on NVIDIA GPUs, in Triton, through jax-triton.

Two launches: the first writes the token, attends, and leaves the logits of every slot,
so that keys and values are read once for all query heads of the group; the second joins
the splits and chooses the victims. `longflow_triton_body` has the
picture and the numerics.

No vmap and no derivatives: the batch is an explicit axis, and decoding has no backward.

Axis letters: `B` batch, `N` query heads, `K` key/value heads, `G` query heads per
key/value head, `S` slots, `H` head size.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.kernels import decode_triton
from jaxkv.kernels.cache import LongFlowOutput
from jaxkv.kernels.decode_triton import attend_constants
from jaxkv.kernels.scores import ProductScore
from jaxkv.kernels.triton_call import call, next_power_of_2, num_processors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles(decode_triton.Tiles):
    """How the work of one call is cut.

    Attributes:
      programs: 0: one program per key/value head and split. Otherwise that many
        programs do whole rows one after the other, and `splits` is 1: scores then
        stay in the second-level cache.
      chunk: scores that a program reads at once, a power of two.
    """

    programs: int = 0
    chunk: int = 4096


def choose_tiles(
    batch: int,
    heads: int,
    kv_heads: int,
    slots: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    num_sms: int = 132,
) -> Tiles:
    """Return tiles that keep the memory busy, for a device of `num_sms` processors.

    Measured on an H200, 16-bit, groups of four. The registers allow two programs per
    processor. With three rows or more for two processors, each program does whole rows,
    as many as any other; with fewer, the rows are split among them all, or down to one
    tile a program where three per processor suffice for that. In float32, and for
    groups whose outputs fill the registers of four warps, 4096 numbers or more, tiles
    are those of `decode_triton.choose_tiles`, cut to fit.
    """
    attend = decode_triton.choose_tiles(
        batch, kv_heads, slots, head_dim, dtype, num_sms
    )
    tiles = Tiles(**dataclasses.asdict(attend))
    tiles = dataclasses.replace(tiles, block=min(64, tiles.block))
    rows = batch * kv_heads
    whole_rows = 2 * rows >= 3 * num_sms
    large = next_power_of_2(heads // kv_heads) * head_dim >= 4096
    if large:
        tiles = dataclasses.replace(tiles, block=16, warps=8)
    elif jnp.dtype(dtype).itemsize == 2:
        tiles = dataclasses.replace(tiles, warps=4, stages=3)
    if whole_rows:
        turns = -(-rows // (2 * num_sms))
        return dataclasses.replace(tiles, splits=1, programs=-(-rows // turns))
    if large or jnp.dtype(dtype).itemsize == 4:
        return tiles
    tiles = dataclasses.replace(tiles, chunk=2048)
    num_tiles = -(-slots // tiles.block)
    splits = max(1, min(2 * num_sms // rows, num_tiles))
    if num_tiles * rows <= 3 * num_sms + rows:
        splits = num_tiles
    return dataclasses.replace(tiles, splits=splits)


def longflow_attention_triton(
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
    newest: jax.Array,
    *,
    scale: float,
    score: ProductScore = "l1",
    shared: bool = True,
    tiles: Tiles | None = None,
) -> LongFlowOutput:
    """Write one token, attend from it, and choose the slot that the next overwrites.

    The cache and `target` are updated in place where XLA lets them be: under `jit`,
    donated or used nowhere else.

    The importance of a slot is the mean over query heads of `alpha * ||v||`, in
    float32. The next target is the lowest free slot; without one, the least important
    among the slots whose position lies between `oldest` and `newest` (for `shared`, in
    every head); without one of those, the least important of all. Ties go to the lowest
    slot.

    Args:
      query: `[B, N, H]` of the new token; head `n` reads head `n // (N / K)`.
      key: `[B, K, H]` of the new token, rotated.
      value: `[B, K, H]` of the new token.
      keys: `[B, K, S, H]`.
      values: `[B, K, S, H]`; free slots of both may hold anything, NaN included.
      positions: int32 `[B, K, S]`, negative where a slot is free.
      norms: float32 `[B, K, S]`, of the values; see `scores.value_norms`.
      target: int32 `[B, K]`, the slot that the new token overwrites.
      position: int32 `[B]` of the new token; -1 for a finished row, which writes
        nothing, keeps its target, and whose output is finite but means nothing.
      oldest: int32 `[B]`, the first position that may go.
      newest: int32 `[B]`, the last position that may go.
      scale: factor on the logits.
      score: the norm of `v`, "l1" or "l2", or "attention", which leaves it out.
      shared: one victim for all key/value heads, whose free slots coincide, from the
        mean over all query heads; else one per key/value head, from its group's.
      tiles: how to cut the work; None chooses by shape and device.

    Returns:
      The output, the updated cache and the next target.
    """
    from jaxkv.kernels import longflow_choice_body as choice
    from jaxkv.kernels import longflow_triton_body as body

    batch, kv_heads, slots, head_dim = keys.shape
    heads = query.shape[1]
    sizes = heads, kv_heads, slots, head_dim
    tiles = tiles or choose_tiles(batch, *sizes, keys.dtype, num_processors())
    row_heads = score_heads(heads, kv_heads, shared)
    rows = batch * heads // row_heads
    stride, kept = score_stride(slots), tiles.programs or batch * kv_heads
    part_dtype = query.dtype if tiles.programs else jnp.float32
    importance = (batch, kv_heads, stride)
    cache = [
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, values, positions, norms)
    ]
    outputs = [
        jax.ShapeDtypeStruct((tiles.splits, batch, heads, head_dim), part_dtype),
        jax.ShapeDtypeStruct((tiles.splits, batch, heads), jnp.float32),
        jax.ShapeDtypeStruct((kept, heads // kv_heads, stride), jnp.float32),
        *[jax.ShapeDtypeStruct(importance, jnp.float32)] * bool(tiles.programs),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    ]
    first = len(outputs)
    token = query, key, value, keys, values, positions, norms, target, position
    parts, statistic, logits, *rest = call(
        body.score_rows if tiles.programs else body.score_split,
        (*token, oldest, newest) if tiles.programs else token,
        (*outputs, *cache),
        aliases={3: first, 4: first + 1, 5: first + 2, 6: first + 3},
        grid=(tiles.programs,) if tiles.programs else (kept, tiles.splits),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **score_constants(*sizes, keys.dtype, scale, score, shared, tiles, batch),
    )
    *rest, arrivals, keys, values, positions, norms = rest
    cache = keys, values, positions, norms
    constants = choose_constants(*sizes, shared, tiles)
    blocks = constants["BLOCKS"]
    minima = jax.ShapeDtypeStruct((rows, blocks, 2), jnp.int32)
    updated = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (target, arrivals)]
    if tiles.programs:
        _, target, _ = call(
            choice.choose_victims,
            (*rest, target, position, arrivals),
            (minima, *updated),
            aliases={1: 1, 3: 2},
            grid=(rows, blocks),
            num_warps=4,
            num_stages=1,
            **constants,
        )
        return LongFlowOutput(parts.reshape(query.shape), *cache, target)
    bounds = target, position, oldest, newest
    out, _, target, _ = call(
        choice.finish_splits,
        (logits, parts, statistic, norms, positions, *bounds, arrivals),
        (jax.ShapeDtypeStruct(query.shape, query.dtype), minima, *updated),
        aliases={5: 2, 9: 3},
        grid=(rows, blocks + row_heads),
        num_warps=4,
        num_stages=1,
        **constants,
    )
    return LongFlowOutput(out, *cache, target)


def score_heads(heads: int, kv_heads: int, shared: bool) -> int:
    """Return how many query heads share a victim."""
    return heads if shared else heads // kv_heads


def score_stride(slots: int) -> int:
    """Return the length of a row of scores, rounded up so that all rows are aligned."""
    return -(-slots // 64) * 64


def score_constants(
    heads: int,
    kv_heads: int,
    slots: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    scale: float,
    score: ProductScore,
    shared: bool,
    tiles: Tiles,
    batch: int,
) -> dict[str, Any]:
    """Return the compile-time arguments of `score_split`, or of `score_rows`."""
    constants = attend_constants(heads, kv_heads, slots, head_dim, dtype, scale, tiles)
    constants |= dict(
        SCORE=score, STRIDE=score_stride(slots), TARGETS=kv_heads if shared else 1
    )
    if tiles.programs:
        del constants["SPLITS"]
        pad = next_power_of_2(heads // kv_heads)
        chunk = _slots_at_once(pad, slots, tiles)
        constants |= dict(ROWS=batch * kv_heads, HEADS_PAD=pad, CHUNK=chunk)
    return constants


def choose_constants(
    heads: int, kv_heads: int, slots: int, head_dim: int, shared: bool, tiles: Tiles
) -> dict[str, Any]:
    """Return the compile-time arguments of `finish_splits`, or of `choose_victims`."""
    targets = kv_heads if shared else 1
    row_heads = score_heads(heads, kv_heads, shared)
    pad = next_power_of_2(targets if tiles.programs else row_heads)
    chunk = _slots_at_once(pad, slots, tiles)
    blocks = -(-slots // chunk)
    constants = dict(
        TARGETS=targets,
        TARGETS_PAD=next_power_of_2(targets),
        KV_HEADS=kv_heads,
        SLOTS=slots,
        STRIDE=score_stride(slots),
        CHUNK=chunk,
        BLOCKS=blocks,
        BLOCKS_PAD=next_power_of_2(blocks),
    )
    if not tiles.programs:
        constants |= dict(HEADS=row_heads, HEADS_PAD=pad)
        constants |= decode_triton.combine_constants(head_dim, tiles)
    return constants


def _slots_at_once(heads_pad: int, slots: int, tiles: Tiles) -> int:
    """Return how many slots of so many heads make up a chunk."""
    return max(16, min(tiles.chunk // heads_pad, next_power_of_2(slots)))
