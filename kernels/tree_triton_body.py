"""Triton kernels of `tree_triton`; imported at the call only, since it needs Triton.

```
                slots ->    tile 0   tile 1   tile 2   tile 3 ...   nodes of the tree
                split ->       0        1        0        1         1, or one of its own
rows: node 0, head 0
      node 0, head 1         every row of the block against every tile of the split,
      node 1, head 0         masked by the depth of the row's node
      ...
```

One program per (sequence, key/value head), block of rows and split. A row is one query
head of one node, so that keys and values are read once for all of them. Blocks of rows
of the same key/value head are neighbours in the grid: only the first to come reads from
memory, the others find the tile in the L2 cache.

A slot is visible to the nodes above its `until`, the depth at which the path overwrites
it. Free slots are visible to none, and what is visible to none is not read: that saves
its bytes and keeps its NaN out of the products. The nodes' own keys and values are the
last tiles, with a mask of ancestors: 32 columns a tile, one bit of a word each.

Numerics are those of `decode_triton_body`, whose `combine_splits` joins the splits.

Row offsets are 64-bit; offsets within a row are 32-bit (S x H < 2^31).
"""

import triton
import triton.language as tl

from jaxkv.kernels.decode_triton_body import _LOWEST
from jaxkv.kernels.weighing_triton_body import capped, pay_sink


@triton.jit
def until_written(slots, upcoming, order, DEPTHS: tl.constexpr):
    """Return the depth at which each slot is overwritten first, int32 `[S]`."""
    hits = slots[:, None] == upcoming[None, :]
    return tl.min(tl.where(hits, order[None, :], DEPTHS), 1)


@triton.jit
def attend_columns(
    q,  # [M, H]
    keys_ptr,
    values_ptr,
    offsets,  # [C, H]
    real,  # [C, H]
    visible,  # [M, C]
    maximum,  # [M]
    total,  # [M]
    acc,  # [M, H]
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
):
    """Return the softmax with one tile of keys and values added."""
    k = tl.load(keys_ptr + offsets, real, other=0.0)
    logits = SCALE * tl.dot(q, tl.trans(k), input_precision=PRECISION)
    logits = tl.where(visible, capped(logits, CAP), float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(logits, 1))
    weights = tl.exp2(logits - new_maximum[:, None])
    rescale = tl.exp2(maximum - new_maximum)
    total = total * rescale + tl.sum(weights, 1)
    v = tl.load(values_ptr + offsets, real, other=0.0)
    acc = tl.dot(
        weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION
    )
    return new_maximum, total, acc


@triton.jit
def attend_tree_split(
    # Inputs.
    query_ptr,  # [B, T, K, G, H]
    key_ptr,  # [B, T, K, H]
    value_ptr,  # [B, T, K, H]
    keys_ptr,  # [B, K, S, H]
    values_ptr,  # [B, K, S, H]
    positions_ptr,  # [B, K, S]
    upcoming_ptr,  # [B, K, DEPTHS]
    depths_ptr,  # [B, T]
    ancestors_ptr,  # [B, T, WORDS], 32 nodes a word
    sink_ptr,  # [N], or a constant
    # Outputs.
    out_ptr,  # [SPLITS, B, T, K, G, H], normalised within the split
    statistic_ptr,  # [SPLITS, B, T, K, G], log2 of the split's sum of exponentials
    # Sizes.
    SCALE: tl.constexpr,  # times log2(e)
    BATCH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    NODES: tl.constexpr,
    DEPTHS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    # Tiles.
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a block
    APART: tl.constexpr,  # whether the last split has all nodes and no slots
    DEPTHS_PAD: tl.constexpr,  # powers of two
    HEAD_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    # What is not usual about the softmax.
    SINK: tl.constexpr,
    CAP: tl.constexpr,
):
    """Attend from a block of rows to one split's share of the tiles."""
    ROW_BLOCKS: tl.constexpr = (NODES * GROUP + ROWS - 1) // ROWS
    WORDS: tl.constexpr = (NODES + 31) // 32
    split = tl.program_id(1)
    head = (tl.program_id(0) // ROW_BLOCKS).to(tl.int64)  # of the cache, [B, K]
    batch = head // KV_HEADS
    kv_head = head % KV_HEADS
    keys_ptr += head * (SLOTS * HEAD_DIM)
    values_ptr += head * (SLOTS * HEAD_DIM)
    positions_ptr += head * SLOTS
    upcoming_ptr += head * DEPTHS
    depths_ptr += batch * NODES

    rows = (tl.program_id(0) % ROW_BLOCKS) * ROWS + tl.arange(0, ROWS)  # [M]
    columns = tl.arange(0, HEAD_PAD)  # [H]
    node = rows // GROUP
    row_real = node < NODES
    depth = tl.load(depths_ptr + node, row_real, other=0)
    # Of the query head in [B, T, N].
    query_head = ((batch * NODES + node) * KV_HEADS + kv_head) * GROUP + rows % GROUP
    query_offsets = query_head[:, None] * HEAD_DIM + columns[None, :]
    query_real = row_real[:, None] & (columns < HEAD_DIM)[None, :]
    q = tl.load(query_ptr + query_offsets, query_real, other=0.0)
    order = tl.arange(0, DEPTHS_PAD)
    upcoming = tl.load(upcoming_ptr + order, order < DEPTHS, other=-1)

    maximum = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    # Slots are dealt to the splits from the first, nodes from the last: those have the
    # fewest slots.
    SLOT_STEP: tl.constexpr = (SPLITS - 1 if APART else SPLITS) * BLOCK
    NODE_STEP: tl.constexpr = 32 if APART else SPLITS * 32
    end_slots = SLOTS
    first_node = (SPLITS - 1 - split) * 32
    if APART:
        end_slots = tl.where(split == SPLITS - 1, 0, SLOTS)
        first_node = tl.where(split == SPLITS - 1, 0, NODES)
    # Positions are read one step ahead, as in `attend_split`.
    first = split * BLOCK + tl.arange(0, BLOCK)
    next_positions = tl.load(positions_ptr + first, first < SLOTS, other=-1)
    for start in range(0, end_slots, SLOT_STEP):
        slots = start + first  # [S]
        until = until_written(slots, upcoming, order, DEPTHS)
        until = tl.where(next_positions >= 0, until, 0)
        next_slots = slots + SLOT_STEP
        next_positions = tl.load(
            positions_ptr + next_slots, next_slots < SLOTS, other=-1
        )
        maximum, total, acc = attend_columns(
            *(q, keys_ptr, values_ptr),
            slots[:, None] * HEAD_DIM + columns[None, :],
            (until > 0)[:, None] & (columns < HEAD_DIM)[None, :],
            depth[:, None] < until[None, :],
            *(maximum, total, acc, SCALE, PRECISION, CAP),
        )

    own = tl.arange(0, 32)
    for start in range(first_node, NODES, NODE_STEP):
        nodes = start + own  # [C]
        node_real = nodes < NODES
        node_depth = tl.load(depths_ptr + nodes, node_real, other=0)
        slots = tl.load(upcoming_ptr + node_depth)
        again = (slots[:, None] == upcoming[None, :]) & (
            order[None, :] > node_depth[:, None]
        )
        until = tl.min(tl.where(again, order[None, :], DEPTHS), 1)
        word = tl.load(
            ancestors_ptr + (batch * NODES + node) * WORDS + start // 32,
            row_real,
            other=0,
        )
        is_ancestor = ((word[:, None] >> own[None, :]) & 1) != 0
        node_head = (batch * NODES + nodes) * KV_HEADS + kv_head  # in [B, T, K]
        maximum, total, acc = attend_columns(
            *(q, key_ptr, value_ptr),
            node_head[:, None] * HEAD_DIM + columns[None, :],
            node_real[:, None] & (columns < HEAD_DIM)[None, :],
            is_ancestor & (depth[:, None] < until[None, :]),
            *(maximum, total, acc, SCALE, PRECISION, CAP),
        )

    if SINK:
        maximum, total, acc = pay_sink(
            *(maximum, total, acc, sink_ptr, kv_head * GROUP + rows % GROUP),
            row_real & (rows < tl.where(split == 0, NODES * GROUP, 0)),
        )
    # A split in which a row sees nothing has total 0; all others have at least 1.
    total = tl.maximum(total, 1e-30)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    part = split.to(tl.int64) * (BATCH * NODES * KV_HEADS * GROUP)
    tl.store(out_ptr + part * HEAD_DIM + query_offsets, out, query_real)
    statistic = maximum + tl.log2(total)
    tl.store(statistic_ptr + part + query_head, statistic, row_real)


@triton.jit
def write_path(
    # Inputs; the cache (keys, values, positions, target) is also written, in place.
    key_ptr,  # [B, T, K, H]
    value_ptr,  # [B, T, K, H]
    keys_ptr,  # [B, K, S, H]
    values_ptr,  # [B, K, S, H]
    positions_ptr,  # [B, K, S]
    target_ptr,  # [B, K]
    upcoming_ptr,  # [B, K, STEPS + 1]
    path_ptr,  # [B, STEPS]
    count_ptr,  # [B]
    position_ptr,  # [B]
    # The cache once more: see `triton_call.call`.
    _keys_out_ptr,
    _values_out_ptr,
    _positions_out_ptr,
    _target_out_ptr,
    # Sizes.
    KV_HEADS: tl.constexpr,
    NODES: tl.constexpr,
    STEPS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STEPS_PAD: tl.constexpr,  # powers of two
    HEAD_PAD: tl.constexpr,
):
    """Write the first nodes of a path into one row; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    batch = row // KV_HEADS
    upcoming_ptr += row * (STEPS + 1)
    steps = tl.arange(0, STEPS_PAD)
    columns = tl.arange(0, HEAD_PAD)
    count = tl.load(count_ptr + batch)
    position = tl.load(position_ptr + batch)
    in_path = steps < STEPS
    node = tl.load(path_ptr + batch * STEPS + steps, in_path, other=0)
    slots = tl.load(upcoming_ptr + steps, in_path, other=-1)
    written = steps < count
    # A second look along the other axis of a matrix: where a step comes back to a
    # slot, only the last of them is written.
    same = slots[:, None] == slots[None, :]
    again = same & (steps[None, :] > steps[:, None]) & written[None, :]
    lasts = tl.max(again.to(tl.int32), 1) == 0
    written = written & lasts & (slots >= 0) & (slots < SLOTS)

    real = written[:, None] & (columns < HEAD_DIM)[None, :]
    source = (batch * NODES + node) * KV_HEADS + row % KV_HEADS
    source = source[:, None] * HEAD_DIM + columns[None, :]
    place = slots.to(tl.int64) + row * SLOTS
    places = place[:, None] * HEAD_DIM + columns[None, :]
    k = tl.load(key_ptr + source, real)
    v = tl.load(value_ptr + source, real)
    tl.store(keys_ptr + places, k.to(keys_ptr.dtype.element_ty), real)
    tl.store(values_ptr + places, v.to(values_ptr.dtype.element_ty), real)
    tl.store(positions_ptr + place, position + steps, written)
    target = tl.load(upcoming_ptr + count)
    tl.store(target_ptr + row, target, count > 0)
