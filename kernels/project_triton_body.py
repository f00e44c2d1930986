"""Triton kernels of `project_triton`; imported at the call only: it needs Triton.

```
            columns, a block per program
          +-----+-----+-----+-----+
 depth,   |     |     |     |     |   part 0
 a share  +-----+-----+-----+-----+
 per part |     |     |     |     |   part 1
          +-----+-----+-----+-----+
```

A program goes down its share of the depth, a tile of weights at a time, with all rows.

The tensor cores are given 16 or 32 rows at a time and never 64, for which some devices
have another instruction. So every number is the same sum in the same order, however
many rows there are.
"""

import triton
import triton.language as tl


@triton.jit
def store_rows(
    out_ptr, tile, first, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Store a tile of a product, without what lies beyond the last row or column."""
    rows = first + tl.arange(0, tile.shape[0])
    real = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    at = rows[:, None] * COLUMNS + columns[None, :]
    tl.store(out_ptr + at, tile.to(out_ptr.dtype.element_ty), real)


@triton.jit
def multiply_share(
    x_ptr,
    weight_ptr,
    columns,  # [BLOCK]
    part,
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
    """Return products of a share of the depth: of the first rows, and of the others."""
    SHARE: tl.constexpr = DEPTH // PARTS
    rows = tl.arange(0, ROW_TILE)
    depth = part * SHARE + tl.arange(0, BLOCK_DEPTH)
    real = (rows < ROWS)[:, None]
    more = (rows + ROW_TILE < ROWS)[:, None]
    x_ptr += rows[:, None] * DEPTH + depth[None, :]
    # The last block may be wider than what is left of the matrix.
    inside = columns < COLUMNS
    if TRANSPOSED:
        weight_ptr += columns[:, None].to(tl.int64) * DEPTH + depth[None, :]
    else:
        weight_ptr += depth[:, None].to(tl.int64) * COLUMNS + columns[None, :]
    total = tl.zeros([ROW_TILE, BLOCK], tl.float32)
    second = tl.zeros([ROW_TILE, BLOCK], tl.float32)
    for start in tl.range(0, SHARE, BLOCK_DEPTH, num_stages=STAGES):
        x = tl.load(x_ptr + start, real, other=0.0)
        if TRANSPOSED:
            if COLUMNS % BLOCK:
                weight = tl.load(weight_ptr, inside[:, None], other=0.0)
            else:
                weight = tl.load(weight_ptr)
            weight = tl.trans(weight)
            weight_ptr += BLOCK_DEPTH
        else:
            if COLUMNS % BLOCK:
                weight = tl.load(weight_ptr, inside[None, :], other=0.0)
            else:
                weight = tl.load(weight_ptr)
            weight_ptr += BLOCK_DEPTH * COLUMNS
        total = tl.dot(x, weight, total)
        if ROW_TILES == 2:
            x = tl.load(x_ptr + ROW_TILE * DEPTH + start, more, other=0.0)
            second = tl.dot(x, weight, second)
    return total, second


@triton.jit
def project_part(
    x_ptr,  # [ROWS, DEPTH]
    weight_ptr,  # [DEPTH, COLUMNS], or [COLUMNS, DEPTH] if TRANSPOSED
    out_ptr,  # [PARTS, ROWS, COLUMNS], output
    ROWS: tl.constexpr,
    ROW_TILE: tl.constexpr,  # rows of a product of the tensor cores
    ROW_TILES: tl.constexpr,  # 1 or 2
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,  # columns of a tile
    BLOCK_DEPTH: tl.constexpr,
):
    """Multiply all rows by a share of the depth of a block of columns."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1)
    total, second = multiply_share(
        *(x_ptr, weight_ptr, columns, part, ROWS, ROW_TILE, ROW_TILES, DEPTH, COLUMNS),
        *(PARTS, TRANSPOSED, BLOCK, BLOCK_DEPTH),
    )
    out_ptr += part.to(tl.int64) * (ROWS * COLUMNS)
    store_rows(out_ptr, total, 0, columns, ROWS, COLUMNS)
    if ROW_TILES == 2:
        store_rows(out_ptr, second, ROW_TILE, columns, ROWS, COLUMNS)


@triton.jit
def gate_with(gate, up):
    """Return `silu(gate) * up`."""
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def scale_by(x, weight, squares):
    """Return a tile times the weight of its norm, and the squares with it added.

    The tensor cores square, since they have an order that no layout changes: a row's
    sum stands where it meets itself.
    """
    squares = tl.dot(x, tl.trans(x), squares)
    scaled = x.to(tl.float32) * weight.to(tl.float32)[None, :]
    return scaled.to(x.dtype), squares


@triton.jit
def diagonal(squares):
    """Return the sums of squares of rows `[R]` from the products of all with all."""
    rows = tl.arange(0, squares.shape[0])
    return tl.sum(tl.where(rows[:, None] == rows[None, :], squares, 0.0), 1)


@triton.jit
def multiply_pair(
    x_ptr,
    norm_ptr,
    weight_ptr,
    columns,  # [BLOCK]
    part,
    ROWS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    ROW_TILES: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of the matrix
    APART: tl.constexpr,  # from a column to the one that goes with it
    BLOCK_DEPTH: tl.constexpr,
    NORM: tl.constexpr,
    STAGES: tl.constexpr = None,
):
    """Return products with pairs of columns, and sums of squares, of all rows.

    With `NORM`, of rows times the weight of their norm. What is left of the norm is one
    number a row, which the sum of the squares says.
    """
    SHARE: tl.constexpr = DEPTH // PARTS
    rows = tl.arange(0, ROW_TILE)
    depth = part * SHARE + tl.arange(0, BLOCK_DEPTH)
    real = (rows < ROWS)[:, None]
    more = (rows + ROW_TILE < ROWS)[:, None]
    x_ptr += rows[:, None] * DEPTH + depth[None, :]
    norm_ptr += part * SHARE + tl.arange(0, BLOCK_DEPTH)
    weight_ptr += depth[:, None].to(tl.int64) * WIDTH + columns[None, :]
    one = tl.zeros([ROW_TILE, columns.shape[0]], tl.float32)
    other = tl.zeros([ROW_TILE, columns.shape[0]], tl.float32)
    squares = tl.zeros([ROW_TILE, ROW_TILE], tl.float32)
    second_one = tl.zeros([ROW_TILE, columns.shape[0]], tl.float32)
    second_other = tl.zeros([ROW_TILE, columns.shape[0]], tl.float32)
    second_squares = tl.zeros([ROW_TILE, ROW_TILE], tl.float32)
    # So few numbers are not fetched ahead by Triton; a tile would wait for them.
    if NORM:
        norm = tl.load(norm_ptr)
    for start in tl.range(0, SHARE, BLOCK_DEPTH, num_stages=STAGES):
        x = tl.load(x_ptr + start, real, other=0.0)
        if NORM:
            norm_ptr += BLOCK_DEPTH
            there = start + BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH) < SHARE
            coming = tl.load(norm_ptr, there, other=0.0)
            x, squares = scale_by(x, norm, squares)
        of_one = tl.load(weight_ptr)
        one = tl.dot(x, of_one, one)
        of_other = tl.load(weight_ptr + APART)
        other = tl.dot(x, of_other, other)
        if ROW_TILES == 2:
            x = tl.load(x_ptr + ROW_TILE * DEPTH + start, more, other=0.0)
            if NORM:
                x, second_squares = scale_by(x, norm, second_squares)
            second_one = tl.dot(x, of_one, second_one)
            second_other = tl.dot(x, of_other, second_other)
        if NORM:
            norm = coming
        weight_ptr += BLOCK_DEPTH * WIDTH
    first = one, other, diagonal(squares)
    return first, (second_one, second_other, diagonal(second_squares))


@triton.jit
def gated_tile(
    block,
    x_ptr,  # [ROWS, DEPTH]
    norm_ptr,  # [DEPTH]; not read without NORM
    weight_ptr,  # [DEPTH, 2, COLUMNS]: gate, up
    out_ptr,  # [ROWS, COLUMNS], output
    ROWS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    ROW_TILES: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    STAGES: tl.constexpr = None,
):
    """Multiply all rows by a block of gates and of what they gate, and gate it."""
    columns = block * BLOCK + tl.arange(0, BLOCK)
    first, second = multiply_pair(
        *(x_ptr, norm_ptr, weight_ptr, columns, 0, ROWS, ROW_TILE, ROW_TILES),
        *(DEPTH, 1, 2 * COLUMNS, COLUMNS, BLOCK_DEPTH, NORM, STAGES),
    )
    store_gated(out_ptr, first, 0, columns, ROWS, DEPTH, COLUMNS, NORM, EPS)
    if ROW_TILES == 2:
        store_gated(
            *(out_ptr, second, ROW_TILE, columns, ROWS, DEPTH, COLUMNS, NORM, EPS)
        )


@triton.jit
def project_gated(
    x_ptr,
    norm_ptr,
    weight_ptr,
    out_ptr,
    ROWS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    ROW_TILES: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
):
    """Do one `gated_tile`, whose arguments these are, per program."""
    gated_tile(
        *(tl.program_id(0), x_ptr, norm_ptr, weight_ptr, out_ptr),
        *(ROWS, ROW_TILE, ROW_TILES, DEPTH, COLUMNS, BLOCK, BLOCK_DEPTH, NORM, EPS),
    )


@triton.jit
def store_gated(
    out_ptr,
    found,  # gate, up and sum of squares
    first,
    columns,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
):
    """Finish the norm, gate, and store."""
    gate, up, squares = found
    if NORM:
        scale = tl.rsqrt(squares / DEPTH + EPS)[:, None]
        gate *= scale
        up *= scale
    store_rows(out_ptr, gate_with(gate, up), first, columns, ROWS, COLUMNS)
