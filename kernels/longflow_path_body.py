"""What paths of a tree overwrite under LongFlow, in Triton; imported at the call only.

One program per (row, node) of `longflow_finish_body` follows the path to its node:

```
guess    the victims of all ancestors, one after the other, by what their slots would be
         worth had nothing been overwritten: in registers, from the lists
choose   with these victims, all of them at once and exactly: whom else would an
         ancestor's step have given up?  Until nobody would
```

An ancestor whose predecessors' victims are right gets its own right, so after as many
rounds as the path is long all are; mostly the guess is right already. Of a list a few
are looked at, and then a few more, until the best is worth no more than what comes
next: that is worth what it was, divided by the largest rest that a head has left, or
more. Where even the list's end does not bound it so, or where a path has overwritten
nearly all that a head attends to, whose rest could not be told by taking away, all
slots are looked at (`longflow_search_body`), which takes many times as long.
"""

import triton
import triton.language as tl

from jaxkv.kernels.longflow_choice_body import _MAX_INT
from jaxkv.kernels.longflow_search_body import _LEAST, search_all
from jaxkv.kernels.longflow_tree_triton_body import _LAST, pair, path_order

# The share of a head's attention up to which the rest is told by taking away.
_MOST = tl.constexpr(0.9)
_NEARLY = tl.constexpr(1 - 1e-5)  # room for rounding


@triton.jit
def look_up(x, steps, wanted):
    """Return int32 `[D]` at some steps `[C]`."""
    is_it = wanted[:, None] == steps[None, :]
    return tl.sum(tl.where(is_it, x[None, :], 0), 1)


@triton.jit
def leave_out(pairs, listed, slots, ranks, DEPTHS_PAD: tl.constexpr):
    """Return pairs `[R, L]` without slots that paths have overwritten up to `[R]`."""
    AT_ONCE: tl.constexpr = min(DEPTHS_PAD, 16)
    steps = tl.arange(0, DEPTHS_PAD)
    for start in range(0, DEPTHS_PAD, AT_ONCE):
        step = start + tl.arange(0, AT_ONCE)
        slot = slots
        if DEPTHS_PAD > AT_ONCE:
            slot = look_up(slots, steps, step)
        on_path = (step > 0)[:, None] & (step[:, None] <= ranks[None, :])
        hits = (listed[None, :, :] == slot[:, None, None]) & on_path[:, :, None]
        pairs = tl.where(tl.max(hits.to(tl.int32), 0) > 0, _LAST, pairs)
    return pairs


@triton.jit
def guess_path(
    pairs,  # [R, L] of what ancestors list
    listed,  # [R, L]
    own_orders,  # [R, D] of the path's tokens
    slots,  # [D], as far as they are known
    ranks,  # [R], of the ancestors
    first,  # of these
    depth,
    RANKS: tl.constexpr,
    DEPTHS_PAD: tl.constexpr,
):
    """Return the slots `[D]`, those of the tokens after these ancestors guessed."""
    steps = tl.arange(0, DEPTHS_PAD)
    known = (steps > 0) & (steps <= first)
    if first > 0:
        pairs = leave_out(pairs, listed, slots, tl.minimum(ranks, first), DEPTHS_PAD)
    _, later = first_and_later(slots, steps, DEPTHS_PAD)
    alive = tl.where(known & (later == DEPTHS_PAD), 1, 0)
    for rank in range(first, tl.minimum(first + RANKS, depth)):
        is_it = (ranks == rank)[:, None]
        owns = tl.where(
            is_it & (alive > 0)[None, :], pair(own_orders, slots[None, :]), _LAST
        )
        least = tl.minimum(
            tl.min(tl.reshape(tl.where(is_it, pairs, _LAST), [pairs.numel]), 0),
            tl.min(tl.reshape(owns, [owns.numel]), 0),
        )
        victim = least.to(tl.int32)
        pairs = tl.where(listed == victim, _LAST, pairs)
        alive = tl.where(slots == victim, 0, alive)
        alive = tl.where(steps == rank + 1, 1, alive)
        slots = tl.where(steps == rank + 1, victim, slots)
    return slots


@triton.jit
def first_and_later(slots, steps, DEPTHS_PAD: tl.constexpr):
    """Return which tokens are the first in their slot, and the step of the next one."""
    same = (slots[:, None] == slots[None, :]) & (slots >= 0)[:, None]
    before = same & (steps[None, :] < steps[:, None])
    after = same & (steps[None, :] > steps[:, None])
    is_first = (slots >= 0) & (tl.max(before.to(tl.int32), 1) == 0)
    return is_first, tl.min(tl.where(after, steps[None, :], DEPTHS_PAD), 1)


@triton.jit
def take_some(pairs, SOME: tl.constexpr):
    """Return the least pairs `[R, SOME]`, and the others."""
    columns = tl.arange(0, SOME)
    some = tl.full([pairs.shape[0], SOME], 0, tl.int64)
    for i in tl.static_range(SOME):
        least = tl.min(pairs, 1)
        pairs = tl.where(pairs == least[:, None], _LAST, pairs)
        some = tl.where((columns == i)[None, :], least[:, None], some)
    return some, pairs


@triton.jit
def read_some(
    logits_ptr,
    norms_ptr,
    new_norms_ptr,
    offsets,  # [R, HEADS]
    kv_heads,  # [HEADS]
    target,  # [HEADS]
    both,  # [R, HEADS]
    some,  # [R, C], pairs
    NODES: tl.constexpr,
    SLOTS: tl.constexpr,
    NEW: tl.constexpr,
):
    """Return logits and norms `[R, C, HEADS]` of listed slots."""
    there = ((some >> 32).to(tl.int32) != _MAX_INT)[:, :, None] & both[:, None, :]
    slot = some.to(tl.int32)[:, :, None]
    is_root = slot == target[None, None, :]
    found = tl.load(
        logits_ptr + offsets[:, None, :] + tl.where(is_root, NEW, slot),
        there,
        other=float("-inf"),
    )
    norms = tl.load(
        norms_ptr + kv_heads[None, None, :] * SLOTS + slot, there & ~is_root, other=0.0
    )
    norms += tl.load(
        new_norms_ptr + kv_heads[None, None, :] * NODES + slot * 0,
        there & is_root,
        other=0.0,
    )
    return found, norms


@triton.jit
def weigh_some(some, found, norms, whole):
    """Return the least `[R]` of listed slots, by what they are worth exactly."""
    # Where a head holds nothing, the norm means nothing.
    weights = tl.exp2(found - whole[:, None, :]) * norms
    importance = tl.sum(tl.where(found > float("-inf"), weights, 0.0), 2)
    bits = importance.to(tl.int32, bitcast=True)
    order = (some >> 32).to(tl.int32)
    exact = tl.where(order >= 0, bits, bits - _MAX_INT)
    exact = tl.where(order == -_MAX_INT - 1, order, exact)  # free
    exact = tl.where(order == _MAX_INT, _LAST, pair(exact, some.to(tl.int32)))
    return tl.min(exact, 1)


@triton.jit
def read_own(logits_ptr, offsets, whole, path, wanted, head_real, NEW: tl.constexpr):
    """Return the shares `[D, R, HEADS]` of some of the path's tokens `[D, R]`."""
    own = tl.load(
        logits_ptr + offsets[None, :, :] + NEW + path[:, None, None],
        wanted[:, :, None] & head_real[None, None, :],
        other=float("-inf"),
    )
    return tl.exp2(own - whole[None, :, :])


@triton.jit
def raise_pair(pairs, factor):
    """Return pairs `[R]` of slots that are worth `factor` times as much."""
    order = (pairs >> 32).to(tl.int32)
    bits = tl.where(order >= 0, order, order + _MAX_INT)
    bits = (bits.to(tl.float32, bitcast=True) * factor).to(tl.int32, bitcast=True)
    raised = tl.where(order >= 0, bits, bits - _MAX_INT)
    kept = (order == -_MAX_INT - 1) | (order == _MAX_INT)
    return tl.where(kept, pairs, pair(raised, pairs.to(tl.int32)))


@triton.jit
def choose(
    logits_ptr,  # [TARGETS, T, G, STRIDE] of the row
    whole_ptr,  # [T, HEADS] of the row
    norms_ptr,  # [TARGETS, S] of the row, as the next
    positions_ptr,
    new_norms_ptr,  # [TARGETS, T] of the row
    kv_heads,  # [HEADS], of the row
    head_real,
    target,  # [HEADS]
    sinks,  # [HEADS], in base 2
    node,  # [R], the ancestors
    ranks,  # [R], their depths
    whole,  # [R, HEADS]
    offsets,  # [R, HEADS], of their logits
    own_orders,  # [R, D], of the path's tokens had nothing been overwritten
    pairs,  # [R, L]
    listed,  # [R, L]
    bound,  # [R], what lists end with
    depth,
    path,  # [D]
    slots,  # [D]
    position,
    oldest,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    NODES: tl.constexpr,
    SLOTS: tl.constexpr,
    NEW: tl.constexpr,
    STRIDE: tl.constexpr,
    RECENT: tl.constexpr,
    SOME: tl.constexpr,
    SEARCH: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    DEPTHS_PAD: tl.constexpr,
):
    """Return the victim of some ancestors, int32 `[R]`, if the slots are right."""
    steps = tl.arange(0, DEPTHS_PAD)
    heads = tl.arange(0, HEADS_PAD)
    is_first, later = first_and_later(slots, steps, DEPTHS_PAD)
    real = ranks <= depth
    both = real[:, None] & head_real[None, :]
    on_path = (steps > 0)[:, None] & (steps[:, None] <= ranks[None, :]) & real[None, :]
    ended = on_path & (later[:, None] <= ranks[None, :])
    pairs = leave_out(pairs, listed, slots, ranks, DEPTHS_PAD)
    some, pairs = take_some(pairs, SOME)
    # All that is read depends on the slots alone, and is waited for once.
    is_root = slots[:, None] == target[None, :]  # [D, HEADS]
    column = tl.where(is_root, NEW, slots[:, None])
    old = tl.load(
        logits_ptr + offsets[None, :, :] + column[:, None, :],
        (on_path & is_first[:, None])[:, :, None] & head_real[None, None, :],
        other=float("-inf"),
    )
    found, norms = read_some(
        *(logits_ptr, norms_ptr, new_norms_ptr, offsets, kv_heads, target, both),
        *(some, NODES, SLOTS, NEW),
    )
    share = tl.sum(tl.exp2(old - whole[None, :, :]), 0)  # [R, HEADS]
    if tl.max(tl.max(ended.to(tl.int32), 1), 0) > 0:
        share += tl.sum(
            read_own(logits_ptr, offsets, whole, path, ended, head_real, NEW), 0
        )
    is_sound = tl.max(share, 1) <= _MOST
    rest = tl.maximum(1.0 - share, _LEAST)
    whole += tl.log2(rest)
    best = weigh_some(some, found, norms, whole)
    # By so much at least is what is overwritten nowhere worth more than lists say.
    most = tl.max(tl.where(head_real[None, :], rest, 0.0), 1)
    factor = _NEARLY / tl.maximum(most, _LEAST)
    left = tl.min(pairs, 1)
    more = real & is_sound & (best > raise_pair(left, factor))
    while tl.max(more.to(tl.int32), 0) > 0:
        some, pairs = take_some(pairs, SOME)
        found, norms = read_some(
            *(logits_ptr, norms_ptr, new_norms_ptr, offsets, kv_heads, target, both),
            *(some, NODES, SLOTS, NEW),
        )
        best = tl.minimum(best, weigh_some(some, found, norms, whole))
        left = tl.min(pairs, 1)
        more = real & is_sound & (best > raise_pair(left, factor))
    # Tokens of the path are worth more likewise, and mostly none of them is the victim.
    stays = later[None, :] > ranks[:, None]
    stays &= (steps > 0)[None, :] & (steps[None, :] <= ranks[:, None])
    owns = tl.where(stays, pair(own_orders, slots[None, :]), _LAST)
    if tl.max((real & (best >= raise_pair(tl.min(owns, 1), factor))).to(tl.int32), 0):
        alive = on_path & (later[:, None] > ranks[None, :])
        own_norms = tl.load(
            new_norms_ptr + kv_heads[None, :] * NODES + path[:, None],
            (steps > 0)[:, None] & head_real[None, :],
            other=0.0,
        )
        own = read_own(logits_ptr, offsets, whole, path, alive, head_real, NEW)
        order = path_order(
            tl.sum(own * own_norms[:, None, :], 2),
            *((position + steps)[:, None], oldest),
            *((position + ranks - RECENT)[None, :], alive),
        )
        slots_of = tl.broadcast_to(slots[:, None], alive.shape)
        own_pairs = tl.where(alive, pair(order, slots_of), _LAST)
        best = tl.minimum(best, tl.min(own_pairs, 0))
    search = real & ((best > raise_pair(bound, factor)) | ~is_sound)
    if tl.max(search.to(tl.int32), 0) > 0:
        for i in range(ranks.shape[0]):
            is_it = (ranks == tl.min(ranks, 0) + i) & search
            if tl.max(is_it.to(tl.int32), 0) > 0:
                at = tl.sum(tl.where(is_it, node, 0), 0)
                base = (kv_heads * (NODES * GROUP) + heads % GROUP) * STRIDE
                again = search_all(
                    *(logits_ptr, base + at * (GROUP * STRIDE), norms_ptr),
                    *(positions_ptr, new_norms_ptr, kv_heads, head_real, target),
                    tl.load(whole_ptr + at * HEADS + heads, head_real, other=0.0),
                    *(sinks, path, slots, later, tl.sum(tl.where(is_it, ranks, 0), 0)),
                    *(position, oldest, NODES, SLOTS, NEW, RECENT, SEARCH, DEPTHS_PAD),
                )
                best = tl.where(is_it, again, best)
    return best.to(tl.int32)


@triton.jit
def follow_path(
    # As for `choose`.
    logits_ptr,
    whole_ptr,
    orders_ptr,  # [T, CHUNKS * LIST] of the row, as the next
    listed_ptr,
    path_orders_ptr,  # [T, DEPTHS] of the row
    norms_ptr,
    positions_ptr,
    new_norms_ptr,
    path_ptr,  # [DEPTHS] of the node
    kv_heads,
    head_real,
    target,
    sinks,
    depth,
    path,
    position,
    oldest,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    NODES: tl.constexpr,
    DEPTHS: tl.constexpr,
    SLOTS: tl.constexpr,
    NEW: tl.constexpr,
    STRIDE: tl.constexpr,
    RECENT: tl.constexpr,
    LIST: tl.constexpr,
    LISTED: tl.constexpr,
    LISTED_PAD: tl.constexpr,
    RANKS: tl.constexpr,
    SOME: tl.constexpr,
    SEARCH: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    DEPTHS_PAD: tl.constexpr,
):
    """Return the slots of a path's tokens, -1 for the root's, and the node's victim."""
    steps = tl.arange(0, DEPTHS_PAD)
    heads = tl.arange(0, HEADS_PAD)
    lanes = tl.arange(0, LISTED_PAD)
    slots = tl.full([DEPTHS_PAD], -1, tl.int32)
    last = depth
    for first in range(0, depth + 1, RANKS):
        ranks = first + tl.arange(0, RANKS)
        real = ranks <= depth
        node = tl.maximum(tl.load(path_ptr + ranks, real, other=0), 0)
        place = node[:, None] * LISTED + lanes[None, :]
        lane_real = real[:, None] & (lanes < LISTED)[None, :]
        orders = tl.load(orders_ptr + place, lane_real, other=_MAX_INT)
        listed = tl.load(listed_ptr + place, lane_real, other=-1)
        own_orders = tl.load(
            path_orders_ptr + node[:, None] * DEPTHS + steps[None, :],
            real[:, None] & (steps < DEPTHS)[None, :],
            other=_MAX_INT,
        )
        both = real[:, None] & head_real[None, :]
        whole = tl.load(
            whole_ptr + node[:, None] * HEADS + heads[None, :], both, other=0.0
        )
        offsets = (kv_heads * (NODES * GROUP) + heads % GROUP) * STRIDE
        offsets = offsets[None, :] + node[:, None] * (GROUP * STRIDE)  # [R, HEADS]
        pairs = tl.where(listed >= 0, pair(orders, listed), _LAST)
        is_last = (lanes % LIST == LIST - 1)[None, :]
        bound = tl.min(tl.where(is_last, pairs, _LAST), 1)
        slots = guess_path(
            *(pairs, listed, own_orders, slots, ranks, first, depth),
            *(RANKS, DEPTHS_PAD),
        )
        is_next = (steps[:, None] == ranks[None, :] + 1) & (steps <= depth)[:, None]
        is_known = tl.max(is_next.to(tl.int32), 1) > 0
        agreed = depth < 0
        while agreed == 0:
            victims = choose(
                *(logits_ptr, whole_ptr, norms_ptr, positions_ptr, new_norms_ptr),
                *(kv_heads, head_real, target, sinks, node, ranks, whole, offsets),
                *(own_orders, pairs, listed, bound, depth, path, slots),
                *(position, oldest, GROUP, HEADS, NODES, SLOTS, NEW, STRIDE, RECENT),
                *(SOME, SEARCH, HEADS_PAD, DEPTHS_PAD),
            )
            # A victim is the slot of the next step.
            chosen = tl.sum(tl.where(is_next, victims[None, :], 0), 1)
            chosen = tl.where(is_known, chosen, slots)
            last = tl.sum(tl.where(ranks == depth, victims, 0), 0)
            agreed = tl.max((chosen != slots).to(tl.int32), 0) == 0
            slots = chosen
    return slots, last
