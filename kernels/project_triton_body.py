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

from jaxkv.kernels.ahead_triton_body import fetch_ahead


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
    part = tl.program_id(1)
    SHARE: tl.constexpr = DEPTH // PARTS
    rows = tl.arange(0, ROW_TILE)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
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
    for start in range(0, SHARE, BLOCK_DEPTH):
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
    out_ptr += part.to(tl.int64) * (ROWS * COLUMNS)
    store_rows(out_ptr, total, 0, columns, ROWS, COLUMNS)
    if ROW_TILES == 2:
        store_rows(out_ptr, second, ROW_TILE, columns, ROWS, COLUMNS)


@triton.jit
def gate_with(gate, up):
    """Return `silu(gate) * up`."""
    return gate / (1 + tl.exp(-gate)) * up


@triton.jit
def project_gated(
    x_ptr,  # [ROWS, DEPTH]
    weight_ptr,  # [DEPTH, 2, COLUMNS]: gate, up
    ahead_ptr,  # see `ahead_triton`
    out_ptr,  # [ROWS, COLUMNS], output
    ROWS: tl.constexpr,
    ROW_TILE: tl.constexpr,
    ROW_TILES: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    AHEAD_CHUNKS: tl.constexpr,
    AHEAD_CHUNK: tl.constexpr,
    AHEAD_SHARES: tl.constexpr,
    AHEAD_STRIDE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Multiply all rows by a block of gates and of what they gate, and gate it.

    A program that is done asks for what is read next.
    """
    rows = tl.arange(0, ROW_TILE)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    depth = tl.arange(0, BLOCK_DEPTH)
    real = (rows < ROWS)[:, None]
    more = (rows + ROW_TILE < ROWS)[:, None]
    x_ptr += rows[:, None] * DEPTH + depth[None, :]
    weight_ptr += depth[:, None].to(tl.int64) * (2 * COLUMNS) + columns[None, :]
    gate = tl.zeros([ROW_TILE, BLOCK], tl.float32)
    up = tl.zeros([ROW_TILE, BLOCK], tl.float32)
    second_gate = tl.zeros([ROW_TILE, BLOCK], tl.float32)
    second_up = tl.zeros([ROW_TILE, BLOCK], tl.float32)
    for start in range(0, DEPTH, BLOCK_DEPTH):
        x = tl.load(x_ptr + start, real, other=0.0)
        of_gate = tl.load(weight_ptr)
        gate = tl.dot(x, of_gate, gate)
        of_up = tl.load(weight_ptr + COLUMNS)
        up = tl.dot(x, of_up, up)
        if ROW_TILES == 2:
            x = tl.load(x_ptr + ROW_TILE * DEPTH + start, more, other=0.0)
            second_gate = tl.dot(x, of_gate, second_gate)
            second_up = tl.dot(x, of_up, second_up)
        weight_ptr += BLOCK_DEPTH * 2 * COLUMNS
    store_rows(out_ptr, gate_with(gate, up), 0, columns, ROWS, COLUMNS)
    if ROW_TILES == 2:
        second = gate_with(second_gate, second_up)
        store_rows(out_ptr, second, ROW_TILE, columns, ROWS, COLUMNS)
    fetch_ahead(
        *(ahead_ptr, tl.program_id(0), tl.num_programs(0)),
        *(AHEAD_CHUNKS, AHEAD_CHUNK, AHEAD_SHARES, AHEAD_STRIDE, LANES),
    )
