"""One LongFlow decode step on NVIDIA GPUs, in Triton, through jax-triton.

One launch writes the token, attends, scores every slot and chooses the victims. Keys
and values are read once for all query heads of the group. `longflow_triton_body` has
the picture and the numerics.

No vmap and no derivatives: the batch is an explicit axis, and decoding has no backward.

Axis letters: `B` batch, `N` query heads, `K` key/value heads, `G` query heads per
key/value head, `S` slots, `H` head size.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxkv.kernels import decode_triton
from jaxkv.kernels.decode_triton import attend_constants, call, next_power_of_2
from jaxkv.kernels.outputs import LongFlowOutput

Score = Literal["l1", "l2", "attention"]


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

    Measured on an H200, 16-bit, groups of four. Scoring a tile takes its warps so long
    that it is programs per processor that count, and they are few: the score takes
    registers. With three rows or more for two processors, programs do whole rows: five
    per processor on small tiles, or, where there are more rows than that, two and a
    half on tiles twice as large. With fewer rows, three splits per processor share
    them. In float32, and for groups whose outputs fill the registers of four warps,
    4096 numbers or more, tiles are those of `decode_triton.choose_tiles`, cut to fit.
    """
    attend = decode_triton.choose_tiles(
        batch, kv_heads, slots, head_dim, dtype, num_sms
    )
    tiles = Tiles(**dataclasses.asdict(attend))
    tiles = dataclasses.replace(tiles, block=min(64, tiles.block))
    rows = batch * kv_heads
    whole_rows = 2 * rows >= 3 * num_sms
    large = next_power_of_2(heads // kv_heads) * head_dim >= 4096
    if large or jnp.dtype(dtype).itemsize == 4:
        if large:
            tiles = dataclasses.replace(tiles, block=16, warps=8)
        if whole_rows:
            turns = -(-rows // (2 * num_sms))
            tiles = dataclasses.replace(tiles, splits=1, programs=-(-rows // turns))
        return tiles
    half = max(16, tiles.block // 2)
    if whole_rows and (rows > 5 * num_sms or head_dim > 128):
        turns = max(1, rows // (5 * num_sms // 2))
        wide = dict(warps=4, stages=3, splits=1, programs=-(-rows // turns))
        return dataclasses.replace(tiles, **wide)
    if whole_rows:
        narrow = dict(block=half, warps=2, stages=3, splits=1, programs=rows)
        narrow["chunk"] = 2048  # two warps hold no more of it
        return dataclasses.replace(tiles, **narrow)
    splits = -(-3 * num_sms // rows)
    block = half if slots >= 4 * half * splits else tiles.block
    splits = max(1, min(splits, -(-slots // block)))
    shared = dict(block=block, warps=4, stages=3, splits=splits)
    return dataclasses.replace(tiles, **shared)


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
    score: Score = "l1",
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
      norms: float32 `[B, K, S]`, of the values; see `longflow.value_norms`.
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
    from jaxkv.kernels import longflow_triton_body as body

    batch, kv_heads, slots, head_dim = keys.shape
    heads = query.shape[1]
    sizes = heads, kv_heads, slots, head_dim
    tiles = tiles or choose_tiles(
        batch, *sizes, keys.dtype, decode_triton.num_processors()
    )
    rows, group = batch * kv_heads, heads // kv_heads
    constants = step_constants(batch, *sizes, keys.dtype, scale, score, shared, tiles)
    stride = constants["STRIDE"]
    programs = tiles.programs or rows * tiles.splits
    split = tiles.splits > 1
    cache = keys, values, positions, norms, target
    out, _, _, _, _, *cache = call(
        body.longflow_step,
        (query, key, value, *cache, position, oldest, newest),
        [
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct(
                (tiles.splits, *query.shape) if split else (1,), jnp.float32
            ),
            jax.ShapeDtypeStruct((tiles.splits, batch, heads), jnp.float32),
            jax.ShapeDtypeStruct(
                (rows if split else programs, group, stride), jnp.float32
            ),
            jax.ShapeDtypeStruct((rows, stride) if shared else (1,), jnp.float32),
            *[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache],
        ],
        aliases={3 + i: 5 + i for i in range(5)},
        grid=(programs,),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **constants,
    )
    return LongFlowOutput(out, *cache)


def step_constants(
    batch: int,
    heads: int,
    kv_heads: int,
    slots: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    scale: float,
    score: Score,
    shared: bool,
    tiles: Tiles,
) -> dict[str, Any]:
    """Return the compile-time arguments of `longflow_step`.

    Raises:
      NotImplementedError: slots, splits and heads are too many to be counted in the 31
        bits of a target.
    """
    constants = attend_constants(heads, kv_heads, slots, head_dim, dtype, scale, tiles)
    step = tiles.splits * tiles.block
    split_unit = next_power_of_2(slots)
    head_unit = split_unit * (2 * next_power_of_2(tiles.splits))
    if head_unit * next_power_of_2(kv_heads) > 2**31:
        raise NotImplementedError(
            f"longflow_attention_triton: {slots} slots in {tiles.splits} splits and "
            f'{kv_heads} heads exceed the 31 bits of a target; use fewer, or "xla".'
        )
    pad = next_power_of_2(heads // kv_heads)
    head_pad = constants["HEAD_PAD"]
    return constants | dict(
        SCORE=score,
        SHARED=shared,
        STRIDE=-(-slots // step) * step,
        ROWS=batch * kv_heads,
        HEADS_PAD=pad,
        KV_PAD=next_power_of_2(kv_heads),
        SPLITS_PAD=next_power_of_2(tiles.splits),
        SPLITS_AT_ONCE=max(
            1, min(next_power_of_2(tiles.splits), 4096 // (pad * head_pad))
        ),
        CHUNK=_slots_at_once(pad, slots, tiles),
        SHARED_CHUNK=_slots_at_once(next_power_of_2(kv_heads), slots, tiles),
        SPLIT_UNIT=split_unit,
        HEAD_UNIT=head_unit,
    )


def _slots_at_once(heads_pad: int, slots: int, tiles: Tiles) -> int:
    """Return how many slots of so many heads make up a chunk."""
    return max(16, min(tiles.chunk // heads_pad, next_power_of_2(slots)))
