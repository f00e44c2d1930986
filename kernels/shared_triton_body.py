"""Triton kernels of `shared_triton`; imported at the call only, since it needs Triton.

```
                    slots of a document ->    tile 0   tile 1   tile 2   tile 3 ...
                    split ->                     0        1        0        1
rows: row 0, node 0, head 0
      row 0, node 0, head 1      every row of the block against every tile of the split
      row 0, node 1, head 0
      ...
      row 3, node 0, head 0      the next row of the batch about the same document
```

One program per (document, key/value head), block of rows and split, as in
`tree_triton_body`, whose nodes are rows here, too: all of them see the whole document.
Blocks of rows of the same head are neighbours in the grid, so that the first to come
reads from memory, and the others find the tile in the L2 cache.

Numerics are those of `decode_triton_body`.

Row offsets are 64-bit; offsets within a document's head are 32-bit (P x H < 2^31).
"""

import triton
import triton.language as tl

from jaxkv.kernels.decode_triton_body import _LOWEST, attend_columns, normalise
from jaxkv.kernels.newest_triton_body import add_up


@triton.jit
def attend_documents(
    # Inputs.
    query_ptr,  # [B, T, K, G, H]
    keys_ptr,  # [D, K, P, H]
    values_ptr,  # [D, K, P, H]
    positions_ptr,  # [D, K, P]
    rows_ptr,  # [D, MOST], rows of the batch about a document; B where it has no more
    # Outputs.
    out_ptr,  # [SPLITS, B, T, K, G, H], normalised within the split
    statistic_ptr,  # [SPLITS, B, T, K, G], log2 of the split's sum of exponentials
    # Sizes.
    SCALE: tl.constexpr,  # times log2(e)
    BATCH: tl.constexpr,
    NODES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    MOST: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    # Tiles.
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # of a block
    HEAD_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
):
    """Attend from a block of rows to one split's share of their document's tiles."""
    ROW_BLOCKS: tl.constexpr = (MOST * NODES * GROUP + ROWS - 1) // ROWS
    split = tl.program_id(1)
    head = (tl.program_id(0) // ROW_BLOCKS).to(tl.int64)  # of the documents, [D, K]
    kv_head = head % KV_HEADS
    keys_ptr += head * (SLOTS * HEAD_DIM)
    values_ptr += head * (SLOTS * HEAD_DIM)
    positions_ptr += head * SLOTS
    rows_ptr += head // KV_HEADS * MOST

    first_row = (tl.program_id(0) % ROW_BLOCKS) * ROWS
    rows = first_row + tl.arange(0, ROWS)  # [M]
    columns = tl.arange(0, HEAD_PAD)  # [H]
    place = rows // (NODES * GROUP)
    row = tl.load(rows_ptr + place, place < MOST, other=BATCH).to(tl.int64)
    node = rows // GROUP % NODES
    # Of the query head in [B, T, N].
    query_head = ((row * NODES + node) * KV_HEADS + kv_head) * GROUP + rows % GROUP
    query_offsets = query_head[:, None] * HEAD_DIM + columns[None, :]
    query_real = (row < BATCH)[:, None] & (columns < HEAD_DIM)[None, :]
    q = tl.load(query_ptr + query_offsets, query_real, other=0.0)

    maximum = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    # Rows stand in order, so that a block without a first one has none.
    first_place = first_row // (NODES * GROUP)
    end = tl.where(tl.load(rows_ptr + first_place) < BATCH, SLOTS, 0)
    # Positions are read one step ahead, as in `attend_split`.
    first = split * BLOCK + tl.arange(0, BLOCK)
    next_positions = tl.load(positions_ptr + first, first < SLOTS, other=-1)
    for start in range(0, end, SPLITS * BLOCK):
        slots = start + first  # [P]
        occupied = next_positions >= 0
        next_slots = slots + SPLITS * BLOCK
        next_positions = tl.load(
            positions_ptr + next_slots, next_slots < SLOTS, other=-1
        )
        _, maximum, total, acc = attend_columns(
            *(q, keys_ptr, values_ptr),
            slots[:, None] * HEAD_DIM + columns[None, :],
            occupied[:, None] & (columns < HEAD_DIM)[None, :],
            occupied[None, :],
            *(maximum, total, acc, SCALE, PRECISION, CAP),
        )
    out, statistic = normalise(maximum, add_up(total), acc)
    part = split.to(tl.int64) * (BATCH * NODES * KV_HEADS * GROUP)
    tl.store(out_ptr + part * HEAD_DIM + query_offsets, out, query_real)
    tl.store(statistic_ptr + part + query_head, statistic, row < BATCH)


@triton.jit
def load_parts(
    parts_ptr,  # [SPLITS, ..., N, H]
    statistic_ptr,  # [SPLITS, ..., N]
    row,
    num_rows,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Return the outputs of one query head and what each is worth."""
    splits = tl.arange(0, SPLITS_PAD)
    columns = tl.arange(0, HEAD_PAD)
    rows = splits * num_rows + row
    statistic = tl.load(statistic_ptr + rows, splits < SPLITS, other=float("-inf"))
    real = (splits < SPLITS)[:, None] & (columns < HEAD_DIM)[None, :]
    parts = tl.load(
        parts_ptr + rows[:, None] * HEAD_DIM + columns[None, :], real, other=0.0
    )
    return parts, statistic


@triton.jit
def join_parts(
    own_ptr,  # [OWN, ..., N, H]
    own_statistic_ptr,  # [OWN, ..., N]
    shared_ptr,  # [SHARED, ..., N, H]
    shared_statistic_ptr,  # [SHARED, ..., N]
    out_ptr,  # [..., N, H]
    HEAD_DIM: tl.constexpr,
    OWN: tl.constexpr,
    SHARED: tl.constexpr,
    OWN_PAD: tl.constexpr,
    SHARED_PAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Join the parts of one query head over its own slots and over shared ones."""
    row = tl.program_id(0).to(tl.int64)
    num_rows = tl.num_programs(0)
    own, own_statistic = load_parts(
        *(own_ptr, own_statistic_ptr, row, num_rows, HEAD_DIM, OWN, OWN_PAD, HEAD_PAD)
    )
    shared, shared_statistic = load_parts(
        *(shared_ptr, shared_statistic_ptr, row, num_rows),
        *(HEAD_DIM, SHARED, SHARED_PAD, HEAD_PAD),
    )
    maximum = tl.maximum(tl.max(own_statistic, 0), tl.max(shared_statistic, 0))
    own_weights = tl.exp2(own_statistic - maximum)  # none of them NaN
    weights = tl.exp2(shared_statistic - maximum)
    out = tl.sum(own_weights[:, None] * own, 0) + tl.sum(weights[:, None] * shared, 0)
    out = out / (tl.sum(own_weights, 0) + tl.sum(weights, 0))
    columns = tl.arange(0, HEAD_PAD)
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * HEAD_DIM + columns, out, columns < HEAD_DIM)
