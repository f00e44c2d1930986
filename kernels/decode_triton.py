"""One decode step of attention on NVIDIA GPUs, in Triton, through jax-triton.

Each program serves one (sequence, key/value head) and one share of its slots, and reads
keys and values once for all query heads of the group; a second, small kernel joins the
shares. `decode_triton_body` has the picture and the numerics.

The order of every sum is chosen from the slots and the heads alone. So a row has the
same bits whatever rows are beside it, and `nodes_triton` can give them to drafts.

No vmap and no derivatives: the batch is an explicit axis, and decoding has no backward.

Axis letters: `B` batch, `N` query heads, `K` key/value heads, `G` query heads per
key/value head, `S` slots, `H` head size.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.kernels import triton_call
from jaxkv.kernels.cache import Slots, Token
from jaxkv.kernels.triton_call import next_power_of_2, num_processors

# How many tokens are summed apart from the older ones, by their positions: as many as
# `project_triton` multiplies at once, so that they have room for every draft that has
# exact products.
NEWEST = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the work of one call is cut.

    Attributes:
      splits: programs per key/value head for the older tokens. One does the newest,
        too, and needs no second kernel; several leave them to one more program.
      block: slots per tile, a power of two.
      warps: warps per program.
      stages: depth of the software pipeline; keys and values are fetched `stages - 1`
        tiles ahead, their positions one more.
    """

    splits: int
    block: int
    warps: int
    stages: int

    @property
    def parts(self) -> int:
        """Programs per key/value head."""
        return self.splits + (self.splits > 1)


def choose_tiles(
    batch: int,
    kv_heads: int,
    slots: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    num_sms: int = 132,
) -> Tiles:
    """Return tiles that keep the memory busy, for a device of `num_sms` processors.

    A tile holds 16 KiB of keys and as much of values, so that a processor has room for
    three programs with two tiles each on their way. There are enough splits for a
    single sequence to have 128 programs, and for none to have more than eight tiles,
    as long as each keeps three tiles to overlap. How tiles are shared out does not
    depend on `batch`; how many warps do it, which changes no sum, does.
    """
    itemsize = jnp.dtype(dtype).itemsize
    row_bytes = next_power_of_2(head_dim) * itemsize
    block = max(16, min(128, 16384 // row_bytes, next_power_of_2(slots)))
    num_tiles = -(-slots // block)
    # With the part of the newest tokens a power of two, as the second kernel likes it.
    most = max(16, next_power_of_2(128 // kv_heads), num_tiles // 8) - 1
    splits = max(1, min(most, num_tiles // 3))
    # In float32, with few programs per processor that have much to do, and with the
    # masks of a head that is padded to 128, four warps are too few.
    few = batch * kv_heads * splits <= num_sms and num_tiles > 4 * splits
    warps = 8 if itemsize == 4 or few or 64 < head_dim < 128 else 4
    return Tiles(splits=splits, block=block, warps=warps, stages=3)


def decode_attention_triton(
    query: jax.Array,
    token: Token,
    slots: Slots,
    sink: jax.Array | None = None,
    *,
    scale: float,
    cap: float | None = None,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, Slots]:
    """Do `decode.decode_attention`, whose arguments these are.

    Keys, values and positions are updated in place where XLA lets them be: under `jit`,
    donated or used nowhere else.

    Args:
      query: `[B, N, H]`.
      token: the new one.
      slots: of the cache.
      sink: `[N]`, or None.
      scale: factor on the logits.
      cap: bound of the logits, or None.
      tiles: how to cut the work; None chooses by shape and device.

    Returns:
      The output `[B, N, H]` and the slots.
    """
    out, statistic, slots = attend_parts(
        *(query, token, slots, sink), scale=scale, cap=cap, tiles=tiles
    )
    if len(out) == 1:
        return out.reshape(query.shape), slots
    return combine(out, statistic, query), slots


def attend_parts(
    query: jax.Array,
    token: Token,
    slots: Slots,
    sink: jax.Array | None = None,
    *,
    scale: float,
    cap: float | None = None,
    tiles: Tiles | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array, Slots]:
    """Do all of `decode_attention_triton` but the joining of parts.

    Arguments are its own, but for this one:

    Args:
      dtype: of the parts; None is that of the query where there is one part.

    Returns:
      The parts `[parts, B, N, H]`, what each is worth, float32 `[parts, B, N]`, and the
      slots; see `combine`.
    """
    from jaxkv.kernels import decode_triton_body as body

    batch, kv_heads, num_slots, head_dim = slots.keys.shape
    heads = query.shape[1]
    sizes = kv_heads, num_slots, head_dim, slots.keys.dtype
    tiles = tiles or choose_tiles(batch, *sizes, num_processors())
    part_dtype = dtype or (query.dtype if tiles.parts == 1 else jnp.float32)
    cache = slots.keys, slots.values, slots.positions
    out, statistic, keys, values, positions = triton_call.call(
        body.attend_split,
        (query, token.key, token.value, *cache, slots.target, token.position, sink),
        (
            jax.ShapeDtypeStruct((tiles.parts, batch, heads, head_dim), part_dtype),
            jax.ShapeDtypeStruct((tiles.parts, batch, heads), jnp.float32),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache),
        ),
        aliases={3: 2, 4: 3, 5: 4},
        grid=(batch * kv_heads, tiles.parts),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **attend_constants(heads, *sizes, scale, tiles),
        **newest_constants(num_slots, tiles),
        **triton_call.weighing(sink, cap),
    )
    slots = slots._replace(keys=keys, values=values, positions=positions)
    return out, statistic, slots


def combine(parts: jax.Array, statistic: jax.Array, query: jax.Array) -> jax.Array:
    """Join what the splits of a call have left.

    Args:
      parts: float32 `[splits, ..., N, H]`.
      statistic: float32 `[splits, ..., N]`.
      query: `[..., N, H]`, for the shape and dtype of the output.

    Returns:
      The output `[..., N, H]`.
    """
    from jaxkv.kernels.decode_triton_body import combine_splits

    constants = combine_constants(query.shape[-1], parts.shape[0])
    (out,) = triton_call.call(
        combine_splits,
        (parts, statistic),
        (jax.ShapeDtypeStruct(query.shape, query.dtype),),
        aliases={},
        grid=(math.prod(query.shape[:-1]),),
        num_warps=combine_warps(constants),
        num_stages=1,
        **constants,
    )
    return out


def attend_constants(
    heads: int,
    kv_heads: int,
    slots: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    scale: float,
    tiles: Tiles,
) -> dict[str, Any]:
    """Return the compile-time arguments of `attend_split`, but for the newest tokens.

    Those of LongFlow's kernels are the same.
    """
    group = heads // kv_heads
    return dict(
        SCALE=float(scale) * math.log2(math.e),
        KV_HEADS=kv_heads,
        GROUP=group,
        SLOTS=slots,
        HEAD_DIM=head_dim,
        SPLITS=tiles.splits,
        BLOCK=tiles.block,
        GROUP_PAD=max(16, next_power_of_2(group)),
        HEAD_PAD=max(16, next_power_of_2(head_dim)),  # what tensor cores take
        PRECISION="ieee" if jnp.dtype(dtype) == jnp.float32 else "tf32",
    )


def newest_constants(slots: int, tiles: Tiles) -> dict[str, int]:
    """Return the compile-time arguments that the newest tokens need."""
    return dict(
        PARTS=tiles.parts,
        NEWEST=NEWEST,
        NEWEST_BLOCK=min(NEWEST, tiles.block),
        CHUNK=max(16, min(4096, next_power_of_2(slots))),
    )


def combine_constants(head_dim: int, splits: int) -> dict[str, Any]:
    """Return the compile-time arguments of `combine_splits`."""
    return dict(
        HEAD_DIM=head_dim,
        SPLITS=splits,
        SPLITS_PAD=next_power_of_2(splits),
        HEAD_PAD=next_power_of_2(head_dim),
    )


def combine_warps(constants: dict[str, Any]) -> int:
    """Return the warps of one `combine_splits`: a thread has 16 numbers of a part."""
    numbers = constants["SPLITS_PAD"] * constants["HEAD_PAD"]
    return min(4, max(1, numbers // 512))
