"""Triton kernels of `block_triton`; imported at the call only: it needs Triton.

Where a depth is shared out, every program leaves its part, and the last to arrive at a
block adds all of them, in their order, and finishes. It computes the same whichever
program it is; the counter of arrivals is the only atomic, and an integer. It is found
at zero and left at zero.
"""

import triton
import triton.language as tl

from jaxkv.kernels.newest_triton_body import add_up
from jaxkv.kernels.project_triton_body import (
    multiply_pair,
    multiply_share,
    store_rows,
)


@triton.jit
def arrives_last(arrivals_ptr, PARTS: tl.constexpr):
    """Return whether all other parts are there, which then may be read."""
    tl.debug_barrier()
    last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == PARTS - 1
    tl.store(arrivals_ptr, 0, last)
    tl.debug_barrier()
    return last


@triton.jit
def load_parts(parts_ptr, at, real, stride, PARTS: tl.constexpr):
    """Return the sum of what stands at `at` in each part, read where all can see it."""
    total = tl.load(parts_ptr + at, real, other=0.0, cache_modifier=".cg")
    for part in tl.static_range(1, PARTS):
        more = tl.load(
            parts_ptr + part * stride + at, real, other=0.0, cache_modifier=".cg"
        )
        total += more
    return total


@triton.jit
def store_sum(
    out_ptr,
    stream_ptr,
    tile,
    first,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store the residual stream with a tile added."""
    rows = first + tl.arange(0, tile.shape[0])
    real = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    at = rows[:, None] * COLUMNS + columns[None, :]
    tile += tl.load(stream_ptr + at, real, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, tile.to(out_ptr.dtype.element_ty), real)


@triton.jit
def add_tile(
    block,
    part,
    x_ptr,  # [ROWS, DEPTH]
    weight_ptr,  # [DEPTH, COLUMNS]
    stream_ptr,  # [ROWS, COLUMNS]
    arrivals_ptr,  # [COLUMNS / BLOCK], zeros, and left so
    out_ptr,  # [ROWS, COLUMNS], output
    parts_ptr,  # [PARTS, ROWS, COLUMNS], output that nobody reads after
    ROWS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    ROW_TILES: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    STAGES: tl.constexpr = None,
):
    """Multiply all rows by a share of the depth of a block, and add to the stream."""
    columns = block * BLOCK + tl.arange(0, BLOCK)
    total, second = multiply_share(
        *(x_ptr, weight_ptr, columns, part, ROWS, ROW_TILE, ROW_TILES, DEPTH, COLUMNS),
        *(PARTS, TRANSPOSED, BLOCK, BLOCK_DEPTH, STAGES),
    )
    if PARTS == 1:
        store_sum(out_ptr, stream_ptr, total, 0, columns, ROWS, COLUMNS)
        if ROW_TILES == 2:
            store_sum(out_ptr, stream_ptr, second, ROW_TILE, columns, ROWS, COLUMNS)
    else:
        mine = parts_ptr + part * (ROWS * COLUMNS)
        store_rows(mine, total, 0, columns, ROWS, COLUMNS)
        if ROW_TILES == 2:
            store_rows(mine, second, ROW_TILE, columns, ROWS, COLUMNS)
        if arrives_last(arrivals_ptr + block, PARTS):
            for first in tl.static_range(0, ROW_TILES * ROW_TILE, ROW_TILE):
                rows = first + tl.arange(0, ROW_TILE)
                at = rows[:, None] * COLUMNS + columns[None, :]
                real = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
                whole = load_parts(parts_ptr, at, real, ROWS * COLUMNS, PARTS)
                store_sum(out_ptr, stream_ptr, whole, first, columns, ROWS, COLUMNS)


@triton.jit
def project_add(
    x_ptr,
    weight_ptr,
    stream_ptr,
    arrivals_ptr,
    out_ptr,
    parts_ptr,
    ROWS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    ROW_TILES: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Do one `add_tile`, whose arguments these are, per program."""
    add_tile(
        *(tl.program_id(0), tl.program_id(1), x_ptr, weight_ptr, stream_ptr),
        *(arrivals_ptr, out_ptr, parts_ptr, ROWS, ROW_TILE, ROW_TILES, DEPTH, COLUMNS),
        *(PARTS, TRANSPOSED, BLOCK, BLOCK_DEPTH),
    )


@triton.jit
def turn_rows(
    found,  # halves of a head [R, HALF] and sums of squares [R]
    first,  # of the rows
    head,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    EPS: tl.constexpr,
    HEAD_NORM: tl.constexpr,
):
    """Finish the norm of the rows; take one head of them to where it belongs."""
    a, b, squares = found
    dtype = q_ptr.dtype.element_ty
    scale = tl.rsqrt(squares / DEPTH + EPS)[:, None]
    a *= scale
    b *= scale
    rows = (first + tl.arange(0, a.shape[0])).to(tl.int64)
    columns = tl.arange(0, HALF)
    real = (rows < ROWS)[:, None] & (columns < HALF)[None, :]
    # In arrays of as many heads, the first half of this one.
    of_queries = (rows[:, None] * HEADS + head) * (2 * HALF) + columns[None, :]
    key = head - HEADS
    of_keys = (rows[:, None] * KV_HEADS + key) * (2 * HALF) + columns[None, :]
    if key >= KV_HEADS:
        of_values = of_keys - KV_HEADS * (2 * HALF)
        tl.store(v_ptr + of_values, a.to(dtype), real)
        tl.store(v_ptr + of_values + HALF, b.to(dtype), real)
    else:
        if HEAD_NORM:
            mean = (add_up(a * a) + add_up(b * b)) / (2 * HALF)
            scale = tl.rsqrt(mean + EPS)[:, None]
            # As `key < 0` for all columns, of which the interpreter makes no mask.
            for_q = columns < tl.where(key < 0, HALF, 0)
            for_k = columns < tl.where(key < 0, 0, HALF)
            weight = tl.load(q_norm_ptr + columns, for_q, other=0.0)
            weight += tl.load(k_norm_ptr + columns, for_k, other=0.0)
            a = (a * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)[None, :]
            a = a.to(dtype).to(tl.float32)
            weight = tl.load(q_norm_ptr + HALF + columns, for_q, other=0.0)
            weight += tl.load(k_norm_ptr + HALF + columns, for_k, other=0.0)
            b = (b * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)[None, :]
            b = b.to(dtype).to(tl.float32)
        angles = rows[:, None] * HALF + columns[None, :]
        cos = tl.load(cos_ptr + angles, real, other=0.0)
        sin = tl.load(sin_ptr + angles, real, other=0.0)
        turned = (a * cos - b * sin).to(dtype)
        turned_second = (b * cos + a * sin).to(dtype)
        if key < 0:
            tl.store(q_ptr + of_queries, turned, real)
            tl.store(q_ptr + of_queries + HALF, turned_second, real)
        else:
            tl.store(k_ptr + of_keys, turned, real)
            tl.store(k_ptr + of_keys + HALF, turned_second, real)


@triton.jit
def store_pair(
    parts_ptr,  # of this part: [ROWS, COLUMNS]
    squares_ptr,  # of this part and head: [ROWS]
    found,
    first,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Leave a part of some rows of a head."""
    a, b, squares = found
    store_rows(parts_ptr, a, first, columns, ROWS, COLUMNS)
    store_rows(parts_ptr, b, first, columns + HALF, ROWS, COLUMNS)
    rows = first + tl.arange(0, a.shape[0])
    tl.store(squares_ptr + rows, squares, rows < ROWS)


@triton.jit
def load_pair(
    parts_ptr,
    squares_ptr,
    first,
    columns,
    ROWS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALF: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Return the sums of all parts of some rows of a head."""
    rows = first + tl.arange(0, ROW_TILE)
    at = rows[:, None] * COLUMNS + columns[None, :]
    real = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    a = load_parts(parts_ptr, at, real, ROWS * COLUMNS, PARTS)
    b = load_parts(parts_ptr, at + HALF, real, ROWS * COLUMNS, PARTS)
    squares = load_parts(squares_ptr, rows, rows < ROWS, ALL_HEADS * ROWS, PARTS)
    return a, b, squares


@triton.jit
def heads_tile(
    head,
    part,
    x_ptr,  # [ROWS, DEPTH]
    norm_ptr,  # [DEPTH]
    weight_ptr,  # [DEPTH, HEADS + 2 KV_HEADS, 2, HALF]
    q_norm_ptr,  # [2 HALF]; not read without HEAD_NORM
    k_norm_ptr,  # [2 HALF]; likewise
    cos_ptr,  # [ROWS, HALF]
    sin_ptr,  # [ROWS, HALF]
    arrivals_ptr,  # [HEADS + 2 KV_HEADS], zeros, and left so
    q_ptr,  # [ROWS, HEADS, 2 HALF], output
    k_ptr,  # [ROWS, KV_HEADS, 2 HALF], output
    v_ptr,  # [ROWS, KV_HEADS, 2 HALF], output
    parts_ptr,  # [PARTS, ROWS, columns], output that nobody reads after
    squares_ptr,  # [PARTS, HEADS + 2 KV_HEADS, ROWS], likewise
    ROWS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    ROW_TILES: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    EPS: tl.constexpr,
    HEAD_NORM: tl.constexpr,
    STAGES: tl.constexpr = None,
):
    """Normalise all rows, and make one head of them, or its share of the depth."""
    ALL_HEADS: tl.constexpr = HEADS + 2 * KV_HEADS
    COLUMNS: tl.constexpr = ALL_HEADS * 2 * HALF
    columns = head * (2 * HALF) + tl.arange(0, HALF)
    found, second = multiply_pair(
        *(x_ptr, norm_ptr, weight_ptr, columns, part, ROWS, ROW_TILE, ROW_TILES),
        *(DEPTH, PARTS, COLUMNS, HALF, BLOCK_DEPTH, True, STAGES),
    )
    if PARTS == 1:
        turn_rows(
            *(found, 0, head, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr),
            *(q_ptr, k_ptr, v_ptr),
            *(ROWS, DEPTH, HEADS, KV_HEADS, HALF, EPS, HEAD_NORM),
        )
        if ROW_TILES == 2:
            turn_rows(
                *(second, ROW_TILE, head, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr),
                *(q_ptr, k_ptr, v_ptr),
                *(ROWS, DEPTH, HEADS, KV_HEADS, HALF, EPS, HEAD_NORM),
            )
    else:
        mine = parts_ptr + part * (ROWS * COLUMNS)
        squares = squares_ptr + (part * ALL_HEADS + head) * ROWS
        store_pair(mine, squares, found, 0, columns, ROWS, COLUMNS, HALF)
        if ROW_TILES == 2:
            store_pair(mine, squares, second, ROW_TILE, columns, ROWS, COLUMNS, HALF)
        if arrives_last(arrivals_ptr + head, PARTS):
            for first in tl.static_range(0, ROW_TILES * ROW_TILE, ROW_TILE):
                whole = load_pair(
                    *(parts_ptr, squares_ptr + head * ROWS, first, columns, ROWS),
                    *(ROW_TILE, COLUMNS, HALF, ALL_HEADS, PARTS),
                )
                turn_rows(
                    *(whole, first, head, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr),
                    *(q_ptr, k_ptr, v_ptr),
                    *(ROWS, DEPTH, HEADS, KV_HEADS, HALF, EPS, HEAD_NORM),
                )


@triton.jit
def project_heads(
    x_ptr,
    norm_ptr,
    weight_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    arrivals_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    parts_ptr,
    squares_ptr,
    ROWS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    ROW_TILES: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    EPS: tl.constexpr,
    HEAD_NORM: tl.constexpr,
):
    """Do one `heads_tile`, whose arguments these are, per program."""
    heads_tile(
        *(tl.program_id(0), tl.program_id(1), x_ptr, norm_ptr, weight_ptr),
        *(q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, arrivals_ptr),
        *(q_ptr, k_ptr, v_ptr, parts_ptr, squares_ptr),
        *(ROWS, ROW_TILE, ROW_TILES, DEPTH, PARTS, BLOCK_DEPTH),
        *(HEADS, KV_HEADS, HALF, EPS, HEAD_NORM),
    )
