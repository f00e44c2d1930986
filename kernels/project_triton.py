"""The products of `project` on NVIDIA GPUs, in Triton, through jax-triton.

With few rows a product takes as long as its weights take to be read. So that enough
programs read them, the depth of narrow matrices is shared out; whoever reads the
product adds the parts, which saves the launch that would. The gates are applied where
they are computed, which saves another.

Axis letters: `P` parts, `B` batch, `T` tokens, `D` depth, `F` columns.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.kernels import triton_call
from jaxkv.kernels.triton_call import next_power_of_2, num_processors, shared_memory

MOST_ROWS = 64  # beyond that XLA's products are as good

_UNIT = 64  # all sizes are multiples of it, but those of vocabularies
_MOST_AT_ONCE = 32  # rows of one instruction; see `project_triton_body`


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


def unsupported(
    x: jax.Array | jax.ShapeDtypeStruct,
    weight: jax.Array | jax.ShapeDtypeStruct,
    *,
    gated: bool = False,
    vocabulary: bool = False,
) -> str:
    """Return why the kernels cannot take these, or an empty string.

    Args:
      x: tokens.
      weight: the matrix.
      gated: for `project_gated_triton`.
      vocabulary: for `unembed_triton`, whose matrix may lie either way and may have
        any multiple of eight columns.
    """
    depth, columns = weight.shape
    if vocabulary:
        depth = x.shape[-1]
        columns = weight.size // max(1, depth)
    if gated:
        columns //= 2
    rows = x.size // max(1, x.shape[-1])
    if not 1 <= rows <= MOST_ROWS:
        return f"takes 1 to {MOST_ROWS} tokens, got {rows}."
    if x.dtype not in (jnp.bfloat16, jnp.float16) or x.dtype != weight.dtype:
        return f"takes one 16-bit float, got {x.dtype} and {weight.dtype}."
    unit = 8 if vocabulary else _UNIT  # loads are of 16 bytes
    if depth % _UNIT or columns % unit or not weight.size:
        units = f"{_UNIT} x {unit}" if vocabulary else _UNIT
        return f"takes multiples of {units}, got {depth} x {columns}."
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
      rows: tokens; only how far programs fetch ahead depends on them.
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
    tiles = tiles or tiles_here(rows, depth, columns)
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
    x: jax.Array,
    weight: jax.Array,
    *,
    norm: jax.Array | None = None,
    eps: float | None = None,
    tiles: Tiles | None = None,
) -> jax.Array:
    """Do `project.project_gated`, whose arguments these are.

    With `norm` and `eps`, of the RMS norm of `x` with that weight.
    """
    from jaxkv.kernels import project_triton_body as body

    batch, length, depth = x.shape
    rows, columns = batch * length, weight.shape[1] // 2
    tiles = tiles or tiles_here(rows, depth, columns, gated=True)
    (out,) = triton_call.call(
        body.project_gated,
        (x, x if norm is None else norm, weight),
        (jax.ShapeDtypeStruct((batch, length, columns), x.dtype),),
        aliases={},
        grid=(columns // tiles.block,),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **constants(rows, depth, columns, tiles, gated=True, eps=eps),
    )
    return out


def choose_unembed_tiles(
    rows: int, depth: int, *, tied: bool, shared: int = 232_448
) -> Tiles:
    """Return tiles of the output layer, which has programs enough for any device.

    They fetch 256 bytes at a time from one place, as the gates do.

    Args:
      rows: tokens; only warps and how far they fetch ahead depend on them.
      depth: `D`.
      tied: whether the matrix is an embedding.
      shared: bytes of shared memory of a program, at most.
    """
    wide = 2 if tied and depth % (2 * _UNIT) == 0 else 1
    block, tile_depth = (_UNIT, wide * _UNIT) if tied else (2 * _UNIT, _UNIT)
    stage = 2 * tile_depth * (block + padded(rows))
    stages = max(2, min(4, shared // stage))
    warps = 8 if rows <= 16 and not tied else 4
    return Tiles(parts=1, block=block, depth=tile_depth, warps=warps, stages=stages)


def unembed_triton(
    x: jax.Array, weight: jax.Array, *, tied: bool, tiles: Tiles | None = None
) -> jax.Array:
    """Do `project.unembed`, whose arguments these are; in the dtype of `x`."""
    from jaxkv.kernels import project_triton_body as body

    *_, depth = x.shape
    rows, columns = x.size // depth, weight.size // depth
    tiles = tiles or choose_unembed_tiles(
        rows, depth, tied=tied, shared=shared_memory()
    )
    (out,) = triton_call.call(
        body.project_part,
        (x, weight),
        (jax.ShapeDtypeStruct((*x.shape[:-1], columns), x.dtype),),
        aliases={},
        grid=(-(-columns // tiles.block), 1),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **constants(rows, depth, columns, tiles, transposed=tied),
    )
    return out


def constants(
    rows: int,
    depth: int,
    columns: int,
    tiles: Tiles,
    *,
    gated: bool = False,
    transposed: bool = False,
    eps: float | None = None,
) -> dict[str, Any]:
    """Return the compile-time arguments of `project_part`, or of `project_gated`.

    With `eps`, those of a product with a norm in it.
    """
    parts: dict[str, Any] = dict(PARTS=tiles.parts, TRANSPOSED=transposed)
    if gated:
        parts = dict(NORM=eps is not None, EPS=eps or 0.0)
    at_once = min(padded(rows), _MOST_AT_ONCE)
    return parts | dict(
        ROWS=rows,
        ROW_TILE=at_once,
        ROW_TILES=padded(rows) // at_once,
        DEPTH=depth,
        COLUMNS=columns,
        BLOCK=tiles.block,
        BLOCK_DEPTH=tiles.depth,
    )


def padded(rows: int) -> int:
    """Return how many rows the tensor cores are given."""
    return max(16, next_power_of_2(rows))


def tiles_here(rows: int, depth: int, columns: int, *, gated: bool = False) -> Tiles:
    """Return what `choose_tiles` does for the default GPU."""
    return choose_tiles(
        *(rows, depth, columns),
        gated=gated,
        num_sms=num_processors(),
        shared=shared_memory(),
    )
