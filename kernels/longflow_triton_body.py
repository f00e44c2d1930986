"""The Triton kernel of `longflow_triton`; imported at the call, since it needs Triton.

One launch. A *row* is one key/value head of one sequence; its slots may be shared by
several programs (splits), or one program may do several rows, one after the other:

```
each program    attend to its tiles; leave the logits of each slot, head by head
last of a row   join the splits; knowing the softmax, read the logits back: importance
                of each slot, summed over the query heads of the row
last of those   add up the importance of the rows that share a victim, and choose it
```

What a tile leaves is the bare logit, in base 2. All else waits until the softmax is
known: importance is the sum over heads of `2^(logit - statistic)`, with the statistic
that joins the splits anyway, times the norm that was stored when the value was. So a
tile costs no more than plain attention does, and a store; what is read back is still in
the second-level cache.

Who comes last is counted in the upper bits of `target`, which holds the slot in its
lower ones: so the counters need no memory of their own that would have to be cleared,
and they vanish when the next target is stored. Integers are all that is ever added
atomically, and the last one computes the same whoever it is: the result does not
depend on the order of programs.

Importance that leaves the chip is not negative, so its sign says that a slot is
protected; `-inf` says that it is free. The choice is a minimum over int32
(`slot_order`), ties to the lowest slot.
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

_LOWEST = tl.constexpr(-1e30)
_MAX_INT = tl.constexpr(2147483647)


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
def attend_row(
    query_ptr,
    key_ptr,
    value_ptr,
    keys_ptr,
    values_ptr,
    positions_ptr,
    norms_ptr,
    target,  # -1 in a finished row
    position,
    part_ptr,  # [SPLITS, ROWS, G, H]
    statistic_ptr,  # [SPLITS, ROWS, G]
    logits_ptr,  # [G, STRIDE] of this row
    row,
    split,
    SCALE: tl.constexpr,
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
    ROWS: tl.constexpr,
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
    unfinished = position >= 0
    takes_new = unfinished & (split == 0)
    store_token(
        *(keys_ptr, values_ptr, positions_ptr, k_new, v_new, position, target),
        *(takes_new, HEAD_DIM, HEAD_PAD),
    )
    tl.store(norms_ptr + row * SLOTS + target, value_norm(v_new, SCORE), takes_new)
    new_logit = SCALE * tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1)
    # No tile stores the target's logits, whoever else may be at it.
    tl.store(
        logits_ptr + heads * STRIDE + target,
        new_logit,
        heads < tl.where(takes_new, GROUP, 0),
    )
    maximum, total, acc = start_softmax(new_logit, v_new, takes_new, BLOCK)

    first = split * BLOCK + tl.arange(0, BLOCK)
    next_positions = tl.load(positions_ptr + first, first < SLOTS, other=-1)
    # A finished row reads no slot: nobody asks for its output or victim.
    for start in range(0, tl.where(unfinished, SLOTS, 0), SPLITS * BLOCK):
        slots = start + first  # [S]
        occupied = (next_positions >= 0) & (slots != target)
        next_slots = slots + SPLITS * BLOCK
        next_positions = tl.load(
            positions_ptr + next_slots, next_slots < SLOTS, other=-1
        )
        logits, _, maximum, total, acc = attend_tile(
            *(q, keys_ptr, values_ptr, slots, occupied, maximum, total, acc),
            *(SCALE, HEAD_DIM, HEAD_PAD, PRECISION),
        )
        tl.store(
            logits_ptr + heads[:, None] * STRIDE + slots[None, :],
            logits,
            (heads < GROUP)[:, None] & (slots != target)[None, :],
            eviction_policy="evict_last",
        )

    store_part(
        *(part_ptr, statistic_ptr, split * ROWS + row, maximum, total, acc),
        *(GROUP, HEAD_DIM, GROUP_PAD, HEAD_PAD),
    )


@triton.jit
def last_to_arrive(target_ptr, counts, UNIT: tl.constexpr, OF: tl.constexpr):
    """Return whether all others have arrived; what they stored may then be read.

    The counter is what `target` holds in units of `UNIT`, up to `OF`.
    """
    tl.debug_barrier()  # before the one thread that counts, all have stored
    before = tl.atomic_add(target_ptr, tl.where(counts, UNIT, 0), sem="acq_rel")
    tl.debug_barrier()
    return counts & ((before // UNIT) % (2 * OF) == OF - 1)


@triton.jit
def join_splits(
    part_ptr,  # [SPLITS, ROWS, G, H]
    statistic_ptr,  # [SPLITS, ROWS, G]
    out_ptr,  # [ROWS, G, H]
    row,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Weigh the splits of a row and add them; return log2 of its sums `[G]`."""
    heads = tl.arange(0, HEADS_PAD)
    columns = tl.arange(0, HEAD_PAD)
    splits = tl.arange(0, SPLITS_PAD)
    statistic = tl.load(
        statistic_ptr + (splits * ROWS + row)[:, None] * GROUP + heads[None, :],
        (splits < SPLITS)[:, None] & (heads < GROUP)[None, :],
        other=_LOWEST,
    )
    maximum = tl.max(statistic, 0)
    total = maximum + tl.log2(tl.sum(tl.exp2(statistic - maximum[None, :]), 0))
    real = (heads < GROUP)[:, None] & (columns < HEAD_DIM)[None, :]
    offsets = heads[:, None] * HEAD_DIM + columns[None, :]
    acc = tl.zeros([HEADS_PAD, HEAD_PAD], tl.float32)
    for start in range(0, SPLITS, AT_ONCE):
        some = start + tl.arange(0, AT_ONCE)
        inside = some < SPLITS
        weights = tl.load(
            statistic_ptr + (some * ROWS + row)[:, None] * GROUP + heads[None, :],
            inside[:, None] & (heads < GROUP)[None, :],
            other=_LOWEST,
        )
        parts = tl.load(
            part_ptr
            + (some * ROWS + row)[:, None, None] * (GROUP * HEAD_DIM)
            + offsets[None],
            inside[:, None, None] & real[None],
            other=0.0,
        )
        weights = tl.exp2(weights - total[None, :])
        acc += tl.sum(parts * weights[:, :, None], 0)
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * (GROUP * HEAD_DIM) + offsets, out, real)
    return total


@triton.jit
def slot_order(importance, free, protected, real):
    """Return int32 `[S]`, the less the sooner to go: free, evictable, protected."""
    bits = importance.to(tl.int32, bitcast=True)  # as ordered as what is not negative
    order = tl.where(protected, bits, bits - _MAX_INT)
    order = tl.where(free, -_MAX_INT - 1, order)
    return tl.where(real, order, _MAX_INT)


@triton.jit
def weigh_row(
    logits_ptr,  # [G, STRIDE]
    statistic,  # [G]
    norms_ptr,  # [SLOTS]
    positions_ptr,  # [SLOTS]
    importance_ptr,  # [STRIDE], written if the victim is shared
    oldest,
    newest,
    GROUP: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Store the importance of a row's slots, or else return the slot of the least."""
    heads = tl.arange(0, HEADS_PAD)
    best = tl.full([CHUNK], _MAX_INT, tl.int32)
    best_slot = tl.zeros([CHUNK], tl.int32)
    for start in range(0, SLOTS, CHUNK):
        slots = start + tl.arange(0, CHUNK)
        real = slots < SLOTS
        # Read for the last time: what streams past may have the room.
        logits = tl.load(
            logits_ptr + heads[:, None] * STRIDE + slots[None, :],
            (heads < GROUP)[:, None] & real[None, :],
            other=float("-inf"),
            eviction_policy="evict_first",
        )
        norms = tl.load(norms_ptr + slots, real, other=0.0)
        positions = tl.load(positions_ptr + slots, real, other=-1)
        free = positions < 0
        protected = (positions < oldest) | (positions > newest)
        weights = tl.sum(tl.exp2(logits - statistic[:, None]), 0)
        importance = tl.where(free, 0.0, weights * norms)
        if SHARED:
            importance = tl.where(protected, -importance, importance)
            importance = tl.where(free, float("-inf"), importance)
            tl.store(importance_ptr + slots, importance, real)
        else:
            order = slot_order(importance, free, protected, real)
            # Strict, so that of equals the lower slot stays.
            best_slot = tl.where(order < best, slots, best_slot)
            best = tl.minimum(best, order)
    least = tl.min(best, 0)
    return tl.min(tl.where(best == least, best_slot, _MAX_INT), 0)


@triton.jit
def choose_shared(
    importance_ptr,  # [K, STRIDE]
    KV_HEADS: tl.constexpr,
    KV_PAD: tl.constexpr,
    SLOTS: tl.constexpr,
    STRIDE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Return the slot that is least important to all heads of a layer together."""
    heads = tl.arange(0, KV_PAD)
    best = tl.full([CHUNK], _MAX_INT, tl.int32)
    best_slot = tl.zeros([CHUNK], tl.int32)
    for start in range(0, SLOTS, CHUNK):
        slots = start + tl.arange(0, CHUNK)
        real = slots < SLOTS
        importance = tl.load(
            importance_ptr + heads[:, None] * STRIDE + slots[None, :],
            (heads < KV_HEADS)[:, None] & real[None, :],
            other=0.0,
            volatile=True,
        )
        signs = importance.to(tl.int32, bitcast=True) < 0  # of -0 too
        protected = tl.max(signs.to(tl.int32), 0) > 0
        importance = tl.sum(tl.abs(importance), 0)
        free = importance == float("inf")
        order = slot_order(importance, free, protected, real)
        best_slot = tl.where(order < best, slots, best_slot)
        best = tl.minimum(best, order)
    least = tl.min(best, 0)
    return tl.min(tl.where(best == least, best_slot, _MAX_INT), 0)


@triton.jit
def longflow_step(
    # Inputs; the cache (keys, values, positions, norms) and the target are also
    # written, in place.
    query_ptr,  # [B, K, G, H]
    key_ptr,  # [B, K, H]
    value_ptr,  # [B, K, H]
    keys_ptr,  # [B, K, S, H]
    values_ptr,  # [B, K, S, H]
    positions_ptr,  # [B, K, S]
    norms_ptr,  # [B, K, S]
    target_ptr,  # [B, K]
    position_ptr,  # [B]
    oldest_ptr,  # [B]
    newest_ptr,  # [B]
    # Outputs.
    out_ptr,  # [B, K, G, H]
    part_ptr,  # [SPLITS, B, K, G, H]; `out` itself where nothing is split
    statistic_ptr,  # [SPLITS, B, K, G]
    logits_ptr,  # [PROGRAMS, G, STRIDE], or [B, K, G, STRIDE] where rows are split
    importance_ptr,  # [B, K, STRIDE]
    # jax-triton before 0.4 passes aliased buffers a second time, as outputs.
    _keys_out_ptr,
    _values_out_ptr,
    _positions_out_ptr,
    _norms_out_ptr,
    _target_out_ptr,
    SCALE: tl.constexpr,  # times log2(e)
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP_PAD: tl.constexpr,  # G rounded up to what the tensor cores take
    HEAD_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    SCORE: tl.constexpr,
    SHARED: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS_PAD: tl.constexpr,  # G rounded up to a power of two
    KV_PAD: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    SPLITS_AT_ONCE: tl.constexpr,
    CHUNK: tl.constexpr,  # slots of one row that are read back at once
    SHARED_CHUNK: tl.constexpr,  # slots of all rows of a layer
    SPLIT_UNIT: tl.constexpr,  # of the counter of splits in `target`; above all slots
    HEAD_UNIT: tl.constexpr,  # of the counter of heads, above that
):
    """Write the new token, attend, score, and choose what the next token overwrites."""
    program = tl.program_id(0)
    item = program.to(tl.int64)
    for _ in range(program, ROWS * SPLITS, tl.num_programs(0)):
        row = item // SPLITS
        split = (item % SPLITS).to(tl.int32)
        batch = row // KV_HEADS
        position = tl.load(position_ptr + batch)
        unfinished = position >= 0
        # Others may have arrived already.
        target = tl.load(target_ptr + row, volatile=True) % SPLIT_UNIT
        target = tl.where(unfinished, target, -1)
        if SPLITS == 1:
            mine = logits_ptr + program.to(tl.int64) * (GROUP * STRIDE)
            attend_row(
                *(query_ptr, key_ptr, value_ptr, keys_ptr, values_ptr, positions_ptr),
                *(norms_ptr, target, position, out_ptr, statistic_ptr, mine, row, 0),
                *(SCALE, GROUP, SLOTS, HEAD_DIM, SPLITS, BLOCK, GROUP_PAD, HEAD_PAD),
                *(PRECISION, SCORE, STRIDE, ROWS),
            )
            tl.debug_barrier()
            ends_row = unfinished
        else:
            mine = logits_ptr + row * (GROUP * STRIDE)
            attend_row(
                *(query_ptr, key_ptr, value_ptr, keys_ptr, values_ptr, positions_ptr),
                *(norms_ptr, target, position, part_ptr, statistic_ptr, mine, row),
                *(split, SCALE, GROUP, SLOTS, HEAD_DIM, SPLITS, BLOCK, GROUP_PAD),
                *(HEAD_PAD, PRECISION, SCORE, STRIDE, ROWS),
            )
            if not unfinished:  # finite is all that its output has to be
                offsets, real = head_offsets(GROUP, HEAD_DIM, GROUP_PAD, HEAD_PAD)
                zeros = tl.zeros([GROUP_PAD, HEAD_PAD], out_ptr.dtype.element_ty)
                tl.store(out_ptr + row * (GROUP * HEAD_DIM) + offsets, zeros, real)
            ends_row = last_to_arrive(target_ptr + row, unfinished, SPLIT_UNIT, SPLITS)
        if ends_row:
            if SPLITS == 1:
                heads = tl.arange(0, HEADS_PAD)
                statistic = tl.load(
                    statistic_ptr + row * GROUP + heads, heads < GROUP, other=0.0
                )
            else:
                statistic = join_splits(
                    *(part_ptr, statistic_ptr, out_ptr, row, ROWS, GROUP, HEADS_PAD),
                    *(HEAD_DIM, HEAD_PAD, SPLITS, SPLITS_PAD, SPLITS_AT_ONCE),
                )
            slot = weigh_row(
                *(mine, statistic, norms_ptr + row * SLOTS),
                *(positions_ptr + row * SLOTS, importance_ptr + row * STRIDE),
                *(tl.load(oldest_ptr + batch), tl.load(newest_ptr + batch)),
                *(GROUP, HEADS_PAD, SLOTS, STRIDE, CHUNK, SHARED),
            )
            if not SHARED:
                tl.store(target_ptr + row, slot)
            else:
                first = batch * KV_HEADS
                if last_to_arrive(target_ptr + first, True, HEAD_UNIT, KV_HEADS):
                    slot = choose_shared(
                        *(importance_ptr + first * STRIDE, KV_HEADS, KV_PAD),
                        *(SLOTS, STRIDE, SHARED_CHUNK),
                    )
                    layer = tl.arange(0, KV_PAD)
                    chosen = tl.zeros([KV_PAD], tl.int32) + slot
                    tl.store(target_ptr + first + layer, chosen, layer < KV_HEADS)
        if SPLITS == 1:
            tl.debug_barrier()  # the scratch is written anew
        item += tl.num_programs(0)
