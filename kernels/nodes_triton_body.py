"""The Triton kernel of `nodes_triton`; imported at the call only: it needs Triton.

```
node 0           part 0:      one tile: the node, those above it, and the newest
node 1                        tokens of the cache, by their positions
...
                 slots ->     tile 0   tile 1   tile 2   tile 3 ...
nodes 0..7       part ->         1        2        1        2       older tokens
nodes 8..15                      1        2        1        2
```

What `decode_triton_body` does for one new token is done here for every node of a tree,
as if the nodes above it were in the cache: the same tiles, the same sums in the same
order. Older tokens are the same for all nodes but for a mask, so nodes share their
tiles. The newest differ from path to path, and each node has a tile of its own.
"""

import triton
import triton.language as tl

from jaxkv.kernels.decode_triton_body import (
    _LOWEST,
    attend_columns,
    head_offsets,
    normalise,
    seen_nothing,
    store_part,
)
from jaxkv.kernels.newest_triton_body import add_up, attend_newest, find_newest
from jaxkv.kernels.tree_triton_body import until_written
from jaxkv.kernels.weighing_triton_body import pay_sink


@triton.jit
def attend_older_tokens(
    q,  # [M, H]
    depth,  # [M], of the rows' nodes
    keys_ptr,  # of the sequence and key/value head, as the next two
    values_ptr,
    positions_ptr,
    upcoming,  # [D]
    position,  # of the root
    split,
    SCALE: tl.constexpr,
    DEPTHS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    NEWEST: tl.constexpr,
    DEPTHS_PAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
):
    """Attend to every `SPLITS`-th tile: maximum, totals and accumulator."""
    columns = tl.arange(0, HEAD_PAD)  # [H]
    order = tl.arange(0, DEPTHS_PAD)
    oldest = position + tl.max(depth, 0) - NEWEST
    maximum = tl.full([q.shape[0]], _LOWEST, tl.float32)
    total = tl.zeros([q.shape[0], BLOCK], tl.float32)
    acc = tl.zeros([q.shape[0], HEAD_PAD], tl.float32)
    # Positions are read one step ahead, as in `attend_older`.
    first = split * BLOCK + tl.arange(0, BLOCK)
    next_positions = tl.load(positions_ptr + first, first < SLOTS, other=-1)
    for start in range(0, SLOTS, SPLITS * BLOCK):
        slots = start + first  # [S]
        positions = next_positions
        next_slots = slots + SPLITS * BLOCK
        next_positions = tl.load(
            positions_ptr + next_slots, next_slots < SLOTS, other=-1
        )
        positions = tl.where(position >= 0, positions, -1)
        # Few tiles have a slot that the tree overwrites. What is overwritten may be
        # read, since it is no NaN.
        until = tl.full([BLOCK], DEPTHS, tl.int32)
        hit = (upcoming >= start + split * BLOCK) & (
            upcoming < start + (split + 1) * BLOCK
        )
        if tl.max(hit.to(tl.int32), 0) > 0:
            until = until_written(slots, upcoming, order, DEPTHS)
        until = tl.where(positions >= 0, until, 0)
        back = (position + depth)[:, None] - positions[None, :]  # [M, S]
        older = (back >= NEWEST) | (back <= 0)
        read = (positions >= 0) & ((positions <= oldest) | (positions >= position))
        _, maximum, total, acc = attend_columns(
            *(q, keys_ptr, values_ptr),
            slots[:, None] * HEAD_DIM + columns[None, :],
            read[:, None] & (columns < HEAD_DIM)[None, :],
            (depth[:, None] < until[None, :]) & older,
            *(maximum, total, acc, SCALE, PRECISION, CAP),
        )
    return maximum, add_up(total), acc


@triton.jit
def attend_newest_tokens(
    q,  # [G, H]
    node,
    key_ptr,  # [T, K, H] of the sequence, from the key/value head on
    value_ptr,  # likewise
    keys_ptr,  # of the sequence and key/value head, as the next two
    values_ptr,
    positions_ptr,
    upcoming_ptr,  # [D], likewise
    depths_ptr,  # [T] of the sequence
    paths_ptr,  # [T, NEWEST] of the sequence
    upcoming,  # [D]
    position,  # of the root
    maximum,  # [G]
    total,  # [G]
    acc,  # [G, H]
    SCALE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DEPTHS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NEWEST: tl.constexpr,
    NEWEST_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPTHS_PAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
):
    """Return the softmax of one node with its newest tokens added."""
    order = tl.arange(0, DEPTHS_PAD)
    depth = tl.load(depths_ptr + node)
    slot = tl.load(upcoming_ptr)
    for first in tl.range(0, NEWEST, NEWEST_BLOCK, num_stages=1):
        back = first + tl.arange(0, NEWEST_BLOCK)
        slots = find_newest(
            *(positions_ptr, slot, position, first - depth, SLOTS, NEWEST_BLOCK, CHUNK)
        )
        # What a node on the way has overwritten is gone, be it in the cache or not.
        gone = until_written(slots, upcoming, order, DEPTHS) <= depth
        slots = tl.where(gone, -1, slots)
        above = tl.load(paths_ptr + node * NEWEST + back)
        above_depth = depth - back
        place = tl.load(upcoming_ptr + above_depth, above >= 0, other=-1)
        again = (place[:, None] == upcoming[None, :]) & (
            order[None, :] > above_depth[:, None]
        )
        until = tl.min(tl.where(again, order[None, :], DEPTHS), 1)
        above = tl.where(depth < until, above, -1)
        maximum, total, acc = attend_newest(
            *(q, keys_ptr, values_ptr, slots, key_ptr, value_ptr),
            tl.where(above >= 0, above * KV_HEADS, -1),
            *(maximum, total, acc, SCALE, HEAD_DIM, HEAD_PAD, PRECISION, CAP),
        )
    return maximum, total, acc


@triton.jit
def attend_nodes(
    # Inputs.
    query_ptr,  # [B, T, K, G, H]
    key_ptr,  # [B, T, K, H]
    value_ptr,  # [B, T, K, H]
    keys_ptr,  # [B, K, S, H]
    values_ptr,  # [B, K, S, H]
    positions_ptr,  # [B, K, S]
    upcoming_ptr,  # [B, K, DEPTHS]
    depths_ptr,  # [B, T]
    paths_ptr,  # [B, T, NEWEST], the node so many above each, or -1
    position_ptr,  # [B]
    sink_ptr,  # [N], or a constant
    # Outputs.
    out_ptr,  # [PARTS, B, T, K, G, H], normalised within the part
    statistic_ptr,  # [PARTS, B, T, K, G], log2 of the part's sum of exponentials
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
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    NEWEST: tl.constexpr,
    NEWEST_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    AT_ONCE: tl.constexpr,  # nodes whose older tokens one program does
    ROWS: tl.constexpr,  # of its tile
    GROUP_PAD: tl.constexpr,  # powers of two
    DEPTHS_PAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    # What is not usual about the softmax.
    SINK: tl.constexpr,
    CAP: tl.constexpr,
):
    """Attend from a few nodes to a share of the older tokens, or from one to others."""
    NODE_BLOCKS: tl.constexpr = (NODES + AT_ONCE - 1) // AT_ONCE
    # As in `attend_split`, the newest tokens come first, node by node.
    turn = tl.program_id(1)
    split = turn - (AT_ONCE if PARTS > 1 else 0)
    row = (tl.program_id(0) // NODE_BLOCKS).to(tl.int64)  # of the cache, [B, K]
    first_node = (tl.program_id(0) % NODE_BLOCKS) * AT_ONCE
    batch = row // KV_HEADS
    kv_head = row % KV_HEADS
    keys_ptr += row * (SLOTS * HEAD_DIM)
    values_ptr += row * (SLOTS * HEAD_DIM)
    positions_ptr += row * SLOTS
    upcoming_ptr += row * DEPTHS
    depths_ptr += batch * NODES
    # From here on a query head of a node is `node * KV_HEADS * GROUP + head`.
    query_head = (batch * NODES * KV_HEADS + kv_head) * GROUP
    query_ptr += query_head * HEAD_DIM
    out_ptr += query_head * HEAD_DIM
    statistic_ptr += query_head
    PART: tl.constexpr = BATCH * NODES * KV_HEADS * GROUP

    order = tl.arange(0, DEPTHS_PAD)
    upcoming = tl.load(upcoming_ptr + order, order < DEPTHS, other=-1)
    position = tl.load(position_ptr + batch)
    maximum, total, acc = seen_nothing(GROUP_PAD, HEAD_PAD)
    if split >= 0:
        rows = tl.arange(0, ROWS)  # one query head of one node each
        columns = tl.arange(0, HEAD_PAD)
        nodes = first_node + rows // GROUP
        row_real = (rows < AT_ONCE * GROUP) & (nodes < NODES)
        heads = nodes * (KV_HEADS * GROUP) + rows % GROUP
        offsets = heads[:, None] * HEAD_DIM + columns[None, :]
        real = row_real[:, None] & (columns < HEAD_DIM)[None, :]
        older = attend_older_tokens(
            tl.load(query_ptr + offsets, real, other=0.0),
            tl.load(depths_ptr + nodes, row_real, other=0),
            *(keys_ptr, values_ptr, positions_ptr, upcoming, position, split),
            *(SCALE, DEPTHS, SLOTS, HEAD_DIM, SPLITS, BLOCK, NEWEST, DEPTHS_PAD),
            *(HEAD_PAD, PRECISION, CAP),
        )
        if PARTS == 1:
            maximum, total, acc = older
        else:
            out, statistic = normalise(older[0], older[1], older[2])
            part = (split + 1).to(tl.int64) * PART
            tl.store(out_ptr + part * HEAD_DIM + offsets, out, real)
            tl.store(statistic_ptr + part + heads, statistic, row_real)
    node = first_node + turn
    if (turn < AT_ONCE) & (node < NODES):
        query_offsets, query_real = head_offsets(GROUP, HEAD_DIM, GROUP_PAD, HEAD_PAD)
        at = node * (KV_HEADS * GROUP)
        q = tl.load(query_ptr + at * HEAD_DIM + query_offsets, query_real, other=0.0)
        first_key = (batch * NODES * KV_HEADS + kv_head) * HEAD_DIM
        maximum, total, acc = attend_newest_tokens(
            *(q, node, key_ptr + first_key, value_ptr + first_key, keys_ptr),
            *(values_ptr, positions_ptr, upcoming_ptr, depths_ptr),
            *(paths_ptr + batch * (NODES * NEWEST), upcoming, position),
            *(maximum, total, acc, SCALE, KV_HEADS, DEPTHS, SLOTS, HEAD_DIM),
            *(NEWEST, NEWEST_BLOCK, CHUNK, DEPTHS_PAD, HEAD_PAD, PRECISION, CAP),
        )
        if SINK:
            group = tl.arange(0, GROUP_PAD)
            maximum, total, acc = pay_sink(
                *(maximum, total, acc, sink_ptr, kv_head * GROUP + group),
                group < GROUP,
            )
        store_part(
            *(out_ptr + at * HEAD_DIM, statistic_ptr + at, 0, maximum, total, acc),
            *(GROUP, HEAD_DIM, GROUP_PAD, HEAD_PAD),
        )
