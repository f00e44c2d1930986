"""The victim of one ancestor from all slots, in Triton; imported at the call only.

`longflow_path_body` asks for it where lists do not say enough.
"""

import triton
import triton.language as tl

from jaxkv.kernels.longflow_choice_body import slot_order, weigh_slots
from jaxkv.kernels.longflow_tree_triton_body import _LAST, pair, path_order, read_slots

_LEAST = tl.constexpr(1e-30)


@triton.jit
def search_all(
    logits_ptr,
    offsets,  # [HEADS] of the ancestor's logits
    norms_ptr,
    positions_ptr,
    new_norms_ptr,
    heads,  # [HEADS], KV heads of the row
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
