"""The operations of `block` on NVIDIA GPUs in six launches a layer, in Triton.

What stands between two products is done by them: the norm of the rows while they are
read, sums of parts, rotations and the residual stream by the program that comes last to
a block. What is left of a layer is three more: attention, of two launches, and the
gates.

Axis letters as in `block`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.kernels import project_triton, triton_call
from jaxkv.kernels.cache import Heads
from jaxkv.kernels.project_triton import Tiles, padded
from jaxkv.kernels.triton_call import num_processors, shared_memory

_UNIT = 64


def unsupported(
    x: jax.Array, weight: jax.Array, *, half: int = _UNIT, gated: bool = False
) -> str:
    """Return why the kernels cannot take these, or an empty string.

    Args:
      x: tokens that are read; in float16 their product with the weight of a norm could
        be too large a number.
      weight: the matrix.
      half: of a head.
      gated: whether the matrix is of gates and of what they gate.
    """
    if x.dtype != jnp.bfloat16:
        return f"takes bfloat16, got {x.dtype}."
    if half not in (16, 32, 64, 128):
        return f"takes heads of 32, 64, 128 or 256, got {2 * half}."
    return project_triton.unsupported(x, weight, gated=gated)


def share_out(depth: int, blocks: int, num_sms: int = 132) -> int:
    """Return in how many parts each processor gets a program, four at most."""
    possible = [parts for parts in (1, 2, 3, 4) if depth % (parts * _UNIT) == 0]
    enough = [parts for parts in possible if parts * blocks >= num_sms]
    return enough[0] if enough else possible[-1]


def choose_tiles(
    rows: int,
    depth: int,
    columns: int,
    *,
    pairs: int = 0,
    num_sms: int = 132,
    shared: int = 232_448,
) -> Tiles:
    """Return tiles, whose parts and sizes do not depend on `rows`.

    Matrices of few columns are cut finely and not shared out, which
    saves the joining; others as in `project_triton.choose_tiles`.

    Args:
      rows: tokens; only how far programs fetch ahead depends on them.
      depth: `D`.
      columns: of the matrix.
      pairs: half a head, for `project_heads`; 0 for `project_add`.
      num_sms: of the device.
      shared: bytes of shared memory of a program, at most.
    """
    block = 2 * pairs or (16 if columns <= 1024 else _UNIT)
    parts = 1 if block == 16 else share_out(depth, columns // block, num_sms)
    few = columns // block * parts <= num_sms
    sizes = (256, 128, 64) if block == 16 else (128, 64) if few else (64,)
    tile_depth = next(size for size in sizes if depth // parts % size == 0)
    stage = 2 * tile_depth * (block + padded(rows))
    return Tiles(
        parts=parts,
        block=block,
        depth=tile_depth,
        warps=2 if block == _UNIT and not few and not pairs else 4,
        stages=max(2, min(4 if few or pairs else 5, shared // stage)),
    )


def project_add_triton(
    x: jax.Array,
    inner: jax.Array,
    weight: jax.Array,
    *,
    tiles: Tiles | None = None,
) -> jax.Array:
    """Return the residual stream `x [B, T, D]` with `inner @ weight` added."""
    from jaxkv.kernels import block_triton_body as body

    depth, columns = weight.shape
    rows = x.size // columns
    tiles = tiles or _tiles_here(rows, depth, columns)
    parts = tiles.parts, rows, columns
    out, _ = triton_call.call(
        body.project_add,
        (inner, weight, x, _zeros()),
        (
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(parts if tiles.parts > 1 else (1,), jnp.float32),
        ),
        aliases={},
        grid=(columns // tiles.block, tiles.parts),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **project_triton.constants(rows, depth, columns, tiles),
    )
    return out


def project_heads_triton(
    x: jax.Array,
    norm: jax.Array,
    weight: jax.Array,
    q_norm: jax.Array | None,
    k_norm: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    tiles: Tiles | None = None,
) -> Heads:
    """Do `block.read_heads` for a residual stream that waits for nothing."""
    from jaxkv.kernels import block_triton_body as body

    *rows_of, half = cos.shape
    depth, columns = weight.shape
    rows = x.size // depth
    tiles = tiles or _tiles_here(rows, depth, columns, pairs=half)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    scratch: tuple[Any, ...] = (1,), (1,)
    if tiles.parts > 1:
        all_heads = num_heads + 2 * num_kv_heads
        scratch = (tiles.parts, rows, columns), (tiles.parts, all_heads, rows)
    heads = [(*rows_of, n, 2 * half) for n in (num_heads, num_kv_heads, num_kv_heads)]
    q, k, v, *_ = triton_call.call(
        body.project_heads,
        (
            *(x, norm, weight),
            *(norm if q_norm is None else q_norm, norm if k_norm is None else k_norm),
            *(cos, sin, _zeros()),
        ),
        (*(jax.ShapeDtypeStruct(h, x.dtype) for h in heads), *map(shape, scratch)),
        aliases={},
        grid=(columns // (2 * half), tiles.parts),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **heads_constants(
            *(rows, depth, num_heads, num_kv_heads, half, eps, tiles),
            head_norm=q_norm is not None,
        ),
    )
    return Heads(q, k, v)


def heads_constants(
    rows: int,
    depth: int,
    num_heads: int,
    num_kv_heads: int,
    half: int,
    eps: float,
    tiles: Tiles,
    *,
    head_norm: bool,
) -> dict[str, Any]:
    """Return the compile-time arguments of `project_heads`."""
    shared = project_triton.constants(rows, depth, 0, tiles)
    for name in ("COLUMNS", "TRANSPOSED", "BLOCK"):
        del shared[name]
    return shared | dict(
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HALF=half,
        EPS=eps,
        HEAD_NORM=head_norm,
    )


def _zeros() -> jax.Array:
    """Return counters of arrivals, for as many blocks as there may be.

    One array serves all launches of a program, since each leaves it as it found it.
    """
    return jnp.zeros(4096, jnp.int32)


def _tiles_here(rows: int, depth: int, columns: int, *, pairs: int = 0) -> Tiles:
    return choose_tiles(
        *(rows, depth, columns),
        pairs=pairs,
        num_sms=num_processors(),
        shared=shared_memory(),
    )
