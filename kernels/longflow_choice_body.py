"""Triton kernels of `longflow_triton`, the second launch; imported at the call.

It chooses the victims from what `longflow_triton_body` leaves, which has the picture.
The choice is a minimum over int32 (`slot_order`), ties to the lowest slot. The last
program to arrive takes the minimum over all blocks, and computes the same whichever it
is; the counter of arrivals is the only atomic, and an integer.
"""

import triton
import triton.language as tl

from jaxkv.kernels.decode_triton_body import combine_head

_LOWEST = tl.constexpr(-1e30)
_MAX_INT = tl.constexpr(2147483647)


@triton.jit
def weigh_slots(logits, statistic, norms, positions, oldest, newest):
    """Return importance `[S]`, summed over heads, what is free, what is protected.

    `statistic` is `[HEADS]`, the others `[HEADS, S]`.
    """
    is_held = positions >= 0
    weights = tl.where(is_held, tl.exp2(logits - statistic[:, None]) * norms, 0.0)
    barred = is_held & ((positions < oldest) | (positions > newest))
    free = tl.max(is_held.to(tl.int32), 0) == 0
    return tl.sum(weights, 0), free, tl.max(barred.to(tl.int32), 0) > 0


@triton.jit
def slot_order(importance, free, protected, real):
    """Return int32 `[S]`, the less the sooner to go: free, evictable, protected."""
    bits = importance.to(tl.int32, bitcast=True)  # as ordered as what is not negative
    order = tl.where(protected, bits, bits - _MAX_INT)
    order = tl.where(free, -_MAX_INT - 1, order)
    return tl.where(real, order, _MAX_INT)


@triton.jit
def least_slot(order, slots):
    """Return the least order and the lowest slot that has it."""
    pairs = (order.to(tl.int64) << 32) | slots.to(tl.int64)
    least = tl.min(pairs, 0)
    return (least >> 32).to(tl.int32), least.to(tl.int32)


@triton.jit
def choose_victim(
    order,  # [S] of this block
    slots,  # [S]
    target_ptr,  # [B, K], updated in place
    position_ptr,  # [B]
    arrivals_ptr,  # [ROWS], zeros
    minima_ptr,  # [ROWS, BLOCKS, 2]
    row,
    block,
    TARGETS: tl.constexpr,  # KV heads that share the victim: K or 1
    TARGETS_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
):
    """Store the block's minimum; if it is the row's last, store the row's victim."""
    least, slot = least_slot(order, slots)
    minima_ptr += row * (BLOCKS * 2)
    tl.store(minima_ptr + block * 2, least)
    tl.store(minima_ptr + block * 2 + 1, slot)
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr + row, 1, sem="acq_rel")
    if arrived == BLOCKS - 1:
        tl.debug_barrier()
        blocks = tl.arange(0, BLOCKS_PAD)
        real = blocks < BLOCKS
        orders = tl.load(minima_ptr + blocks * 2, real, other=_MAX_INT, volatile=True)
        found = tl.load(minima_ptr + blocks * 2 + 1, real, other=0, volatile=True)
        # Among padding, too, the minimum is real: each row has a slot.
        _, slot = least_slot(orders, tl.where(real, found, _MAX_INT))
        targets = tl.arange(0, TARGETS_PAD)
        position = tl.load(position_ptr + row * TARGETS // KV_HEADS)
        # A finished row keeps its target.
        real = targets < tl.where(position >= 0, TARGETS, 0)
        tl.store(target_ptr + row * TARGETS + targets, slot, real)


@triton.jit
def weigh_block(
    logits_ptr,
    statistic_ptr,
    norms_ptr,
    positions_ptr,
    oldest_ptr,
    newest_ptr,
    slots,  # [CHUNK]
    row,
    num_heads,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    TARGETS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):
    """Return of some slots of a row what `weigh_slots` does, from what splits left."""
    splits = tl.arange(0, SPLITS_PAD)
    heads = tl.arange(0, HEADS_PAD)
    parts = tl.load(
        statistic_ptr
        + splits[:, None].to(tl.int64) * num_heads
        + (row * HEADS + heads)[None, :],
        (splits < SPLITS)[:, None] & (heads < HEADS)[None, :],
        other=_LOWEST,
    )
    batch = row * TARGETS // KV_HEADS
    oldest = tl.load(oldest_ptr + batch)
    newest = tl.load(newest_ptr + batch)
    real = (heads < HEADS)[:, None] & (slots < SLOTS)[None, :]
    logits = tl.load(
        logits_ptr + row * (HEADS * STRIDE) + heads[:, None] * STRIDE + slots[None, :],
        real,
        other=float("-inf"),
        eviction_policy="evict_first",
    )
    held = row * (TARGETS * SLOTS) + (heads // (HEADS // TARGETS))[:, None] * SLOTS
    norms = tl.load(norms_ptr + held + slots[None, :], real, other=0.0)
    positions = tl.load(positions_ptr + held + slots[None, :], real, other=-1)
    maximum = tl.max(parts, 0)
    statistic = maximum + tl.log2(tl.sum(tl.exp2(parts - maximum[None, :]), 0))
    return weigh_slots(logits, statistic, norms, positions, oldest, newest)


@triton.jit
def choose_tile(
    row,
    block,
    num_heads,  # of all rows
    logits_ptr,  # [ROWS, HEADS, STRIDE]
    statistic_ptr,  # [SPLITS, ROWS, HEADS]
    norms_ptr,  # [ROWS, TARGETS, SLOTS]
    positions_ptr,  # [ROWS, TARGETS, SLOTS]
    target_ptr,  # [B, K]
    position_ptr,  # [B]
    oldest_ptr,  # [B]
    newest_ptr,  # [B]
    arrivals_ptr,  # [ROWS]
    minima_ptr,  # [ROWS, BLOCKS, 2], output
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    TARGETS: tl.constexpr,
    TARGETS_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
):
    """Weigh a block of slots, whose last program chooses the row's victim."""
    slots = block * CHUNK + tl.arange(0, CHUNK)
    importance, is_free, protected = weigh_block(
        *(logits_ptr, statistic_ptr, norms_ptr, positions_ptr),
        *(oldest_ptr, newest_ptr, slots, row, num_heads),
        *(HEADS, HEADS_PAD, TARGETS, KV_HEADS, SLOTS, STRIDE, SPLITS, SPLITS_PAD),
    )
    order = slot_order(importance, is_free, protected, slots < SLOTS)
    choose_victim(
        *(order, slots, target_ptr, position_ptr, arrivals_ptr),
        *(minima_ptr, row, block),
        *(TARGETS, TARGETS_PAD, KV_HEADS, BLOCKS, BLOCKS_PAD),
    )


@triton.jit
def finish_splits(
    logits_ptr,  # [ROWS, HEADS, STRIDE]
    parts_ptr,  # [SPLITS, ROWS, HEADS, H]
    statistic_ptr,  # [SPLITS, ROWS, HEADS]
    norms_ptr,  # [ROWS, TARGETS, SLOTS]
    positions_ptr,  # [ROWS, TARGETS, SLOTS]
    target_ptr,  # [B, K]
    position_ptr,  # [B]
    oldest_ptr,  # [B]
    newest_ptr,  # [B]
    arrivals_ptr,  # [ROWS]
    # Outputs.
    out_ptr,  # [ROWS, HEADS, H]
    minima_ptr,  # [ROWS, BLOCKS, 2]
    # See `triton_call.call`.
    _target_out_ptr,
    _arrivals_out_ptr,
    HEADS: tl.constexpr,  # query heads that share the victim: N or G
    HEADS_PAD: tl.constexpr,
    TARGETS: tl.constexpr,
    TARGETS_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
):
    """Choose the victim, `BLOCKS` programs a row, and join the splits, one per head."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    num_heads = tl.num_programs(0) * HEADS
    if block < BLOCKS:
        choose_tile(
            *(row, block, num_heads, logits_ptr, statistic_ptr, norms_ptr),
            *(positions_ptr, target_ptr, position_ptr, oldest_ptr, newest_ptr),
            *(arrivals_ptr, minima_ptr),
            *(HEADS, HEADS_PAD, TARGETS, TARGETS_PAD, KV_HEADS, SLOTS, STRIDE),
            *(SPLITS, SPLITS_PAD, CHUNK, BLOCKS, BLOCKS_PAD),
        )
    else:
        combine_head(
            *(parts_ptr, statistic_ptr, out_ptr),
            *(row * HEADS + block - BLOCKS, num_heads),
            *(HEAD_DIM, SPLITS, SPLITS_PAD, HEAD_PAD),
        )


@triton.jit
def tell_splits(
    logits_ptr,  # [B, HEADS, STRIDE]
    parts_ptr,  # [SPLITS, B, HEADS, H]
    statistic_ptr,  # [SPLITS, B, HEADS]
    norms_ptr,  # [B, KV_HEADS, SLOTS]
    positions_ptr,  # [B, KV_HEADS, SLOTS]
    oldest_ptr,  # [B]
    newest_ptr,  # [B]
    # Outputs.
    out_ptr,  # [B, HEADS, H]
    told_ptr,  # [B, STRIDE]; see `victims.told`
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Do `finish_splits`, but say what it would choose from instead of choosing."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    num_heads = tl.num_programs(0) * HEADS
    if block < BLOCKS:
        slots = block * CHUNK + tl.arange(0, CHUNK)
        importance, is_free, protected = weigh_block(
            *(logits_ptr, statistic_ptr, norms_ptr, positions_ptr),
            *(oldest_ptr, newest_ptr, slots, row, num_heads),
            *(HEADS, HEADS_PAD, KV_HEADS, KV_HEADS, SLOTS, STRIDE, SPLITS, SPLITS_PAD),
        )
        told = tl.where(protected, -importance, importance)  # -0.0, too
        told = tl.where(is_free, float("inf"), told)
        tl.store(told_ptr + row * STRIDE + slots, told, slots < SLOTS)
    else:
        combine_head(
            *(parts_ptr, statistic_ptr, out_ptr),
            *(row * HEADS + block - BLOCKS, num_heads),
            *(HEAD_DIM, SPLITS, SPLITS_PAD, HEAD_PAD),
        )


@triton.jit
def choose_victims(
    importance_ptr,  # [ROWS, PARTS, STRIDE], or [PARTS, ROWS, STRIDE]
    target_ptr,  # [B, K]
    position_ptr,  # [B]
    arrivals_ptr,  # [ROWS]
    # Outputs.
    minima_ptr,  # [ROWS, BLOCKS, 2]
    # See `triton_call.call`.
    _target_out_ptr,
    _arrivals_out_ptr,
    PARTS: tl.constexpr,  # key/value heads that share the victim, or devices
    PARTS_PAD: tl.constexpr,
    PARTS_FIRST: tl.constexpr,
    TARGETS: tl.constexpr,
    TARGETS_PAD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
):
    """Choose the victim from what several `told`, `BLOCKS` programs a row."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    slots = block * CHUNK + tl.arange(0, CHUNK)
    parts = tl.arange(0, PARTS_PAD)
    at = row * PARTS + parts
    if PARTS_FIRST:
        at = parts * tl.num_programs(0).to(tl.int64) + row
    importance = tl.load(
        importance_ptr + at[:, None] * STRIDE + slots[None, :],
        (parts < PARTS)[:, None] & (slots < SLOTS)[None, :],
        other=float("inf"),
    )
    protected = tl.max((importance.to(tl.int32, bitcast=True) < 0).to(tl.int32), 0) > 0
    is_held = importance != float("inf")
    is_free = tl.max(is_held.to(tl.int32), 0) == 0
    importance = tl.sum(tl.where(is_held, tl.abs(importance), 0.0), 0)
    order = slot_order(importance, is_free, protected, slots < SLOTS)
    choose_victim(
        *(order, slots, target_ptr, position_ptr, arrivals_ptr),
        *(minima_ptr, row, block),
        *(TARGETS, TARGETS_PAD, KV_HEADS, BLOCKS, BLOCKS_PAD),
    )
