"""The newest tokens of a row, in Triton; imported at the call only: it needs Triton.

Some of them are in the cache, wherever their slots are, and some are not: the token
that a decode step brings, and drafts. `decode_triton_body` says why they are apart.
"""

import triton
import triton.language as tl

from jaxkv.kernels.weighing_triton_body import capped


@triton.jit
def add_up(x):
    """Return the sums of rows `[M, S]`, halves of pairs first, whatever the layout."""
    SIZE: tl.constexpr = x.shape[1]
    for level in tl.static_range(10):
        if SIZE >> level > 1:
            pairs = tl.reshape(x, [x.shape[0], SIZE >> (level + 1), 2])
            left, right = tl.split(pairs)
            x = left + right
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def find_newest(
    positions_ptr,
    slot,  # of the token that is 0 back
    position,  # of the same
    first,  # how far back the first wanted token is
    SLOTS: tl.constexpr,
    COUNT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Return the slots of tokens 1 back and more, -1 where there is none, `[COUNT]`.

    Those of a cache that is only appended to lie one before the other, and those of a
    circle do so up to its last slot. Where they lie otherwise, all slots are searched.
    """
    order = tl.arange(0, COUNT)
    back = first + order
    wanted = position - back
    sought = (back > 0) & (wanted >= 0)
    guess = slot - back
    inside = sought & (guess >= 0) & (guess < SLOTS)
    held = tl.load(positions_ptr + guess, inside, other=-1)
    found = tl.where(inside & (held == wanted), guess, -1)
    guess = SLOTS - 1 - tl.load(positions_ptr + SLOTS - 1) + wanted
    inside = sought & (guess >= 0) & (guess < SLOTS)
    held = tl.load(positions_ptr + guess, inside, other=-1)
    found = tl.where(inside & (held == wanted), guess, found)
    missing = tl.sum((sought & (found < 0)).to(tl.int32), 0)
    if missing > 0:
        for start in range(0, SLOTS, CHUNK):
            slots = start + tl.arange(0, CHUNK)
            positions = tl.load(positions_ptr + slots, slots < SLOTS, other=-1)
            for i in range(COUNT):
                is_it = positions == position - first - i
                here = tl.max(tl.where(is_it, slots, -1), 0)
                found = tl.maximum(found, tl.where(order == i, here, -1))
        found = tl.where(sought, found, -1)
    return found


@triton.jit
def attend_newest(
    q,  # [G, H]
    keys_ptr,
    values_ptr,
    slots,  # [S], -1 where the token is not in the cache
    key_ptr,
    value_ptr,
    rows,  # [S], of tokens that are not in the cache; -1 for others
    maximum,  # [G]
    total,  # [G]
    acc,  # [G, H]
    SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    CAP: tl.constexpr = None,
):
    """Return the softmax with a tile of the newest tokens added."""
    columns = tl.arange(0, HEAD_PAD)
    held = (slots >= 0)[:, None] & (columns < HEAD_DIM)[None, :]
    fresh = (rows >= 0)[:, None] & (columns < HEAD_DIM)[None, :]
    at = slots[:, None] * HEAD_DIM + columns[None, :]
    fresh_at = rows[:, None].to(tl.int64) * HEAD_DIM + columns[None, :]
    k = tl.load(keys_ptr + at, held, other=0.0)
    k = tl.where(fresh, tl.load(key_ptr + fresh_at, fresh, other=0.0), k)
    visible = (slots >= 0) | (rows >= 0)
    logits = SCALE * tl.dot(q, tl.trans(k), input_precision=PRECISION)
    logits = capped(logits, CAP)
    logits = tl.where(visible[None, :], logits, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(logits, 1))
    weights = tl.exp2(logits - new_maximum[:, None])
    rescale = tl.exp2(maximum - new_maximum)
    total = tl.fma(total, rescale, add_up(weights))
    v = tl.load(values_ptr + at, held, other=0.0)
    v = tl.where(fresh, tl.load(value_ptr + fresh_at, fresh, other=0.0), v)
    acc = tl.dot(
        weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION
    )
    return new_maximum, total, acc
