"""Triton kernels of `longflow_triton`, the first launch; imported at the call.

Two ways to cut the work, each in two launches:

```
in splits   1  per (row, split): attend; leave the logits of its slots, head by head
            2  per (row, block of slots): importance and its minimum, of which the last
               to arrive takes the least; per query head: join the splits
in rows     1  per program, row after row: attend; leave the logits in a scratch of the
               program's own; knowing the softmax, read them back: importance, summed
               over the query heads of the row
            2  the same as above from that importance
```

The second launch is `longflow_choice_body`'s.

What the first launch leaves of a slot is the bare logit of each query head, in base 2.
All else waits until the softmax is known: importance is the sum over heads of
`2^(logit - statistic) * norm`, with the statistic that joins the splits anyway, and the
norm of the value that was stored when the token was. So a tile costs no more than
plain attention does, and a store. A sink is in the first split's statistic, and a cap
in the logits, so nothing behind them knows of either.

Importance that leaves the chip is not negative, so its sign says that a slot is
protected; `inf` says that it is free.
"""

import triton
import triton.language as tl

from jaxkv.kernels.decode_triton_body import (
    attend_tile,
    head_offsets,
    start_softmax,
    store_part,
    store_token,
)
from jaxkv.kernels.weighing_triton_body import capped, pay_sink


@triton.jit
def value_norm(v, SCORE: tl.constexpr):
    """Return the norm of one value `[H]`; 1 where the score leaves it out."""
    v = v.to(tl.float32)
    if SCORE == "l1":
        result = tl.sum(tl.abs(v), 0)
    elif SCORE == "l2":
        result = tl.sqrt(tl.sum(v * v, 0))
    else:
        result = 1.0
    return result


@triton.jit
def score_row(
    query_ptr,
    key_ptr,
    value_ptr,
    keys_ptr,
    values_ptr,
    positions_ptr,
    norms_ptr,
    target_ptr,
    position_ptr,
    sink_ptr,
    out_ptr,
    statistic_ptr,
    logits_ptr,  # [G, STRIDE] of this row
    row,
    split,
    num_rows,
    SCALE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    SCORE: tl.constexpr,
    STRIDE: tl.constexpr,
    SINK: tl.constexpr,
    CAP: tl.constexpr,
    STAGES: tl.constexpr = None,
):
    """Do as `attend_split` for one row and split, and leave the logits of its slots."""
    keys_ptr += row * (SLOTS * HEAD_DIM)
    values_ptr += row * (SLOTS * HEAD_DIM)
    positions_ptr += row * SLOTS

    heads = tl.arange(0, GROUP_PAD)  # [G]
    columns = tl.arange(0, HEAD_PAD)  # [H]
    query_offsets, query_real = head_offsets(GROUP, HEAD_DIM, GROUP_PAD, HEAD_PAD)
    q = tl.load(
        query_ptr + row * (GROUP * HEAD_DIM) + query_offsets, query_real, other=0.0
    )
    k_new = tl.load(key_ptr + row * HEAD_DIM + columns, columns < HEAD_DIM, other=0.0)
    v_new = tl.load(value_ptr + row * HEAD_DIM + columns, columns < HEAD_DIM, other=0.0)
    position = tl.load(position_ptr + row // KV_HEADS)
    unfinished = position >= 0
    target = tl.where(unfinished, tl.load(target_ptr + row), -1)
    takes_new = unfinished & (split == 0)
    store_token(
        *(keys_ptr, values_ptr, positions_ptr, k_new, v_new, position, target),
        *(takes_new, HEAD_DIM, HEAD_PAD),
    )
    tl.store(norms_ptr + row * SLOTS + target, value_norm(v_new, SCORE), takes_new)
    new_logit = SCALE * tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1)
    new_logit = capped(new_logit, CAP)
    maximum, total, acc = start_softmax(new_logit, v_new, takes_new, BLOCK)

    first = split * BLOCK + tl.arange(0, BLOCK)
    next_positions = tl.load(positions_ptr + first, first < SLOTS, other=-1)
    for start in tl.range(0, SLOTS, SPLITS * BLOCK, num_stages=STAGES):
        slots = start + first  # [S]
        # A finished row reads no slot: nobody asks for its output or victim.
        positions = tl.where(unfinished, next_positions, -1)
        occupied = (positions >= 0) & (slots != target)
        next_slots = slots + SPLITS * BLOCK
        next_positions = tl.load(
            positions_ptr + next_slots, next_slots < SLOTS, other=-1
        )
        logits, maximum, total, acc = attend_tile(
            *(q, keys_ptr, values_ptr, slots, occupied, maximum, total, acc),
            *(SCALE, HEAD_DIM, HEAD_PAD, PRECISION, CAP),
        )
        tl.store(
            logits_ptr + heads[:, None] * STRIDE + slots[None, :],
            logits,
            (heads < GROUP)[:, None] & (slots < STRIDE)[None, :],
            eviction_policy="evict_last",
        )

    # The target's tile has left -inf there: no mask in the loop, which would make its
    # stores one number wide. So this is for the split that has that tile.
    is_mine = unfinished & (target // BLOCK % SPLITS == split)
    tl.debug_barrier()
    tl.store(
        logits_ptr + heads * STRIDE + target,
        new_logit,
        heads < tl.where(is_mine, GROUP, 0),
    )
    total = tl.sum(total, 1)
    if SINK:
        maximum, total, acc = pay_sink(
            *(maximum, total, acc, sink_ptr, row % KV_HEADS * GROUP + heads),
            heads < tl.where(split == 0, GROUP, 0),
        )
    store_part(
        *(out_ptr, statistic_ptr, split * num_rows + row, maximum, total, acc),
        *(GROUP, HEAD_DIM, GROUP_PAD, HEAD_PAD),
    )


@triton.jit
def score_split(
    # Inputs; the cache (keys, values, positions, norms) is also written, in place.
    query_ptr,  # [B, K, G, H]
    key_ptr,  # [B, K, H]
    value_ptr,  # [B, K, H]
    keys_ptr,  # [B, K, S, H]
    values_ptr,  # [B, K, S, H]
    positions_ptr,  # [B, K, S]
    norms_ptr,  # [B, K, S]
    target_ptr,  # [B, K]
    position_ptr,  # [B]
    sink_ptr,  # [N], or a constant
    # Outputs.
    out_ptr,  # [SPLITS, B, K, G, H]
    statistic_ptr,  # [SPLITS, B, K, G]
    logits_ptr,  # [B, K, G, STRIDE]
    arrivals_ptr,  # [B, K / TARGETS]
    # The cache once more: see `triton_call.call`.
    _keys_out_ptr,
    _values_out_ptr,
    _positions_out_ptr,
    _norms_out_ptr,
    SCALE: tl.constexpr,  # times log2(e)
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    SCORE: tl.constexpr,
    STRIDE: tl.constexpr,
    TARGETS: tl.constexpr,
    SINK: tl.constexpr,
    CAP: tl.constexpr,
):
    """Write the new token, and attend to every `SPLITS`-th tile of a row."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    score_row(
        *(query_ptr, key_ptr, value_ptr, keys_ptr, values_ptr, positions_ptr),
        *(norms_ptr, target_ptr, position_ptr, sink_ptr, out_ptr, statistic_ptr),
        *(logits_ptr + row * (GROUP * STRIDE), row, split, tl.num_programs(0)),
        *(SCALE, KV_HEADS, GROUP, SLOTS, HEAD_DIM, SPLITS, BLOCK, GROUP_PAD),
        *(HEAD_PAD, PRECISION, SCORE, STRIDE, SINK, CAP),
    )
    is_first = (split == 0) & (row % TARGETS == 0)
    tl.store(arrivals_ptr + row // TARGETS, 0, is_first)


@triton.jit
def score_rows(
    # As in `score_split`.
    query_ptr,
    key_ptr,
    value_ptr,
    keys_ptr,
    values_ptr,
    positions_ptr,
    norms_ptr,
    target_ptr,
    position_ptr,
    oldest_ptr,  # [B]
    newest_ptr,  # [B]
    sink_ptr,
    # Outputs.
    out_ptr,  # [B, K, G, H]
    statistic_ptr,  # [B, K, G]
    logits_ptr,  # [PROGRAMS, G, STRIDE]
    importance_ptr,  # [B, K, STRIDE]
    arrivals_ptr,  # [B, K / TARGETS]
    _keys_out_ptr,
    _values_out_ptr,
    _positions_out_ptr,
    _norms_out_ptr,
    SCALE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    SCORE: tl.constexpr,
    STRIDE: tl.constexpr,
    TARGETS: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    SINK: tl.constexpr,
    CAP: tl.constexpr,
):
    """Do whole rows, one after the other, and their importance per key/value head."""
    program = tl.program_id(0)
    logits_ptr += program.to(tl.int64) * (GROUP * STRIDE)
    heads = tl.arange(0, HEADS_PAD)
    row = program.to(tl.int64)
    for _ in range(program, ROWS, tl.num_programs(0)):
        score_row(
            *(query_ptr, key_ptr, value_ptr, keys_ptr, values_ptr, positions_ptr),
            *(norms_ptr, target_ptr, position_ptr, sink_ptr, out_ptr),
            *(statistic_ptr, logits_ptr, row, 0, ROWS),
            *(SCALE, KV_HEADS, GROUP, SLOTS, HEAD_DIM, 1, BLOCK, GROUP_PAD),
            *(HEAD_PAD, PRECISION, SCORE, STRIDE, SINK, CAP),
        )
        tl.store(arrivals_ptr + row // TARGETS, 0, row % TARGETS == 0)
        # What the program's other threads have stored is read from here on.
        tl.debug_barrier()
        statistic = tl.load(statistic_ptr + row * GROUP + heads, heads < GROUP, other=0)
        oldest = tl.load(oldest_ptr + row // KV_HEADS)
        newest = tl.load(newest_ptr + row // KV_HEADS)
        # Fetched ahead: the processor's other program needs the time for its own tiles.
        for start in tl.range(0, SLOTS, CHUNK, num_stages=3):
            slots = start + tl.arange(0, CHUNK)
            real = slots < SLOTS
            # Read for the last time: what streams past may have the room.
            logits = tl.load(
                logits_ptr + heads[:, None] * STRIDE + slots[None, :],
                (heads < GROUP)[:, None] & real[None, :],
                other=float("-inf"),
                eviction_policy="evict_first",
            )
            norms = tl.load(norms_ptr + row * SLOTS + slots, real, other=0.0)
            positions = tl.load(positions_ptr + row * SLOTS + slots, real, other=-1)
            weights = tl.sum(tl.exp2(logits - statistic[:, None]), 0)
            importance = weights * norms
            barred = (positions < oldest) | (positions > newest)
            importance = tl.where(barred, -importance, importance)
            importance = tl.where(positions < 0, float("inf"), importance)
            tl.store(importance_ptr + row * STRIDE + slots, importance, real)
        tl.debug_barrier()
        row += tl.num_programs(0)
