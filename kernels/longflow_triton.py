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

from jaxkv.kernels import decode_triton, triton_call
from jaxkv.kernels.cache import Slots, Token
from jaxkv.kernels.decode_triton import attend_constants
from jaxkv.kernels.scores import ProductScore
from jaxkv.kernels.triton_call import next_power_of_2, num_processors
from jaxkv.kernels.victims import heard, told


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
    are those of `decode_triton.choose_tiles`, cut to fit, but for their splits: two
    programs per processor, as long as each keeps three tiles, and two at least.
    """
    attend = decode_triton.choose_tiles(
        batch, kv_heads, slots, head_dim, dtype, num_sms
    )
    tiles = Tiles(**dataclasses.asdict(attend))
    tiles = dataclasses.replace(tiles, block=min(64, tiles.block))
    rows = batch * kv_heads
    num_tiles = -(-slots // attend.block)
    splits = max(1, min(max(2, 2 * num_sms // rows), num_tiles // 3))
    warps = 8 if jnp.dtype(dtype).itemsize == 4 or rows * splits <= num_sms else 4
    stages = 2 if slots >= 8192 else 3
    tiles = dataclasses.replace(tiles, splits=splits, warps=warps, stages=stages)
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
    token: Token,
    slots: Slots,
    oldest: jax.Array,
    newest: jax.Array,
    sink: jax.Array | None = None,
    *,
    scale: float,
    cap: float | None = None,
    score: ProductScore = "l1",
    shared: bool = True,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, Slots]:
    """Do `longflow.longflow_attention`, whose arguments these are.

    The slots are updated in place where XLA lets them be: under `jit`, donated or used
    nowhere else.

    Args:
      query: `[B, N, H]` of the new token.
      token: the new one.
      slots: of the cache, with norms.
      oldest: int32 `[B]`, the first position that may go.
      newest: int32 `[B]`, the last position that may go.
      sink: `[N]`, or None.
      scale: factor on the logits.
      cap: bound of the logits, or None.
      score: the norm of the value, "l1" or "l2", or "attention", which leaves it out.
      shared: one victim for all key/value heads, from the mean over all query heads;
        else one per key/value head, from its group's.
      tiles: how to cut the work; None chooses by shape and device.

    Returns:
      The output `[B, N, H]` and the slots.
    """
    from jaxkv.kernels import longflow_choice_body as choice

    batch, kv_heads, num_slots, head_dim = slots.keys.shape
    heads = query.shape[1]
    sizes = heads, kv_heads, num_slots, head_dim
    tiles = tiles or choose_tiles(batch, *sizes, slots.keys.dtype, num_processors())
    row_heads = score_heads(heads, kv_heads, shared)
    rows = batch * heads // row_heads
    parts, statistic, scores, arrivals, slots = _attend(
        *(query, token, slots, oldest, newest, sink),
        **dict(scale=scale, cap=cap, score=score, shared=shared, tiles=tiles),
    )
    constants = choose_constants(*sizes, shared, tiles)
    blocks = constants["BLOCKS"]
    target = slots.target
    minima = jax.ShapeDtypeStruct((rows, blocks, 2), jnp.int32)
    updated = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (target, arrivals)]
    options = dict(num_warps=4, num_stages=1, **constants)
    if tiles.programs:
        _, target, _ = triton_call.call(
            choice.choose_victims,
            (scores, target, token.position, arrivals),
            (minima, *updated),
            aliases={1: 1, 3: 2},
            grid=(rows, blocks),
            **options,
        )
        return parts.reshape(query.shape), slots._replace(target=target)
    bounds = target, token.position, oldest, newest
    out, _, target, _ = triton_call.call(
        choice.finish_splits,
        (scores, parts, statistic, slots.norms, slots.positions, *bounds, arrivals),
        (jax.ShapeDtypeStruct(query.shape, query.dtype), minima, *updated),
        aliases={5: 2, 9: 3},
        grid=(rows, blocks + row_heads),
        **options,
    )
    return out, slots._replace(target=target)


def tell_triton(
    query: jax.Array,
    token: Token,
    slots: Slots,
    oldest: jax.Array,
    newest: jax.Array,
    sink: jax.Array | None = None,
    *,
    scale: float,
    cap: float | None = None,
    score: ProductScore = "l1",
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, Slots]:
    """Do all but the choice, for devices that share a row's victim.

    Arguments are those of `longflow_attention_triton`.

    Returns:
      The output `[B, N, H]`; of each slot what `victims.told` has of these heads, `[B,
      1, S]` and some more; and for `choose_told_triton` a counter, and the slots.
    """
    from jaxkv.kernels import longflow_choice_body as choice

    batch, kv_heads, num_slots, head_dim = slots.keys.shape
    sizes = query.shape[1], kv_heads, num_slots, head_dim
    tiles = tiles or choose_tiles(batch, *sizes, slots.keys.dtype, num_processors())
    parts, statistic, scores, arrivals, slots = _attend(
        *(query, token, slots, oldest, newest, sink),
        **dict(scale=scale, cap=cap, score=score, shared=True, tiles=tiles),
    )
    if tiles.programs:
        return parts.reshape(query.shape), told(*heard(scores)), arrivals, slots
    constants = tell_constants(*sizes, tiles)
    out, found = triton_call.call(
        choice.tell_splits,
        (scores, parts, statistic, slots.norms, slots.positions, oldest, newest),
        (
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, 1, score_stride(num_slots)), jnp.float32),
        ),
        aliases={},
        grid=(batch, constants["BLOCKS"] + query.shape[1]),
        **dict(num_warps=4, num_stages=1),
        **constants,
    )
    return out, found, arrivals, slots


def choose_told_triton(
    found: jax.Array,
    arrivals: jax.Array,
    token: Token,
    slots: Slots,
    *,
    chunk: int = 1024,
) -> Slots:
    """Choose the victims of all heads from what several devices have told.

    Args:
      found: float32 `[D, B, 1, S]` and some more, of `D` devices.
      arrivals: of `tell_triton`.
      token: as there.
      slots: of `tell_triton`, of this device's heads.
      chunk: numbers that a program reads, a power of two.

    Returns the slots with the next target; that of a finished row stays.
    """
    from jaxkv.kernels import longflow_choice_body as choice

    batch, kv_heads, num_slots, head_dim = slots.keys.shape
    sizes = kv_heads, kv_heads, num_slots, head_dim
    tiles = Tiles(splits=1, block=64, warps=4, stages=1, programs=1, chunk=chunk)
    constants = choose_constants(*sizes, True, tiles, len(found))
    grid = batch, constants["BLOCKS"]
    shapes = (*grid, 2), slots.target.shape, arrivals.shape
    _, target, _ = triton_call.call(
        choice.choose_victims,
        (found, slots.target, token.position, arrivals),
        tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes),
        aliases={1: 1, 3: 2},
        grid=grid,
        **dict(num_warps=4, num_stages=1),
        **constants,
    )
    return slots._replace(target=target)


def _attend(
    query, token, slots, oldest, newest, sink, *, scale, cap, score, shared, tiles
):
    """Launch the first kernel: `score_rows` for whole rows, else `score_split`.

    Args:
      query: as for `longflow_attention_triton`, and so are the others.
      token: the new one.
      slots: of the cache.
      oldest: int32 `[B]`.
      newest: int32 `[B]`.
      sink: `[N]`, or None.
      scale: factor.
      cap: bound of the logits, or None.
      score: of a slot.
      shared: one victim for a row.
      tiles: how the work is cut.

    Returns:
      Parts of the output, their statistic, the importance of the slots (for splits, the
      logits), a counter of arrivals, and the slots with the token in them.
    """
    from jaxkv.kernels import longflow_triton_body as body

    batch, kv_heads, num_slots, head_dim = slots.keys.shape
    heads, whole_rows = query.shape[1], tiles.programs > 0
    rows = batch * heads // score_heads(heads, kv_heads, shared)
    sizes = heads, kv_heads, num_slots, head_dim
    constants = score_constants(
        *(*sizes, slots.keys.dtype, scale, score, shared, tiles, batch)
    )
    stride, kept = score_stride(num_slots), tiles.programs or batch * kv_heads
    part_dtype = query.dtype if whole_rows else jnp.float32
    cache = slots.keys, slots.values, slots.positions, slots.norms
    arrays = query, token.key, token.value, *cache, slots.target, token.position
    bounds = (oldest, newest) if whole_rows else ()
    importance = jax.ShapeDtypeStruct((batch, kv_heads, stride), jnp.float32)
    outputs = [
        jax.ShapeDtypeStruct((tiles.splits, batch, heads, head_dim), part_dtype),
        jax.ShapeDtypeStruct((tiles.splits, batch, heads), jnp.float32),
        jax.ShapeDtypeStruct((kept, heads // kv_heads, stride), jnp.float32),
        *[importance] * whole_rows,
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    ]
    first = len(outputs)
    parts, statistic, *scores, arrivals, keys, values, positions, norms = (
        triton_call.call(
            body.score_rows if whole_rows else body.score_split,
            (*arrays, *bounds, sink),
            (*outputs, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache)),
            aliases={3: first, 4: first + 1, 5: first + 2, 6: first + 3},
            grid=(kept,) if whole_rows else (kept, tiles.splits),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
            **constants,
            **triton_call.weighing(sink, cap),
        )
    )
    slots = Slots(keys, values, positions, slots.target, norms)
    return parts, statistic, scores[-1], arrivals, slots


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
    heads: int,
    kv_heads: int,
    slots: int,
    head_dim: int,
    shared: bool,
    tiles: Tiles,
    parts: int | None = None,
) -> dict[str, Any]:
    """Return the compile-time arguments of `finish_splits`, or of `choose_victims`.

    The latter chooses from what so many devices have told, or all targets if None.
    """
    targets = kv_heads if shared else 1
    of_devices, parts = parts is not None, parts or targets
    row_heads = score_heads(heads, kv_heads, shared)
    pad = next_power_of_2(parts if tiles.programs else row_heads)
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
    if tiles.programs:
        constants |= dict(PARTS=parts, PARTS_PAD=pad, PARTS_FIRST=of_devices)
    else:
        constants |= dict(HEADS=row_heads, HEADS_PAD=pad)
        constants |= decode_triton.combine_constants(head_dim, tiles.splits)
    return constants


def tell_constants(
    heads: int, kv_heads: int, slots: int, head_dim: int, tiles: Tiles
) -> dict[str, Any]:
    """Return the compile-time arguments of `tell_splits`."""
    constants = choose_constants(heads, kv_heads, slots, head_dim, True, tiles)
    of_choice = "TARGETS", "TARGETS_PAD", "BLOCKS_PAD"
    return {name: x for name, x in constants.items() if name not in of_choice}


def _slots_at_once(heads_pad: int, slots: int, tiles: Tiles) -> int:
    """Return how many slots of so many heads make up a chunk."""
    return max(16, min(tiles.chunk // heads_pad, next_power_of_2(slots)))
