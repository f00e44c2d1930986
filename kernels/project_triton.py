"""The products of `project` on NVIDIA GPUs, in Triton, through jax-triton.

With few rows a product takes as long as its weights take to be read. So that enough
programs read them, the depth of narrow matrices is shared out; whoever reads the
product adds the parts, which saves the launch that would. The gates are applied where
they are computed, which saves another.

Axis letters: `P` parts, `B` batch, `T` tokens, `D` depth, `F` columns.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxkv.kernels import triton_call
from jaxkv.kernels.triton_call import next_power_of_2, num_processors, shared_memory

MOST_ROWS = 64  # beyond that XLA's products are as good

_UNIT = 64  # all sizes are multiples of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the work of one call is cut.

    Attributes:
      parts: in which the depth is shared out.
      block: columns of a tile.
      depth: of a tile.
      warps: warps per program.
      stages: depth of the software pipeline.
    """

    parts: int
    block: int
    depth: int
    warps: int
    stages: int


def unsupported(x: jax.Array, weight: jax.Array, *, gated: bool = False) -> str:
    """Return why the kernels cannot take these, or an empty string."""
    depth, columns = weight.shape
    if gated:
        columns //= 2
    rows = x.size // max(1, x.shape[-1])
    if not 1 <= rows <= MOST_ROWS:
        return f"takes 1 to {MOST_ROWS} tokens, got {rows}."
    if x.dtype not in (jnp.bfloat16, jnp.float16) or x.dtype != weight.dtype:
        return f"takes one 16-bit float, got {x.dtype} and {weight.dtype}."
    if depth % _UNIT or columns % _UNIT or not weight.size:
        return f"takes multiples of {_UNIT}, got {depth} x {columns}."
    return ""


def choose_tiles(
    rows: int,
    depth: int,
    columns: int,
    *,
    gated: bool = False,
    num_sms: int = 132,
    shared: int = 232_448,
) -> Tiles:
    """Return tiles that keep the memory busy, for a device of `num_sms` processors.

    Measured on an H200 at the shapes of Qwen3-1.7B and 8B, among others that
    `benchmarks/results/2026-11-26-project-h200.json` has. There are as many parts as
    give each processor a program, but four at most, for adding them takes time as well.
    Gates are not shared out, since they need whole sums. Programs fetch more at a time
    where they are few.

    Args:
      rows: tokens.
      depth: `D`.
      columns: `F`.
      gated: for `project_gated_triton`.
      num_sms: of the device.
      shared: bytes of shared memory of a program, at most.
    """
    blocks = columns // _UNIT
    parts = 1
    if not gated:
        while (
            parts < 4 and blocks * parts < num_sms and depth % (2 * parts * _UNIT) == 0
        ):
            parts *= 2
    deep = blocks * parts <= num_sms and depth % (2 * parts * _UNIT) == 0
    tile_depth = 2 * _UNIT if deep else _UNIT
    stage = 2 * tile_depth * (_UNIT * (2 if gated else 1) + padded(rows))
    return Tiles(
        parts=parts,
        block=_UNIT,
        depth=tile_depth,
        warps=4 if gated or deep else 2,
        stages=max(2, min(4 if gated or deep else 5, shared // stage)),
    )


def project_triton(
    x: jax.Array, weight: jax.Array, *, tiles: Tiles | None = None
) -> jax.Array:
    """Do `project.project`, whose arguments these are; float32 `[P, B, T, F]`."""
    from jaxkv.kernels import project_triton_body as body

    batch, length, depth = x.shape
    rows, columns = batch * length, weight.shape[1]
    tiles = tiles or tiles_here(rows, depth, columns, gated=False)
    (out,) = triton_call.call(
        body.project_part,
        (x, weight),
        (jax.ShapeDtypeStruct((tiles.parts, batch, length, columns), jnp.float32),),
        aliases={},
        grid=(columns // tiles.block, tiles.parts),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **constants(rows, depth, columns, tiles),
    )
    return out


def project_gated_triton(
    x: jax.Array, weight: jax.Array, *, tiles: Tiles | None = None
) -> jax.Array:
    """Do `project.project_gated`, whose arguments these are."""
    from jaxkv.kernels import project_triton_body as body

    batch, length, depth = x.shape
    rows, columns = batch * length, weight.shape[1] // 2
    tiles = tiles or tiles_here(rows, depth, columns, gated=True)
    (out,) = triton_call.call(
        body.project_gated,
        (x, weight),
        (jax.ShapeDtypeStruct((batch, length, columns), x.dtype),),
        aliases={},
        grid=(columns // tiles.block,),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **constants(rows, depth, columns, tiles, gated=True),
    )
    return out


def constants(
    rows: int, depth: int, columns: int, tiles: Tiles, *, gated: bool = False
) -> dict[str, int]:
    """Return the compile-time arguments of `project_part`, or of `project_gated`."""
    parts = {} if gated else dict(PARTS=tiles.parts)
    return parts | dict(
        ROWS=rows,
        ROWS_PAD=padded(rows),
        DEPTH=depth,
        COLUMNS=columns,
        BLOCK=tiles.block,
        BLOCK_DEPTH=tiles.depth,
    )


def padded(rows: int) -> int:
    """Return how many rows the tensor cores are given."""
    return max(16, next_power_of_2(rows))


def tiles_here(rows: int, depth: int, columns: int, *, gated: bool) -> Tiles:
    """Return what `choose_tiles` does for the default GPU."""
    return choose_tiles(
        *(rows, depth, columns),
        gated=gated,
        num_sms=num_processors(),
        shared=shared_memory(),
    )
