"""Triton kernels of `decode_triton`; imported at the call only, since it needs Triton.

```
               slots ->     tile 0   tile 1   tile 2   tile 3   tile 4 ...
older tokens   part ->         1        2        1        2        1       (of two)
newest tokens  part 0:      one tile, the newest first, wherever their slots are

one program per (row, part); row = (sequence, key/value head), and its G query heads
are the rows of one matrix
```

Tiles are dealt to the splits in turn, so that free slots, which lie together in a young
cache, cost every split the same. Keys and values of free slots are not read at all.

The `NEWEST` tokens are summed apart from the others, in the order of their positions.
So it makes no difference to the bits of a sum whether a token is in the cache already
or a draft that may still be thrown away: `nodes_triton_body` gives to drafted tokens
what they would have got from here. How the rest is cut depends on the slots alone, and
sums over a tile are added in an order of their own, not in that of registers.

The new token never passes through memory: it is the first of the newest, whose program
takes it from registers and stores it, and every program masks its slot. So no program
reads what another one writes, except for the position of the target slot, whose old and
new values are masked alike.

Numerics: products accumulate in float32, the softmax is in base 2 with the running
maximum starting at the finite `_LOWEST`, so that a split without an occupied slot gives
the statistic `_LOWEST` and an accumulator of zeros instead of NaN; weights are rounded
to the dtype of the values before the second product.

Row offsets are 64-bit; offsets within a row are 32-bit (S x H < 2^31).
"""

import triton
import triton.language as tl

from jaxkv.kernels.newest_triton_body import add_up, attend_newest, find_newest
from jaxkv.kernels.weighing_triton_body import capped, pay_sink

_LOWEST = tl.constexpr(-1e30)


@triton.jit
def head_offsets(
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Return where the group's query heads lie, and which of it is not padding."""
    heads = tl.arange(0, GROUP_PAD)
    columns = tl.arange(0, HEAD_PAD)
    real = (heads < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    return heads[:, None] * HEAD_DIM + columns[None, :], real


@triton.jit
def store_token(
    keys_ptr,
    values_ptr,
    positions_ptr,
    k_new,  # [H]
    v_new,  # [H]
    position,
    target,
    is_mine,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Write the new token into its slot of one row, if it is this program's to do."""
    columns = tl.arange(0, HEAD_PAD)
    offsets = target.to(tl.int64) * HEAD_DIM + columns
    # As `(columns < HEAD_DIM) & is_mine`, of which the interpreter makes no mask.
    real = columns < tl.where(is_mine, HEAD_DIM, 0)
    tl.store(keys_ptr + offsets, k_new, real)
    tl.store(values_ptr + offsets, v_new, real)
    tl.store(positions_ptr + target, position, is_mine)


@triton.jit
def start_softmax(new_logit, v_new, takes_new, BLOCK: tl.constexpr):
    """Return maximum, totals and accumulator of the new token alone, or of nothing.

    Totals are kept by slot of a tile and added up at the end: a sum over slots in each
    tile would make its warps wait for each other once more.
    """
    maximum = tl.where(takes_new, new_logit, _LOWEST)  # [G]
    is_new = tl.arange(0, BLOCK) < tl.where(takes_new, 1, 0)
    total = tl.where(is_new, 1.0, 0.0)[None, :]
    total += tl.zeros([new_logit.shape[0], BLOCK], tl.float32)
    acc = tl.zeros([new_logit.shape[0], v_new.shape[0]], tl.float32)
    acc += tl.where(takes_new, v_new.to(tl.float32), 0.0)[None, :]
    return maximum, total, acc


@triton.jit
def attend_columns(
    q,  # [M, H]
    keys_ptr,
    values_ptr,
    offsets,  # [S, H]
    real,  # [S, H]
    visible,  # [M, S], or [1, S]
    maximum,  # [M]
    total,  # [M, S], not yet added up
    acc,  # [M, H]
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr = None,
):
    """Return a tile's logits, and the softmax with the tile added."""
    # Not reading free slots saves their bytes and keeps their NaN out of both
    # products: 0 x NaN is NaN, so masking the weights would not be enough.
    k = tl.load(keys_ptr + offsets, real, other=0.0)  # [S, H]
    logits = SCALE * tl.dot(q, tl.trans(k), input_precision=PRECISION)
    logits = capped(logits, CAP)
    logits = tl.where(visible, logits, float("-inf"))  # [M, S]

    new_maximum = tl.maximum(maximum, tl.max(logits, 1))
    weights = tl.exp2(logits - new_maximum[:, None])
    rescale = tl.exp2(maximum - new_maximum)
    total = total * rescale[:, None] + weights
    v = tl.load(values_ptr + offsets, real, other=0.0)  # [S, H]
    acc = tl.dot(
        weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION
    )
    return logits, new_maximum, total, acc


@triton.jit
def attend_tile(
    q,  # [G, H]
    keys_ptr,
    values_ptr,
    slots,  # [S]
    occupied,  # [S]
    maximum,  # [G]
    total,  # [G, S], not yet added up
    acc,  # [G, H]
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
):
    """Return the logits of a tile of slots, and the softmax with the tile added."""
    columns = tl.arange(0, HEAD_PAD)
    return attend_columns(
        *(q, keys_ptr, values_ptr),
        slots[:, None] * HEAD_DIM + columns[None, :],
        occupied[:, None] & (columns < HEAD_DIM)[None, :],
        occupied[None, :],
        *(maximum, total, acc, SCALE, PRECISION, CAP),
    )


@triton.jit
def seen_nothing(ROWS: tl.constexpr, HEAD_PAD: tl.constexpr):
    """Return maximum, total and accumulator of a softmax over nothing."""
    maximum = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    return maximum, total, tl.zeros([ROWS, HEAD_PAD], tl.float32)


@triton.jit
def normalise(maximum, total, acc):
    """Return output and statistic of a part, 0 and `_LOWEST` where nothing is seen."""
    # A part that has seen nothing has total 0; all others have at least 1.
    total = tl.maximum(total, 1e-30)
    return acc / total[:, None], maximum + tl.log2(total)


@triton.jit
def store_part(
    out_ptr,
    statistic_ptr,
    split_row,
    maximum,  # [G]
    total,  # [G]
    acc,  # [G, H]
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Store the normalised output of one split and the logarithm of its sum."""
    offsets, real = head_offsets(GROUP, HEAD_DIM, GROUP_PAD, HEAD_PAD)
    heads = tl.arange(0, GROUP_PAD)
    out, statistic = normalise(maximum, total, acc)
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + split_row * (GROUP * HEAD_DIM) + offsets, out, real)
    tl.store(statistic_ptr + split_row * GROUP + heads, statistic, heads < GROUP)


@triton.jit
def combine_head(
    parts_ptr,  # [SPLITS, B, N, H]
    statistic_ptr,  # [SPLITS, B, N]
    out_ptr,  # [B, N, H]
    row,
    num_rows,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Weigh the splits of one query head by their share of the softmax and add them."""
    splits = tl.arange(0, SPLITS_PAD)
    columns = tl.arange(0, HEAD_PAD)
    rows = splits * num_rows + row
    statistic = tl.load(statistic_ptr + rows, splits < SPLITS, other=float("-inf"))
    real = (splits < SPLITS)[:, None] & (columns < HEAD_DIM)[None, :]
    parts = tl.load(
        parts_ptr + rows[:, None] * HEAD_DIM + columns[None, :], real, other=0.0
    )
    weights = tl.exp2(statistic - tl.max(statistic, 0))  # [SPLITS], none of them NaN
    out = tl.sum(weights[:, None] * parts, 0) / tl.sum(weights, 0)
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * HEAD_DIM + columns, out, columns < HEAD_DIM)


@triton.jit
def attend_older(
    q,  # [G, H]
    keys_ptr,  # of the row, as the next two
    values_ptr,
    positions_ptr,
    split,
    target,
    position,
    SCALE: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    NEWEST: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr,
):
    """Attend to every `SPLITS`-th tile: maximum, totals and accumulator."""
    maximum = tl.full([q.shape[0]], _LOWEST, tl.float32)
    total = tl.zeros([q.shape[0], BLOCK], tl.float32)
    acc = tl.zeros([q.shape[0], HEAD_PAD], tl.float32)
    # A tile's positions are read one step ahead, for then the copies of its keys and
    # values, which wait for them, still go into the pipeline at full depth.
    first = split * BLOCK + tl.arange(0, BLOCK)
    next_positions = tl.load(positions_ptr + first, first < SLOTS, other=-1)
    # The same number of steps for every split: a last tile may lie beyond the end.
    for start in range(0, SLOTS, SPLITS * BLOCK):
        slots = start + first  # [S]
        # A finished row reads no slot.
        positions = tl.where(position >= 0, next_positions, -1)
        back = position - positions
        # The newest tokens are those from 1 to `NEWEST - 1` back, and the new one.
        occupied = (positions >= 0) & ((back >= NEWEST) | (back <= 0))
        next_slots = slots + SPLITS * BLOCK
        # What lies beyond the last slot is free.
        next_positions = tl.load(
            positions_ptr + next_slots, next_slots < SLOTS, other=-1
        )
        occupied &= slots != target
        _, maximum, total, acc = attend_tile(
            *(q, keys_ptr, values_ptr, slots, occupied, maximum, total, acc),
            *(SCALE, HEAD_DIM, HEAD_PAD, PRECISION, CAP),
        )
    return maximum, add_up(total), acc


@triton.jit
def attend_split(
    # Inputs; the cache (keys, values, positions) is also written, in place.
    query_ptr,  # [B, K, G, H]
    key_ptr,  # [B, K, H]
    value_ptr,  # [B, K, H]
    keys_ptr,  # [B, K, S, H]
    values_ptr,  # [B, K, S, H]
    positions_ptr,  # [B, K, S]
    target_ptr,  # [B, K]
    position_ptr,  # [B]
    sink_ptr,  # [N], or a constant
    # Outputs.
    out_ptr,  # [PARTS, B, K, G, H], normalised within the part
    statistic_ptr,  # [PARTS, B, K, G], log2 of the part's sum of exponentials
    # The cache once more: see `triton_call.call`.
    _keys_out_ptr,
    _values_out_ptr,
    _positions_out_ptr,
    # Sizes.
    SCALE: tl.constexpr,  # times log2(e)
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    # Tiles.
    SPLITS: tl.constexpr,  # of the older tokens
    PARTS: tl.constexpr,  # the first one has the newest tokens
    BLOCK: tl.constexpr,
    NEWEST: tl.constexpr,
    NEWEST_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,  # slots that are searched at once
    GROUP_PAD: tl.constexpr,  # G rounded up to what the tensor cores take
    HEAD_PAD: tl.constexpr,  # H rounded up to a power of two
    PRECISION: tl.constexpr,
    # What is not usual about the softmax.
    SINK: tl.constexpr,
    CAP: tl.constexpr,
):
    """Write the new token, and attend to a share of one row."""
    row = tl.program_id(0).to(tl.int64)
    # The newest tokens come first: their program waits for a chain of small loads.
    part = tl.program_id(1)
    split = part - (PARTS - SPLITS)
    num_rows = tl.num_programs(0)
    keys_ptr += row * (SLOTS * HEAD_DIM)
    values_ptr += row * (SLOTS * HEAD_DIM)
    positions_ptr += row * SLOTS

    query_offsets, query_real = head_offsets(GROUP, HEAD_DIM, GROUP_PAD, HEAD_PAD)
    q = tl.load(
        query_ptr + row * (GROUP * HEAD_DIM) + query_offsets, query_real, other=0.0
    )
    position = tl.load(position_ptr + row // KV_HEADS)
    # A finished row has no target: nothing of it is visible, taken or stored.
    unfinished = position >= 0
    target = tl.where(unfinished, tl.load(target_ptr + row), -1)
    key_ptr += row * HEAD_DIM
    value_ptr += row * HEAD_DIM
    part_row = part * num_rows + row
    maximum, total, acc = seen_nothing(GROUP_PAD, HEAD_PAD)
    # Apart, so that the registers of one way are free in the other.
    if PARTS == 1:
        maximum, total, acc = attend_older(
            *(q, keys_ptr, values_ptr, positions_ptr, split, target, position),
            *(SCALE, SLOTS, HEAD_DIM, SPLITS, BLOCK, NEWEST, HEAD_PAD, PRECISION),
            CAP,
        )
    elif part > 0:
        older = attend_older(
            *(q, keys_ptr, values_ptr, positions_ptr, split, target, position),
            *(SCALE, SLOTS, HEAD_DIM, SPLITS, BLOCK, NEWEST, HEAD_PAD, PRECISION),
            CAP,
        )
        store_part(
            *(out_ptr, statistic_ptr, part_row, older[0], older[1], older[2]),
            *(GROUP, HEAD_DIM, GROUP_PAD, HEAD_PAD),
        )
    if part == 0:
        for first in tl.range(0, NEWEST, NEWEST_BLOCK, num_stages=1):
            back = first + tl.arange(0, NEWEST_BLOCK)
            slots = find_newest(
                *(positions_ptr, target, position, first, SLOTS, NEWEST_BLOCK, CHUNK)
            )
            slots = tl.where(slots == target, -1, slots)
            maximum, total, acc = attend_newest(
                *(q, keys_ptr, values_ptr, slots, key_ptr, value_ptr),
                tl.where(back == 0, tl.where(unfinished, 0, -1), -1),
                *(maximum, total, acc, SCALE, HEAD_DIM, HEAD_PAD, PRECISION, CAP),
            )
        columns = tl.arange(0, HEAD_PAD)
        k_new = tl.load(key_ptr + columns, columns < HEAD_DIM, other=0.0)
        v_new = tl.load(value_ptr + columns, columns < HEAD_DIM, other=0.0)
        store_token(
            *(keys_ptr, values_ptr, positions_ptr, k_new, v_new, position, target),
            *(unfinished, HEAD_DIM, HEAD_PAD),
        )
        if SINK:
            heads = tl.arange(0, GROUP_PAD)
            maximum, total, acc = pay_sink(
                *(maximum, total, acc, sink_ptr),
                *(row % KV_HEADS * GROUP + heads, heads < GROUP),
            )
        store_part(
            *(out_ptr, statistic_ptr, part_row, maximum, total, acc),
            *(GROUP, HEAD_DIM, GROUP_PAD, HEAD_PAD),
        )


@triton.jit
def combine_splits(
    parts_ptr,  # [SPLITS, B, N, H]
    statistic_ptr,  # [SPLITS, B, N]
    out_ptr,  # [B, N, H]
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Join the splits of one query head."""
    combine_head(
        *(parts_ptr, statistic_ptr, out_ptr),
        *(tl.program_id(0).to(tl.int64), tl.num_programs(0)),
        *(HEAD_DIM, SPLITS, SPLITS_PAD, HEAD_PAD),
    )
