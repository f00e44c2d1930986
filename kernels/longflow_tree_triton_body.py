"""Triton kernels of `longflow_tree_triton`, the first two launches; needs Triton.

```
1  attend_tree   per (KV head, rows of nodes, split): the softmax of every node over
                 all slots but the root's, and all nodes above it; their logits stay
2  list_least    per (row, node, chunk of slots): what each slot is worth to the node
                 if its path overwrites none of them, and the least of the chunk; one
                 program more: what the tokens of its path are worth
3  finish_paths  per (row, node): see `longflow_finish_body`
```

A row is a sequence, or one of its KV heads where each has a victim of its own. The root
is written to a slot that is known beforehand. So it is an ordinary slot of every node's
softmax: its logit takes the place of the old one's, and so do norm and position. What
else a node's path overwrites, its ancestors' victims, only takes shares away from that
softmax: a slot is worth as much as is said here, or more.

Logits are in base 2, and those against nodes stand behind those against slots. Chunks
take tiles of 32 slots in turn, so that tokens that lie together and are worth little do
not all fall into one of them.
"""

import triton
import triton.language as tl

from jaxkv.kernels.decode_triton_body import _LOWEST, attend_columns, normalise
from jaxkv.kernels.longflow_choice_body import _MAX_INT, slot_order, weigh_slots
from jaxkv.kernels.weighing_triton_body import pay_sink

_TILE = tl.constexpr(32)
# Of what is nowhere: behind all pairs of an order and a slot.
_LAST = tl.constexpr(9223372036854775807)


@triton.jit
def attend_tree(
    # Inputs.
    query_ptr,  # [B, T, K, G, H]
    key_ptr,  # [B, T, K, H]
    value_ptr,  # [B, T, K, H]
    keys_ptr,  # [B, K, S, H]
    values_ptr,  # [B, K, S, H]
    positions_ptr,  # [B, K, S]
    target_ptr,  # [B, K]
    position_ptr,  # [B]
    ancestors_ptr,  # [B, T, WORDS], 32 nodes a word
    sink_ptr,  # [N], or a constant
    # Outputs.
    parts_ptr,  # [SPLITS, B, T, K, G, H], normalised within the split
    statistic_ptr,  # [SPLITS, B, T, K, G], log2 of the split's sum of exponentials
    logits_ptr,  # [B, K, T, G, STRIDE], the first SLOTS of slots, from NEW on of nodes
    new_norms_ptr,  # [B, K, T]
    # Sizes.
    SCALE: tl.constexpr,  # times log2(e)
    BATCH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    NODES: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NEW: tl.constexpr,
    STRIDE: tl.constexpr,
    SCORE: tl.constexpr,
    # Tiles.
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a block
    APART: tl.constexpr,  # whether the last split has all nodes and no slots
    HEAD_PAD: tl.constexpr,  # a power of two
    PRECISION: tl.constexpr,
    # What is not usual about the softmax.
    SINK: tl.constexpr,
    CAP: tl.constexpr,
):
    """Attend from a block of rows to one split's share of the tiles; leave the logits.

    Nothing is overwritten here but what the root overwrites.
    """
    ROW_BLOCKS: tl.constexpr = (NODES * GROUP + ROWS - 1) // ROWS
    WORDS: tl.constexpr = (NODES + 31) // 32
    split = tl.program_id(1)
    row_block = tl.program_id(0) % ROW_BLOCKS
    head = (tl.program_id(0) // ROW_BLOCKS).to(tl.int64)  # of the cache, [B, K]
    batch = head // KV_HEADS
    kv_head = head % KV_HEADS
    keys_ptr += head * (SLOTS * HEAD_DIM)
    values_ptr += head * (SLOTS * HEAD_DIM)
    positions_ptr += head * SLOTS

    rows = row_block * ROWS + tl.arange(0, ROWS)  # [M]
    columns = tl.arange(0, HEAD_PAD)  # [H]
    node = rows // GROUP
    row_real = node < NODES
    # Of the query head in [B, T, N].
    query_head = ((batch * NODES + node) * KV_HEADS + kv_head) * GROUP + rows % GROUP
    query_offsets = query_head[:, None] * HEAD_DIM + columns[None, :]
    query_real = row_real[:, None] & (columns < HEAD_DIM)[None, :]
    q = tl.load(query_ptr + query_offsets, query_real, other=0.0)
    left = logits_ptr + (head * (NODES * GROUP) + rows)[:, None] * STRIDE
    position = tl.load(position_ptr + batch)
    target = tl.load(target_ptr + head)

    maximum = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    # As in `attend_tree_split`: nodes go to the splits from the last one on.
    SLOT_STEP: tl.constexpr = (SPLITS - 1 if APART else SPLITS) * BLOCK
    NODE_STEP: tl.constexpr = BLOCK if APART else SPLITS * BLOCK
    end_slots = SLOTS
    first_node = (SPLITS - 1 - split) * BLOCK
    if APART:
        end_slots = tl.where(split == SPLITS - 1, 0, SLOTS)
        first_node = tl.where(split == SPLITS - 1, 0, NODES)
    first = split * BLOCK + tl.arange(0, BLOCK)
    next_positions = tl.load(positions_ptr + first, first < SLOTS, other=-1)
    for start in range(0, end_slots, SLOT_STEP):
        slots = start + first  # [S]
        # A finished row reads no slot.
        positions = tl.where(position >= 0, next_positions, -1)
        occupied = (positions >= 0) & (slots != target)
        next_slots = slots + SLOT_STEP
        next_positions = tl.load(
            positions_ptr + next_slots, next_slots < SLOTS, other=-1
        )
        logits, maximum, total, acc = attend_columns(
            *(q, keys_ptr, values_ptr),
            slots[:, None] * HEAD_DIM + columns[None, :],
            occupied[:, None] & (columns < HEAD_DIM)[None, :],
            occupied[None, :],
            *(maximum, total, acc, SCALE, PRECISION, CAP),
        )
        tl.store(
            left + slots[None, :],
            logits,
            row_real[:, None] & (slots < SLOTS)[None, :],
        )

    own = tl.arange(0, BLOCK)
    for start in range(first_node, NODES, NODE_STEP):
        nodes = start + own  # [C]
        node_real = nodes < NODES
        word = tl.load(
            ancestors_ptr
            + (batch * NODES + node)[:, None] * WORDS
            + (nodes // 32)[None, :],
            row_real[:, None] & node_real[None, :],
            other=0,
        )
        is_ancestor = ((word >> (nodes % 32)[None, :]) & 1) != 0
        node_head = (batch * NODES + nodes) * KV_HEADS + kv_head  # in [B, T, K]
        offsets = node_head[:, None] * HEAD_DIM + columns[None, :]
        real = node_real[:, None] & (columns < HEAD_DIM)[None, :]
        logits, maximum, total, acc = attend_columns(
            *(q, key_ptr, value_ptr, offsets, real, is_ancestor),
            *(maximum, total, acc, SCALE, PRECISION, CAP),
        )
        tl.store(
            left + NEW + nodes[None, :],
            logits,
            row_real[:, None] & node_real[None, :],
        )
        if row_block == 0:
            v = tl.load(value_ptr + offsets, real, other=0.0).to(tl.float32)
            if SCORE == "l1":
                norms = tl.sum(tl.abs(v), 1)
            elif SCORE == "l2":
                norms = tl.sqrt(tl.sum(v * v, 1))
            else:
                norms = tl.full([BLOCK], 1.0, tl.float32)
            tl.store(new_norms_ptr + head * NODES + nodes, norms, node_real)

    total = tl.sum(total, 1)
    if SINK:
        maximum, total, acc = pay_sink(
            *(maximum, total, acc, sink_ptr, kv_head * GROUP + rows % GROUP),
            row_real & (rows < tl.where(split == 0, NODES * GROUP, 0)),
        )
    out, statistic = normalise(maximum, total, acc)
    part = split.to(tl.int64) * (BATCH * NODES * KV_HEADS * GROUP)
    tl.store(parts_ptr + part * HEAD_DIM + query_offsets, out, query_real)
    tl.store(statistic_ptr + part + query_head, statistic, row_real)


@triton.jit
def pair(order, slot):
    """Return int64, ordered by order and then by slot, which is not negative."""
    return (order.to(tl.int64) << 32) | slot.to(tl.int64)


@triton.jit
def path_order(importance, positions, oldest, newest, real):
    """Return the order of what tokens of a path hold, `_MAX_INT` where none does."""
    bits = importance.to(tl.int32, bitcast=True)
    barred = (positions < oldest) | (positions > newest)
    return tl.where(real, tl.where(barred, bits, bits - _MAX_INT), _MAX_INT)


@triton.jit
def read_slots(
    logits_ptr,  # of the node; offsets of its heads come next
    offsets,  # [HEADS], int64
    norms_ptr,
    positions_ptr,
    new_norms_ptr,
    heads,  # [HEADS], of the cache, [B, K], int64
    slots,  # [S]
    real,  # [HEADS]
    target,  # [HEADS], the root's slot
    position,  # of the root
    NODES: tl.constexpr,
    SLOTS: tl.constexpr,
    NEW: tl.constexpr,
):
    """Return logits, norms and positions `[HEADS, S]` of slots, the root in its own."""
    there = real[:, None] & (slots < SLOTS)[None, :]
    held = heads[:, None] * SLOTS + slots[None, :]
    logits = tl.load(
        logits_ptr + offsets[:, None] + slots[None, :], there, other=float("-inf")
    )
    norms = tl.load(norms_ptr + held, there, other=0.0)
    positions = tl.load(positions_ptr + held, there, other=-1)
    is_root = there & (slots[None, :] == target[:, None])
    root = tl.load(logits_ptr + offsets + NEW, real, other=float("-inf"))
    root_norm = tl.load(new_norms_ptr + heads * NODES, real, other=0.0)
    logits = tl.where(is_root, root[:, None], logits)
    norms = tl.where(is_root, root_norm[:, None], norms)
    return logits, norms, tl.where(is_root, position, positions)


@triton.jit
def list_least(
    # Inputs.
    logits_ptr,  # [B, K, T, G, STRIDE]
    statistic_ptr,  # [SPLITS, B, T, K, G]
    norms_ptr,  # [B, K, S]
    positions_ptr,  # [B, K, S]
    new_norms_ptr,  # [B, K, T]
    target_ptr,  # [B, K]
    position_ptr,  # [B]
    oldest_ptr,  # [B]
    depths_ptr,  # [B, T]
    paths_ptr,  # [B, T, DEPTHS], the node of each depth above each, or -1
    # Outputs.
    whole_ptr,  # [ROWS, T, HEADS], log2 of the whole sum of exponentials
    orders_ptr,  # [ROWS, T, CHUNKS, LIST], the least of each chunk in their order
    listed_ptr,  # [ROWS, T, CHUNKS, LIST], and their slots
    path_orders_ptr,  # [ROWS, T, DEPTHS]
    # Sizes.
    BATCH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TARGETS: tl.constexpr,  # KV heads that share the victim: K or 1
    HEADS: tl.constexpr,  # query heads that share it: N or G
    NODES: tl.constexpr,
    DEPTHS: tl.constexpr,
    SLOTS: tl.constexpr,
    NEW: tl.constexpr,
    STRIDE: tl.constexpr,
    RECENT: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    LIST: tl.constexpr,
    SPLITS_PAD: tl.constexpr,  # powers of two
    HEADS_PAD: tl.constexpr,
    DEPTHS_PAD: tl.constexpr,
):
    """List the least slots of a chunk for one node, or do the tokens of its path."""
    row_node = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    row = row_node // NODES
    node = row_node % NODES
    batch = row * TARGETS // KV_HEADS
    splits = tl.arange(0, SPLITS_PAD)
    heads = tl.arange(0, HEADS_PAD)
    head_real = heads < HEADS
    kv_heads = row * TARGETS + heads // GROUP  # [HEADS], of [B, K]
    offsets = ((kv_heads * NODES + node) * GROUP + heads % GROUP) * STRIDE
    first_head = (batch * NODES + node) * KV_HEADS + row * TARGETS % KV_HEADS
    parts = tl.load(
        statistic_ptr
        + splits[:, None].to(tl.int64) * (BATCH * NODES * KV_HEADS * GROUP)
        + (first_head * GROUP + heads)[None, :],
        (splits < SPLITS)[:, None] & head_real[None, :],
        other=_LOWEST,
    )
    maximum = tl.max(parts, 0)
    whole = maximum + tl.log2(tl.sum(tl.exp2(parts - maximum[None, :]), 0))
    position = tl.load(position_ptr + batch)
    oldest = tl.load(oldest_ptr + batch)
    newest = position + tl.load(depths_ptr + batch * NODES + node) - RECENT
    if chunk < CHUNKS:
        lanes = tl.arange(0, CHUNK)
        slots = (lanes // _TILE * CHUNKS + chunk) * _TILE + lanes % _TILE
        target = tl.load(target_ptr + kv_heads, head_real, other=-1)
        logits, norms, positions = read_slots(
            *(logits_ptr, offsets, norms_ptr, positions_ptr, new_norms_ptr, kv_heads),
            *(slots, head_real, target, position, NODES, SLOTS, NEW),
        )
        importance, free, protected = weigh_slots(
            logits, whole, norms, positions, oldest, newest
        )
        order = slot_order(importance, free, protected, slots < SLOTS)
        pairs = pair(order, slots)
        place = (row_node * CHUNKS + chunk) * LIST
        for i in range(LIST):
            least = tl.min(pairs, 0)
            tl.store(orders_ptr + place + i, (least >> 32).to(tl.int32))
            tl.store(listed_ptr + place + i, least.to(tl.int32))
            pairs = tl.where(pairs == least, _LAST, pairs)
    else:
        tl.store(whole_ptr + row_node * HEADS + heads, whole, head_real)
        steps = tl.arange(0, DEPTHS_PAD)
        path = (batch * NODES + node) * DEPTHS + steps
        above = tl.load(paths_ptr + path, steps < DEPTHS, other=-1)
        # The root is a slot among the others.
        on_path = above > 0
        own_real = head_real[:, None] & on_path[None, :]
        own = tl.load(
            logits_ptr + offsets[:, None] + NEW + above[None, :],
            own_real,
            other=float("-inf"),
        )
        own_norms = tl.load(
            new_norms_ptr + kv_heads[:, None] * NODES + above[None, :],
            own_real,
            other=0.0,
        )
        worth = tl.sum(tl.exp2(own - whole[:, None]) * own_norms, 0)
        own_order = path_order(worth, position + steps, oldest, newest, on_path)
        own_place = row_node * DEPTHS + steps
        tl.store(path_orders_ptr + own_place, own_order, steps < DEPTHS)
