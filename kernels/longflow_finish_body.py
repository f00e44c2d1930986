"""The Triton kernel of `longflow_tree_triton`'s third launch; needs Triton.

One program per (row, node) and some KV heads follows the path to the node
(`longflow_path_body`), joins the splits, and takes away what the path has overwritten:
a few slots, whose values are read once more.
"""

import triton
import triton.language as tl

from jaxkv.kernels.longflow_path_body import (
    first_and_later,
    follow_path,
    look_up,
)
from jaxkv.kernels.weighing_triton_body import _LOG2_E

# The share of a head's attention up to which the rest is got by taking away. Beyond it
# the rounding of weights to the dtype of the values would show.
_MOST = tl.constexpr(0.25)
_LEAST = tl.constexpr(1e-30)
_AT_ONCE = tl.constexpr(16)  # slots or nodes whose values are in registers


@triton.jit
def read_sinks(sink_ptr, heads, real, SINK: tl.constexpr):
    """Return the sinks of some heads in base 2, `-inf` where there is none."""
    sinks = tl.full(heads.shape, float("-inf"), tl.float32)
    if SINK:
        sinks = tl.load(sink_ptr + heads, real, other=float("-inf")).to(tl.float32)
        sinks *= _LOG2_E
    return sinks


@triton.jit
def take_away(
    logits_ptr,  # of the node and KV head; offsets of its group come next
    offsets,  # [G]
    group_real,
    whole,  # [G]
    key_value_ptr,  # values of the slots of the KV head
    value_ptr,  # [T, K, H] of the sequence, from the KV head on
    path,  # [D]
    slots,  # [D]
    is_first,  # [D]
    later,  # [D]
    depth,
    target,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NEW: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DEPTHS_PAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Return the share `[G]` that the path has overwritten, and its values `[G, H]`."""
    steps = tl.arange(0, DEPTHS_PAD)
    columns = tl.arange(0, HEAD_PAD)
    column_real = (columns < HEAD_DIM)[None, :]
    share = tl.zeros([GROUP_PAD], tl.float32)
    lost = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    for start in range(1, depth + 1, _AT_ONCE):
        step = start + tl.arange(0, _AT_ONCE)
        slot = look_up(slots, steps, step)
        node = look_up(path, steps, step)
        on_path = step <= depth
        gone = on_path & (look_up(is_first.to(tl.int32), steps, step) > 0)
        ended = on_path & (look_up(later, steps, step) <= depth)
        is_root = slot == target
        old = tl.load(
            logits_ptr + offsets[None, :] + tl.where(is_root, NEW, slot)[:, None],
            gone[:, None] & group_real[None, :],
            other=float("-inf"),
        )
        own = tl.load(
            logits_ptr + offsets[None, :] + NEW + node[:, None],
            ended[:, None] & group_real[None, :],
            other=float("-inf"),
        )
        v = tl.load(
            key_value_ptr + slot[:, None] * HEAD_DIM + columns[None, :],
            (gone & ~is_root)[:, None] & column_real,
            other=0.0,
        ).to(tl.float32)
        v += tl.load(
            value_ptr + (slot * 0)[:, None] + columns[None, :],
            (gone & is_root)[:, None] & column_real,
            other=0.0,
        ).to(tl.float32)
        v_own = tl.load(
            value_ptr + node[:, None] * (KV_HEADS * HEAD_DIM) + columns[None, :],
            ended[:, None] & column_real,
            other=0.0,
        ).to(tl.float32)
        # A slot that was free has no weight, and any value.
        held = tl.max((old > float("-inf")).to(tl.int32), 1) > 0
        v = tl.where(held[:, None], v, 0.0)
        old = tl.exp2(old - whole[None, :])
        own = tl.exp2(own - whole[None, :])
        share += tl.sum(old + own, 0)
        lost += tl.sum(old[:, :, None] * v[:, None, :], 0)
        lost += tl.sum(own[:, :, None] * v_own[:, None, :], 0)
    return share, lost


@triton.jit
def attend_again(
    logits_ptr,
    offsets,  # [G]
    group_real,
    whole,  # [G]
    sinks,  # [G], in base 2
    values_ptr,  # as for `take_away`
    value_ptr,
    positions_ptr,  # of the KV head
    path,  # [D]
    slots,  # [D]
    later,  # [D]
    depth,
    target,
    KV_HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NEW: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DEPTHS_PAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Return the output `[G, H]` of a node from all that its path has left."""
    steps = tl.arange(0, DEPTHS_PAD)
    columns = tl.arange(0, HEAD_PAD)
    column_real = (columns < HEAD_DIM)[None, :]
    on_path = (steps > 0) & (steps <= depth)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
    for start in range(0, SLOTS, _AT_ONCE):
        found = start + tl.arange(0, _AT_ONCE)
        positions = tl.load(positions_ptr + found, found < SLOTS, other=-1)
        hits = (found[:, None] == slots[None, :]) & on_path[None, :]
        held = (positions >= 0) & (found != target)
        held &= tl.max(hits.to(tl.int32), 1) == 0
        logits = tl.load(
            logits_ptr + offsets[None, :] + found[:, None],
            held[:, None] & group_real[None, :],
            other=float("-inf"),
        )
        v = tl.load(
            values_ptr + found[:, None] * HEAD_DIM + columns[None, :],
            held[:, None] & column_real,
            other=0.0,
        ).to(tl.float32)
        weights = tl.exp2(logits - whole[None, :])
        total += tl.sum(weights, 0)
        acc += tl.sum(weights[:, :, None] * v[:, None, :], 0)
    # The step from which on the root's slot is another token's.
    root_end = tl.min(tl.where((slots == target) & on_path, steps, DEPTHS_PAD), 0)
    for start in range(0, depth + 1, _AT_ONCE):
        step = start + tl.arange(0, _AT_ONCE)
        node = look_up(path, steps, step)
        end = tl.where(step == 0, root_end, look_up(later, steps, step))
        alive = (step <= depth) & (end > depth)
        logits = tl.load(
            logits_ptr + offsets[None, :] + NEW + node[:, None],
            alive[:, None] & group_real[None, :],
            other=float("-inf"),
        )
        v = tl.load(
            value_ptr + node[:, None] * (KV_HEADS * HEAD_DIM) + columns[None, :],
            alive[:, None] & column_real,
            other=0.0,
        ).to(tl.float32)
        weights = tl.exp2(logits - whole[None, :])
        total += tl.sum(weights, 0)
        acc += tl.sum(weights[:, :, None] * v[:, None, :], 0)
    total += tl.exp2(sinks - whole)
    return acc / tl.maximum(total, _LEAST)[:, None]


@triton.jit
def finish_head(
    logits_ptr,
    parts_ptr,
    statistic_ptr,
    whole_ptr,  # [HEADS] of the row's node
    values_ptr,
    value_ptr,
    positions_ptr,
    target_ptr,
    sink_ptr,
    out_ptr,
    row,
    batch,
    node,
    mine,  # KV head of the row
    path,
    slots,
    depth,
    BATCH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TARGETS: tl.constexpr,
    NODES: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NEW: tl.constexpr,
    STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DEPTHS_PAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SINK: tl.constexpr,
):
    """Store the output of one node for one KV head."""
    steps = tl.arange(0, DEPTHS_PAD)
    is_first, later = first_and_later(slots, steps, DEPTHS_PAD)
    group = tl.arange(0, GROUP_PAD)
    columns = tl.arange(0, HEAD_PAD)
    splits = tl.arange(0, SPLITS_PAD)
    group_real = group < GROUP
    head = row * TARGETS + mine  # of [B, K]
    offsets = (head * NODES + node) * GROUP + group
    offsets *= STRIDE
    whole = tl.load(whole_ptr + mine * GROUP + group, group_real, other=0.0)
    out_head = (batch * NODES + node) * KV_HEADS + head % KV_HEADS  # [B, T, K]
    out_head = out_head * GROUP + group
    split_head = splits[:, None].to(tl.int64) * (BATCH * NODES * KV_HEADS * GROUP)
    split_head += out_head[None, :]
    there = (splits < SPLITS)[:, None] & group_real[None, :]
    statistic = tl.load(statistic_ptr + split_head, there, other=float("-inf"))
    parts = tl.load(
        parts_ptr + split_head[:, :, None] * HEAD_DIM + columns[None, None, :],
        there[:, :, None] & (columns < HEAD_DIM)[None, None, :],
        other=0.0,
    )
    weights = tl.exp2(statistic - whole[None, :])
    out = tl.sum(weights[:, :, None] * parts, 0)
    values = values_ptr + head * (SLOTS * HEAD_DIM)
    value = value_ptr + batch * (NODES * KV_HEADS * HEAD_DIM)
    value += head % KV_HEADS * HEAD_DIM
    root = tl.load(target_ptr + head)
    share, lost = take_away(
        *(logits_ptr, offsets, group_real, whole, values, value, path, slots),
        *(is_first, later, depth, root, KV_HEADS, HEAD_DIM, NEW, GROUP_PAD),
        *(DEPTHS_PAD, HEAD_PAD),
    )
    out = (out - lost) / tl.maximum(1.0 - share, _LEAST)[:, None]
    if tl.max(share, 0) > _MOST:
        out = attend_again(
            *(logits_ptr, offsets, group_real, whole),
            read_sinks(sink_ptr, head % KV_HEADS * GROUP + group, group_real, SINK),
            *(values, value),
            *(positions_ptr + head * SLOTS, path, slots, later, depth, root),
            *(KV_HEADS, SLOTS, HEAD_DIM, NEW, GROUP_PAD, DEPTHS_PAD, HEAD_PAD),
        )
    tl.store(
        out_ptr + out_head[:, None] * HEAD_DIM + columns[None, :],
        out.to(out_ptr.dtype.element_ty),
        group_real[:, None] & (columns < HEAD_DIM)[None, :],
    )


@triton.jit
def finish_paths(
    # Inputs.
    logits_ptr,  # [B, K, T, G, STRIDE]
    parts_ptr,  # [SPLITS, B, T, K, G, H]
    statistic_ptr,  # [SPLITS, B, T, K, G]
    whole_ptr,  # [ROWS, T, HEADS]
    orders_ptr,  # [ROWS, T, CHUNKS, LIST]
    listed_ptr,  # [ROWS, T, CHUNKS, LIST]
    path_orders_ptr,  # [ROWS, T, DEPTHS]
    values_ptr,  # [B, K, S, H]
    value_ptr,  # [B, T, K, H]
    norms_ptr,  # [B, K, S]
    positions_ptr,  # [B, K, S]
    new_norms_ptr,  # [B, K, T]
    target_ptr,  # [B, K]
    position_ptr,  # [B]
    oldest_ptr,  # [B]
    depths_ptr,  # [B, T]
    paths_ptr,  # [B, T, DEPTHS]
    sink_ptr,  # [N], or a constant
    # Outputs.
    out_ptr,  # [B, T, K, G, H]
    slots_ptr,  # [B, K, T]
    targets_ptr,  # [B, K, T]
    # Sizes.
    BATCH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TARGETS: tl.constexpr,
    HEADS: tl.constexpr,
    NODES: tl.constexpr,
    DEPTHS: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NEW: tl.constexpr,
    STRIDE: tl.constexpr,
    RECENT: tl.constexpr,
    SPLITS: tl.constexpr,
    LIST: tl.constexpr,
    LISTED: tl.constexpr,  # CHUNKS * LIST
    LISTED_PAD: tl.constexpr,  # powers of two
    RANKS: tl.constexpr,  # ancestors that are looked at together
    SOME: tl.constexpr,  # how many of a list are looked at together
    SEARCH: tl.constexpr,
    SHARED: tl.constexpr,  # KV heads of whose output one program does
    SPLITS_PAD: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    TARGETS_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DEPTHS_PAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SINK: tl.constexpr,
    CAP: tl.constexpr,  # of the logits, which have it
):
    """Follow the path of one node, and make its output for some KV heads."""
    row_node = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    row = row_node // NODES
    node = row_node % NODES
    batch = row * TARGETS // KV_HEADS
    steps = tl.arange(0, DEPTHS_PAD)
    heads = tl.arange(0, HEADS_PAD)
    head_real = heads < HEADS
    kv_heads = heads // GROUP  # of the row
    if HEADS * NODES * STRIDE >= 2**31:
        kv_heads = kv_heads.to(tl.int64)
    target = tl.load(target_ptr + row * TARGETS + kv_heads, head_real, other=-1)
    depth = tl.load(depths_ptr + batch * NODES + node)
    position = tl.load(position_ptr + batch)
    oldest = tl.load(oldest_ptr + batch)
    paths_ptr += (batch * NODES + node) * DEPTHS
    path = tl.load(paths_ptr + steps, steps < DEPTHS, other=0)
    path = tl.maximum(path, 0)  # beyond the node there is none
    whole_ptr += row * (NODES * HEADS)
    orders_ptr += row * (NODES * LISTED)
    listed_ptr += row * (NODES * LISTED)
    sink_heads = row * TARGETS % KV_HEADS * GROUP + heads
    sinks = read_sinks(sink_ptr, sink_heads, head_real, SINK)
    slots, last = follow_path(
        logits_ptr + row * (HEADS * NODES * STRIDE),
        *(whole_ptr, orders_ptr, listed_ptr, path_orders_ptr + row * (NODES * DEPTHS)),
        norms_ptr + row * (TARGETS * SLOTS),
        positions_ptr + row * (TARGETS * SLOTS),
        *(
            new_norms_ptr + row * (TARGETS * NODES),
            paths_ptr,
            kv_heads,
            head_real,
            target,
            sinks,
            depth,
        ),
        *(
            path,
            position,
            oldest,
            GROUP,
            HEADS,
            NODES,
            DEPTHS,
            SLOTS,
            NEW,
            STRIDE,
            RECENT,
        ),
        *(LIST, LISTED, LISTED_PAD, RANKS, SOME, SEARCH, HEADS_PAD, DEPTHS_PAD),
    )
    targets = tl.arange(0, TARGETS_PAD)
    target_real = targets < tl.where(part == 0, TARGETS, 0)
    row_target = row * TARGETS + targets
    root = tl.load(target_ptr + row_target, target_real, other=0)
    written = tl.sum(tl.where(steps == depth, slots, 0), 0)
    written = tl.where(depth > 0, written, root)
    tl.store(slots_ptr + row_target * NODES + node, written, target_real)
    last = tl.broadcast_to(last, targets.shape)
    tl.store(targets_ptr + row_target * NODES + node, last, target_real)

    for index in range(SHARED):
        finish_head(
            *(logits_ptr, parts_ptr, statistic_ptr, whole_ptr + node * HEADS),
            *(values_ptr, value_ptr, positions_ptr, target_ptr, sink_ptr, out_ptr),
            *(row, batch, node, part * SHARED + index, path, slots, depth),
            *(BATCH, KV_HEADS, GROUP, TARGETS, NODES, SLOTS, HEAD_DIM, NEW, STRIDE),
            *(SPLITS, SPLITS_PAD, GROUP_PAD, DEPTHS_PAD, HEAD_PAD, SINK),
        )
