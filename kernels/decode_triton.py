"""One decode step of attention on NVIDIA GPUs, in Triton, through jax-triton.

Each program serves one (sequence, key/value head) and one share of its slots, and reads
keys and values once for all query heads of the group; a second, small kernel joins the
shares. `decode_triton_body` has the picture and the numerics.

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the work of one call is cut.

    Attributes:
      splits: programs per key/value head; 1 needs no second kernel.
      block: slots per tile, a power of two.
      warps: warps per program.
      stages: depth of the software pipeline; keys and values are fetched `stages - 1`
        tiles ahead, their positions one more.
    """

    splits: int
    block: int
    warps: int
    stages: int


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
    three programs with two tiles each on their way. There are enough splits for two
    programs per processor, as long as each keeps three tiles to overlap, and two at
    least where the slots allow it, for the last wave of programs to be short.
    """
    itemsize = jnp.dtype(dtype).itemsize
    row_bytes = next_power_of_2(head_dim) * itemsize
    block = max(16, min(128, 16384 // row_bytes, next_power_of_2(slots)))
    rows = batch * kv_heads
    num_tiles = -(-slots // block)
    splits = max(1, min(max(2, 2 * num_sms // rows), num_tiles // 3))
    # In float32, or with few programs per processor, four warps are too few.
    warps = 8 if itemsize == 4 or rows * splits <= num_sms else 4
    stages = 2 if slots >= 8192 else 3
    return Tiles(splits=splits, block=block, warps=warps, stages=stages)


def decode_attention_triton(
    query: jax.Array,
    token: Token,
    slots: Slots,
    *,
    scale: float,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, Slots]:
    """Do `decode.decode_attention`, whose arguments these are.

    Keys, values and positions are updated in place where XLA lets them be: under `jit`,
    donated or used nowhere else.

    Args:
      query: `[B, N, H]`.
      token: the new one.
      slots: of the cache.
      scale: factor on the logits.
      tiles: how to cut the work; None chooses by shape and device.

    Returns:
      The output `[B, N, H]` and the slots.
    """
    from jaxkv.kernels import decode_triton_body as body

    batch, kv_heads, num_slots, head_dim = slots.keys.shape
    heads, dtype = query.shape[1], slots.keys.dtype
    sizes = kv_heads, num_slots, head_dim, dtype
    tiles = tiles or choose_tiles(batch, *sizes, num_processors())
    part_dtype = query.dtype if tiles.splits == 1 else jnp.float32
    cache = slots.keys, slots.values, slots.positions
    out, statistic, keys, values, positions = triton_call.call(
        body.attend_split,
        (query, token.key, token.value, *cache, slots.target, token.position),
        (
            jax.ShapeDtypeStruct((tiles.splits, batch, heads, head_dim), part_dtype),
            jax.ShapeDtypeStruct((tiles.splits, batch, heads), jnp.float32),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache),
        ),
        aliases={3: 2, 4: 3, 5: 4},
        grid=(batch * kv_heads, tiles.splits),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **attend_constants(heads, *sizes, scale, tiles),
    )
    slots = slots._replace(keys=keys, values=values, positions=positions)
    if tiles.splits == 1:
        return out.reshape(query.shape), slots
    return combine(out, statistic, query), slots


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
    """Return the compile-time arguments of `attend_split`."""
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
        HEAD_PAD=next_power_of_2(head_dim),
        PRECISION="ieee" if jnp.dtype(dtype) == jnp.float32 else "tf32",
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
