"""What paths of a tree overwrite under LongFlow, in Triton; imported at the call only.

One program per (row, node) of `longflow_finish_body` follows the path to its node:

```
guess    the victims of all ancestors, one after the other, by what their slots would be
         worth had nothing been overwritten: in registers, from the lists
choose   with these victims, all of them at once and exactly: whom else would an
         ancestor's step have given up?  Until nobody would
```

An ancestor whose predecessors' victims are right gets its own right, so after as many
rounds as the path is long all are; mostly the guess is right already. A list is enough
if the least of it is worth no more than what it ends with, because nothing is ever
worth less than that. Where it is not, or where a path has overwritten nearly all that a
head attends to, whose rest could not be told by taking away, all slots are looked at.
"""

import triton
import triton.language as tl

from jaxkv.kernels.longflow_choice_body import _MAX_INT, slot_order, weigh_slots
from jaxkv.kernels.longflow_tree_triton_body import _LAST, pair, path_order, read_slots

# The share of a head's attention up to which the rest is told by taking away.
_MOST = tl.constexpr(0.9)
_LEAST = tl.constexpr(1e-30)


@triton.jit
def guess_path(
    orders_ptr,  # [T, CHUNKS * LIST] of the row, as the next
    listed_ptr,
    path_orders_ptr,  # [T, DEPTHS] of the row
    path,  # [D], nodes by depth
    depth,
    DEPTHS: tl.constexpr,
    LISTED: tl.constexpr,
    LISTED_PAD: tl.constexpr,
    DEPTHS_PAD: tl.constexpr,
):
    """Return the slot of each token of the path, -1 for the root and beyond."""
    steps = tl.arange(0, DEPTHS_PAD)
    lanes = tl.arange(0, LISTED_PAD)
    listed_real = lanes < LISTED
    slots = tl.full([DEPTHS_PAD], -1, tl.int32)
    alive = tl.zeros([DEPTHS_PAD], tl.int32)
    next_orders = tl.load(orders_ptr + lanes, listed_real, other=_MAX_INT)
    next_listed = tl.load(listed_ptr + lanes, listed_real, other=-1)
    next_own = tl.load(path_orders_ptr + steps, steps < DEPTHS, other=_MAX_INT)
    for step in range(0, depth):
        orders, listed, own = next_orders, next_listed, next_own
        following = tl.sum(tl.where(steps == step + 1, path, 0), 0).to(tl.int64)
        place = following * LISTED + lanes
        next_orders = tl.load(orders_ptr + place, listed_real, other=_MAX_INT)
        next_listed = tl.load(listed_ptr + place, listed_real, other=-1)
        next_own = tl.load(
            path_orders_ptr + following * DEPTHS + steps,
            steps < DEPTHS,
            other=_MAX_INT,
        )
        taken = tl.max((listed[:, None] == slots[None, :]).to(tl.int32), 1) > 0
        pairs = tl.where(taken | (listed < 0), _LAST, pair(orders, listed))
        owns = tl.where(alive > 0, pair(own, slots), _LAST)
        victim = tl.minimum(tl.min(pairs, 0), tl.min(owns, 0)).to(tl.int32)
        alive = tl.where(slots == victim, 0, alive)
        alive = tl.where(steps == step + 1, 1, alive)
        slots = tl.where(steps == step + 1, victim, slots)
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
def search_all(
    logits_ptr,
    offsets,  # [HEADS] of the ancestor's logits
    norms_ptr,
    positions_ptr,
    new_norms_ptr,
    heads,  # [HEADS], of [B, K]
    head_real,
    target,  # [HEADS]
    whole,  # [HEADS]
    sinks,  # [HEADS]
    path,  # [D]
    slots,  # [D], of the path's tokens
    later,  # [D]
    rank,  # of the ancestor
    position,  # of the root
    oldest,
    NODES: tl.constexpr,
    SLOTS: tl.constexpr,
    NEW: tl.constexpr,
    RECENT: tl.constexpr,
    SEARCH: tl.constexpr,
    DEPTHS_PAD: tl.constexpr,
):
    """Return the victim of one ancestor as a pair, from all slots and nothing else."""
    steps = tl.arange(0, DEPTHS_PAD)
    on_path = (steps > 0) & (steps <= rank)
    alive = on_path & (later > rank)
    real = head_real[:, None] & alive[None, :]
    own = tl.load(
        logits_ptr + offsets[:, None] + NEW + path[None, :], real, other=float("-inf")
    )
    own_norms = tl.load(
        new_norms_ptr + heads[:, None] * NODES + path[None, :], real, other=0.0
    )
    newest = position + rank - RECENT
    rest = tl.sum(tl.exp2(own - whole[:, None]), 1) + tl.exp2(sinks - whole)
    for start in range(0, SLOTS, SEARCH):
        found = start + tl.arange(0, SEARCH)
        logits, _, _ = read_slots(
            *(logits_ptr, offsets, norms_ptr, positions_ptr, new_norms_ptr, heads),
            *(found, head_real, target, position, NODES, SLOTS, NEW),
        )
        hits = (found[:, None] == slots[None, :]) & on_path[None, :]
        taken = tl.max(hits.to(tl.int32), 1) > 0
        weights = tl.where(taken[None, :], 0.0, tl.exp2(logits - whole[:, None]))
        rest += tl.sum(weights, 1)
    whole += tl.log2(tl.maximum(rest, _LEAST))
    worth = tl.sum(tl.exp2(own - whole[:, None]) * own_norms, 0)
    own_order = path_order(worth, position + steps, oldest, newest, alive)
    best = tl.min(tl.where(alive, pair(own_order, slots), _LAST), 0)
    for start in range(0, SLOTS, SEARCH):
        found = start + tl.arange(0, SEARCH)
        logits, norms, positions = read_slots(
            *(logits_ptr, offsets, norms_ptr, positions_ptr, new_norms_ptr, heads),
            *(found, head_real, target, position, NODES, SLOTS, NEW),
        )
        importance, free, protected = weigh_slots(
            logits, whole, norms, positions, oldest, newest
        )
        order = slot_order(importance, free, protected, found < SLOTS)
        hits = (found[:, None] == slots[None, :]) & on_path[None, :]
        taken = tl.max(hits.to(tl.int32), 1) > 0
        best = tl.minimum(best, tl.min(tl.where(taken, _LAST, pair(order, found)), 0))
    return best


@triton.jit
def choose(
    logits_ptr,  # [B, K, T, G, STRIDE]
    whole_ptr,  # [T, HEADS] of the row
    orders_ptr,  # [T, CHUNKS * LIST] of the row, as the next
    listed_ptr,
    norms_ptr,  # [B, K, S]
    positions_ptr,  # [B, K, S]
    new_norms_ptr,  # [B, K, T]
    path_ptr,  # [DEPTHS] of the node
    kv_heads,  # [HEADS], of [B, K]
    head_real,
    target,  # [HEADS]
    sinks,  # [HEADS], in base 2
    ranks,  # [R], of the ancestors
    depth,
    path,  # [D]
    slots,  # [D]
    is_first,  # [D]
    later,  # [D]
    position,
    oldest,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    NODES: tl.constexpr,
    SLOTS: tl.constexpr,
    NEW: tl.constexpr,
    STRIDE: tl.constexpr,
    RECENT: tl.constexpr,
    LIST: tl.constexpr,
    LISTED: tl.constexpr,
    LISTED_PAD: tl.constexpr,
    EXACTLY: tl.constexpr,
    SEARCH: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    DEPTHS_PAD: tl.constexpr,
):
    """Return the victim of some ancestors, int32 `[R]`, if the slots are right."""
    steps = tl.arange(0, DEPTHS_PAD)
    heads = tl.arange(0, HEADS_PAD)
    real = ranks <= depth
    node = tl.maximum(tl.load(path_ptr + ranks, real, other=0), 0).to(tl.int64)
    both = real[:, None] & head_real[None, :]
    whole = tl.load(whole_ptr + node[:, None] * HEADS + heads[None, :], both, other=0.0)
    offsets = (kv_heads * (NODES * GROUP) + heads % GROUP) * STRIDE
    offsets = offsets[None, :] + node[:, None] * (GROUP * STRIDE)  # [R, HEADS]

    on_path = (steps > 0)[None, :] & (steps[None, :] <= ranks[:, None]) & real[:, None]
    ended = on_path & (later[None, :] <= ranks[:, None])
    alive = on_path & (later[None, :] > ranks[:, None])
    is_root = slots[:, None] == target[None, :]  # [D, HEADS]
    column = tl.where(is_root, NEW, slots[:, None])
    old = tl.load(
        logits_ptr + offsets[:, None, :] + column[None],
        (on_path & is_first[None, :])[:, :, None] & head_real[None, None, :],
        other=float("-inf"),
    )
    own = tl.load(
        logits_ptr + offsets[:, None, :] + NEW + path[None, :, None],
        on_path[:, :, None] & head_real[None, None, :],
        other=float("-inf"),
    )
    own = tl.exp2(own - whole[:, None, :])
    lost = tl.exp2(old - whole[:, None, :]) + tl.where(ended[:, :, None], own, 0.0)
    share = tl.sum(lost, 1)  # [R, HEADS]
    is_sound = tl.max(share, 1) <= _MOST
    rest = tl.maximum(1.0 - share, _LEAST)

    own_norms = tl.load(
        new_norms_ptr + kv_heads[None, :] * NODES + path[:, None],
        (steps > 0)[:, None] & head_real[None, :],
        other=0.0,
    )
    importance = tl.sum(own * own_norms[None] / rest[:, None, :], 2)
    newest = position + ranks - RECENT
    order = path_order(
        importance, (position + steps)[None, :], oldest, newest[:, None], alive
    )
    slots_of = tl.broadcast_to(slots[None, :], alive.shape)
    best = tl.min(tl.where(alive, pair(order, slots_of), _LAST), 1)  # [R]

    lanes = tl.arange(0, LISTED_PAD)
    place = node[:, None] * LISTED + lanes[None, :]
    lane_real = real[:, None] & (lanes < LISTED)[None, :]
    orders = tl.load(orders_ptr + place, lane_real, other=_MAX_INT)
    listed = tl.load(listed_ptr + place, lane_real, other=-1)
    pairs = tl.where(listed >= 0, pair(orders, listed), _LAST)
    is_last = (lanes % LIST == LIST - 1)[None, :]
    bound = tl.min(tl.where(is_last, pairs, _LAST), 1)
    hits = (listed[:, :, None] == slots[None, None, :]) & on_path[:, None, :]
    pairs = tl.where(tl.max(hits.to(tl.int32), 2) > 0, _LAST, pairs)
    whole += tl.log2(rest)
    for _ in tl.static_range(EXACTLY):
        least = tl.min(pairs, 1)
        pairs = tl.where(pairs == least[:, None], _LAST, pairs)
        order, slot = (least >> 32).to(tl.int32), least.to(tl.int32)
        there = (order != _MAX_INT) & real
        is_root = slot[:, None] == target[None, :]
        held = there[:, None] & head_real[None, :]
        found = tl.load(
            logits_ptr + offsets + tl.where(is_root, NEW, slot[:, None]),
            held,
            other=float("-inf"),
        )
        norms = tl.load(
            norms_ptr + kv_heads[None, :] * SLOTS + slot[:, None],
            held & (slot[:, None] != target[None, :]),
            other=0.0,
        )
        root_norms = tl.load(
            new_norms_ptr + kv_heads[None, :] * NODES + (slot * 0)[:, None],
            held & is_root,
            other=0.0,
        )
        # Where a head holds nothing, the norm means nothing.
        weights = tl.exp2(found - whole) * (norms + root_norms)
        importance = tl.sum(tl.where(found > float("-inf"), weights, 0.0), 1)
        bits = importance.to(tl.int32, bitcast=True)
        exact = tl.where(order >= 0, bits, bits - _MAX_INT)
        exact = tl.where(order == -_MAX_INT - 1, order, exact)  # free
        best = tl.minimum(best, tl.where(there, pair(exact, slot), _LAST))
    bound = tl.minimum(bound, tl.min(pairs, 1))
    search = real & ((best > bound) | ~is_sound)
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
    orders_ptr,
    listed_ptr,
    path_orders_ptr,  # [T, DEPTHS] of the row
    norms_ptr,
    positions_ptr,
    new_norms_ptr,
    path_ptr,
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
    EXACTLY: tl.constexpr,
    SEARCH: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    DEPTHS_PAD: tl.constexpr,
):
    """Return the slots of a path's tokens, -1 for the root's, and the node's victim."""
    steps = tl.arange(0, DEPTHS_PAD)
    slots = guess_path(
        *(orders_ptr, listed_ptr, path_orders_ptr, path, depth),
        *(DEPTHS, LISTED, LISTED_PAD, DEPTHS_PAD),
    )
    agreed = depth < 0
    last = depth
    while agreed == 0:
        is_first, later = first_and_later(slots, steps, DEPTHS_PAD)
        chosen = slots
        for start in range(0, depth + 1, RANKS):
            ranks = start + tl.arange(0, RANKS)
            victims = choose(
                *(logits_ptr, whole_ptr, orders_ptr, listed_ptr, norms_ptr),
                *(positions_ptr, new_norms_ptr, path_ptr, kv_heads, head_real),
                *(
                    target,
                    sinks,
                    ranks,
                    depth,
                    path,
                    slots,
                    is_first,
                    later,
                    position,
                    oldest,
                ),
                *(GROUP, HEADS, NODES, SLOTS, NEW, STRIDE, RECENT, LIST, LISTED),
                *(LISTED_PAD, EXACTLY, SEARCH, HEADS_PAD, DEPTHS_PAD),
            )
            # A victim is the slot of the next step.
            is_next = (steps[:, None] == ranks[None, :] + 1) & (steps <= depth)[:, None]
            found = tl.sum(tl.where(is_next, victims[None, :], 0), 1)
            is_known = tl.max(is_next.to(tl.int32), 1) > 0
            chosen = tl.where(is_known, found, chosen)
            is_own = ranks == depth
            own = tl.sum(tl.where(is_own, victims, 0), 0)
            last = tl.where((start <= depth) & (depth < start + RANKS), own, last)
        agreed = tl.max((chosen != slots).to(tl.int32), 0) == 0
        slots = chosen
    return slots, last
