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
"""

import triton
import triton.language as tl


@triton.jit
def project_part(
    x_ptr,  # [ROWS, DEPTH]
    weight_ptr,  # [DEPTH, COLUMNS]
    out_ptr,  # [PARTS, ROWS, COLUMNS], output
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,  # columns of a tile
    BLOCK_DEPTH: tl.constexpr,
):
    """Multiply all rows by a share of the depth of a block of columns."""
    part = tl.program_id(1)
    SHARE: tl.constexpr = DEPTH // PARTS
    rows = tl.arange(0, ROWS_PAD)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    depth = part * SHARE + tl.arange(0, BLOCK_DEPTH)
    real = (rows < ROWS)[:, None]
    x_ptr += rows[:, None] * DEPTH + depth[None, :]
    weight_ptr += depth[:, None].to(tl.int64) * COLUMNS + columns[None, :]
    total = tl.zeros([ROWS_PAD, BLOCK], tl.float32)
    for start in range(0, SHARE, BLOCK_DEPTH):
        x = tl.load(x_ptr + start, real, other=0.0)
        weight = tl.load(weight_ptr)
        total = tl.dot(x, weight, total)
        weight_ptr += BLOCK_DEPTH * COLUMNS
    at = (part * ROWS + rows)[:, None] * COLUMNS + columns[None, :]
    tl.store(out_ptr + at, total, real)


@triton.jit
def project_gated(
    x_ptr,  # [ROWS, DEPTH]
    weight_ptr,  # [DEPTH, 2, COLUMNS]: gate, up
    out_ptr,  # [ROWS, COLUMNS], output
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Multiply all rows by a block of gates and of what they gate, and gate it."""
    rows = tl.arange(0, ROWS_PAD)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    depth = tl.arange(0, BLOCK_DEPTH)
    real = (rows < ROWS)[:, None]
    x_ptr += rows[:, None] * DEPTH + depth[None, :]
    weight_ptr += depth[:, None].to(tl.int64) * (2 * COLUMNS) + columns[None, :]
    gate = tl.zeros([ROWS_PAD, BLOCK], tl.float32)
    up = tl.zeros([ROWS_PAD, BLOCK], tl.float32)
    for start in range(0, DEPTH, BLOCK_DEPTH):
        x = tl.load(x_ptr + start, real, other=0.0)
        weight = tl.load(weight_ptr)
        gate = tl.dot(x, weight, gate)
        weight = tl.load(weight_ptr + COLUMNS)
        up = tl.dot(x, weight, up)
        weight_ptr += BLOCK_DEPTH * 2 * COLUMNS
    out = gate / (1 + tl.exp(-gate)) * up
    at = rows[:, None] * COLUMNS + columns[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), real)
