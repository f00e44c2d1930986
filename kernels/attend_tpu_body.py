"""Pallas kernels of `attend_tpu`: what happens in one step of the grid.

The new token never passes through HBM: it starts the softmax from VMEM, its slot is
masked out of the block, and its row is put into the tile of rows around it, which is in
VMEM at that moment and goes back through the output's own pipeline. So no step reads
what another one writes, and no part of the cache is copied.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxkv.kernels.weighing import capped

LANES = 128
_LOWEST = -1e30  # below every logit, and finite: an empty head gives zeros, not NaN
_NO_SLOT = float(1 << 24)  # slots are counted in float32, exact below this


class _Refs(NamedTuple):
    """The references that every kernel has, in the order that Pallas passes them in."""

    sink: Any  # [1, G, 128], equal lanes; None where the plan has no sink
    query: Any  # [1, 1, G, H]
    key: Any  # [1, 1, 1, H]
    value: Any  # [1, 1, 1, H]
    keys: Any  # [1, 1, block, H]
    values: Any  # [1, 1, block, H]
    positions: Any  # [1, K, padded]
    out: Any  # [1, 1, G, H]
    new_keys: Any  # [1, 1, tile, H]
    new_values: Any  # [1, 1, tile, H]
    new_positions: Any  # [1, K, padded]
    maximum: Any  # [G, 128], equal lanes
    total: Any  # [G, 128], equal lanes
    acc: Any  # [G, H]


def attend(target_ref, position_ref, *refs, plan):
    """Kernel that only attends."""
    refs = _Refs(*_with_sink(refs, plan))
    _attend_block(target_ref, position_ref, refs, None, plan)


def score(target_ref, position_ref, *refs, plan):
    """Kernel that attends and scores, and leaves the choice to others."""
    refs = _with_sink(refs, plan)
    importance_ref, scores = refs[11], refs[15:]  # [1, K, padded]; see `longflow`
    refs = _Refs(*refs[:11], *refs[12:15])
    k, t = pl.program_id(1), pl.program_id(2)
    _attend_block(target_ref, position_ref, refs, scores, plan)

    @pl.when(t == plan.steps - 1)
    def _():
        def write(step, _):
            here = _lanes(step, plan)
            importance_ref[0, pl.ds(k, 1), here] = _importance(refs, scores, here)
            return 0

        jax.lax.fori_loop(0, plan.steps, write, 0)


def longflow(target_ref, position_ref, oldest_ref, newest_ref, *refs, plan):
    """Kernel that attends, scores, and chooses the victim."""
    # The next target is the last output, before the scratch memory that all have.
    refs = _with_sink(refs, plan)
    chosen_ref, scratch = refs[11], refs[15:]
    logits_ref, norms_ref, importance_ref, barred_ref = scratch
    refs = _Refs(*refs[:11], *refs[12:15])
    b, k, t = (pl.program_id(axis) for axis in range(3))
    _attend_block(target_ref, position_ref, refs, (logits_ref, norms_ref), plan)

    @pl.when(t == plan.steps - 1)
    def _():
        first = k == 0 if plan.shared else True

        def add(step, _):
            here = _lanes(step, plan)
            share = _importance(refs, (logits_ref, norms_ref), here)
            held = refs.new_positions[0, pl.ds(k, 1), here]
            outside = (held < oldest_ref[b]) | (held > newest_ref[b])
            barred = jnp.where((held >= 0) & outside, 1.0, 0.0)
            importance_ref[:, here] = share + jnp.where(
                first, 0.0, importance_ref[:, here]
            )
            barred_ref[:, here] = barred + jnp.where(first, 0.0, barred_ref[:, here])
            return 0

        jax.lax.fori_loop(0, plan.steps, add, 0)
        live = position_ref[b] >= 0
        # A finished row keeps its target; a shared victim comes with the last head.
        chosen_ref[0, pl.ds(k, 1), :] = jnp.full(
            (1, LANES), target_ref[b, k], jnp.int32
        )

        @pl.when(live & ((k == plan.kv_heads - 1) if plan.shared else True))
        def _():
            who = slice(None) if plan.shared else pl.ds(k, 1)
            victim = _victim(refs.new_positions, who, importance_ref, barred_ref, plan)
            if plan.shared:
                chosen_ref[0] = jnp.broadcast_to(victim, (plan.kv_heads, LANES))
            else:
                chosen_ref[0, pl.ds(k, 1), :] = jnp.broadcast_to(victim, (1, LANES))


def _with_sink(refs, plan):
    """Return the references with the sink's in front, or None for it."""
    return refs if plan.sink else (None, *refs)


def _importance(refs: _Refs, scores, here):
    """Return the importance `[1, block]` of one head's slots, once it has attended."""
    logits_ref, norms_ref = scores
    maximum, total = refs.maximum[:, :1], jnp.maximum(refs.total[:, :1], 1e-30)
    weights = jnp.exp(logits_ref[:, here] - maximum) / total
    return weights.sum(0, keepdims=True) * norms_ref[:, here]


def _attend_block(target_ref, position_ref, refs: _Refs, scores, plan):
    """Write the token and take one block of slots into the softmax of one head."""
    b, k, t = (pl.program_id(axis) for axis in range(3))
    position = position_ref[b]
    live = position >= 0
    clamped = clamp(target_ref[b, k], plan)
    target = jnp.where(live, clamped, -1)  # a finished row has no target
    query, new_key = refs.query[0, 0], refs.key[0, 0]
    new_value = refs.value[0, 0].astype(jnp.float32)
    new_logit = plan.scale * jnp.sum(
        query.astype(jnp.float32) * new_key.astype(jnp.float32), 1, keepdims=True
    )
    new_logit = capped(new_logit, plan.cap)

    @pl.when(t == 0)
    def _():
        refs.maximum[...] = jnp.broadcast_to(
            jnp.where(live, new_logit, _LOWEST), refs.maximum.shape
        )
        refs.total[...] = jnp.full(
            refs.total.shape, jnp.where(live, 1.0, 0.0), jnp.float32
        )
        refs.acc[...] = jnp.broadcast_to(
            jnp.where(live, new_value, 0.0), refs.acc.shape
        )

    here = _lanes(t, plan)
    held_positions = refs.positions[0, pl.ds(k, 1), here]
    slot = t * plan.block + jax.lax.broadcasted_iota(jnp.int32, (1, plan.block), 1)
    is_target = slot == target
    occupied = (held_positions >= 0) & (slot < plan.slots)
    refs.new_positions[0, pl.ds(k, 1), here] = jnp.where(
        is_target, position, held_positions
    )

    dot = functools.partial(
        jax.lax.dot_general,
        precision=plan.precision,
        preferred_element_type=jnp.float32,
    )
    across_head = (((1,), (1,)), ((), ()))  # [rows, H] with [slots, H]
    keys = refs.keys[0, 0]
    logits = plan.scale * dot(query.astype(keys.dtype), keys, across_head)
    logits = capped(logits, plan.cap)
    logits = jnp.where(occupied & ~is_target, logits, -jnp.inf)  # [G, block]
    maximum = refs.maximum[:, :1]
    new_maximum = jnp.maximum(maximum, jnp.max(logits, 1, keepdims=True))
    weights = jnp.exp(logits - new_maximum)
    rescale = jnp.exp(maximum - new_maximum)
    total = refs.total[:, :1] * rescale + jnp.sum(weights, 1, keepdims=True)
    refs.maximum[...] = jnp.broadcast_to(new_maximum, refs.maximum.shape)
    refs.total[...] = jnp.broadcast_to(total, refs.total.shape)
    weights = weights.astype(plan.dtype)
    num_occupied = jnp.sum(jnp.where(occupied, 1.0, 0.0))
    full = num_occupied == plan.block

    @pl.when(full)
    def _():
        update = dot(weights, refs.values[0, 0], (((1,), (0,)), ((), ())))
        refs.acc[...] = refs.acc[...] * rescale + update

    @pl.when(jnp.logical_not(full))
    def _():
        # 0 x NaN is NaN, so a weight of zero does not keep a free slot out. The mask
        # lies along the lanes and has to be turned, which full blocks are spared.
        mask = jnp.where(occupied, 1.0, 0.0)
        mask = jnp.broadcast_to(mask, (plan.head_dim, plan.block)).T
        values = refs.values[0, 0].astype(jnp.float32)
        values = jnp.where(mask > 0, values, 0.0).astype(plan.dtype)
        update = dot(weights, values, (((1,), (0,)), ((), ())))
        refs.acc[...] = refs.acc[...] * rescale + update

    if scores is not None:
        logits_ref, norms_ref = scores
        logits_ref[:, here] = jnp.where(is_target, new_logit, logits)
        norms = _norms(refs.values[0, 0], plan)
        new_norm = _norms_of_rows(new_value, plan)
        norms = jnp.where(occupied, norms, 0.0)
        norms_ref[:, here] = jnp.where(is_target, new_norm, norms)

    @pl.when(t == divide(clamped, plan.block))
    def _():
        start = divide(clamped, plan.tile) * plan.tile
        rows = pl.ds(pl.multiple_of(start - t * plan.block, plan.tile), plan.tile)
        shape = (plan.tile, plan.head_dim)
        replaced = start + jax.lax.broadcasted_iota(jnp.int32, shape, 0) == target
        for source, new, written in (
            (refs.keys, new_key.astype(jnp.float32), refs.new_keys),
            (refs.values, new_value, refs.new_values),
        ):
            old = source[0, 0, rows, :].astype(jnp.float32)
            written[0, 0] = jnp.where(replaced, new, old).astype(plan.dtype)

    @pl.when(t == plan.steps - 1)
    def _():
        if plan.sink:
            maximum, sink = refs.maximum[...], refs.sink[0]
            top = jnp.maximum(maximum, sink)
            rescale = jnp.exp(maximum - top)
            refs.maximum[...] = top
            refs.total[...] = refs.total[...] * rescale + jnp.exp(sink - top)
            refs.acc[...] = refs.acc[...] * rescale[:, :1]
        out = refs.acc[...] / jnp.maximum(refs.total[:, :1], 1e-30)
        refs.out[0, 0] = out.astype(refs.out.dtype)


def _norms(values, plan):
    """Return the norms `[1, block]` of the rows of `values` `[block, H]`.

    A product with ones sums along the head and lays the sums out along the lanes, which
    a reduction would not do.
    """
    if plan.score == "attention":
        return jnp.ones((1, plan.block), jnp.float32)
    if plan.score == "l1":
        terms, precision = jnp.abs(values), plan.precision
    else:
        terms, precision = jnp.square(values.astype(jnp.float32)), "highest"
    sums = jax.lax.dot_general(
        jnp.ones((8, plan.head_dim), terms.dtype),
        terms,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )[:1]
    return sums if plan.score == "l1" else jnp.sqrt(sums)


def _norms_of_rows(values, plan):
    """Return the norms `[rows, 1]` of float32 `values` `[rows, H]`."""
    match plan.score:
        case "l1":
            return jnp.sum(jnp.abs(values), 1, keepdims=True)
        case "l2":
            return jnp.sqrt(jnp.sum(jnp.square(values), 1, keepdims=True))
    return jnp.ones((values.shape[0], 1), jnp.float32)


def _victim(positions_ref, heads, importance_ref, barred_ref, plan):
    """Return the slot that the next token overwrites, int32 `[1, 1]`.

    Args:
      positions_ref: `[1, K, padded]`, the new token's included.
      heads: that give up the slot; it is free if it is in all of them.
      importance_ref: `[1, padded]`, their sum.
      barred_ref: `[1, padded]`, zero where none of them keeps its token.
      plan: static.
    """
    shape = (1, plan.block)
    nothing = (
        jnp.full(shape, jnp.inf, jnp.float32),
        jnp.full(shape, _NO_SLOT, jnp.float32),
    )

    def lower(best, values, slot):
        smaller = values < best[0]  # strict, so that of equals the lowest slot stays
        return tuple(
            jnp.where(smaller, n, o) for n, o in zip((values, slot), best, strict=True)
        )

    def look(step, best):
        here = _lanes(step, plan)
        slot = step * plan.block + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        real = slot < plan.slots
        newest = jnp.max(positions_ref[0, heads, here], 0, keepdims=True)
        free = real & (newest < 0)
        evictable = real & (barred_ref[:, here] == 0)
        importance = importance_ref[:, here]
        slot = slot.astype(jnp.float32)
        return tuple(
            lower(old, jnp.where(mask, values, jnp.inf), slot)
            for old, mask, values in zip(
                best,
                (free, evictable, real),
                (slot, importance, importance),
                strict=True,
            )
        )

    best = jax.lax.fori_loop(0, plan.steps, look, (nothing,) * 3)

    def lowest(values, slot):
        least = jnp.min(values, 1, keepdims=True)
        found = jnp.min(jnp.where(values == least, slot, _NO_SLOT), 1, keepdims=True)
        return least, found

    *better, last = best
    _, victim = lowest(*last)
    for values, slot in reversed(better):
        least, found = lowest(values, slot)
        victim = jnp.where(least < jnp.inf, found, victim)
    return victim.astype(jnp.int32)


def _lanes(step, plan):
    """Return the lanes of a block of slots."""
    return pl.ds(pl.multiple_of(step * plan.block, plan.block), plan.block)


def clamp(slot, plan):
    """Return a slot that exists; the target of a finished row may be any number."""
    return jnp.clip(slot, 0, plan.slots - 1)


def divide(slot, size: int):
    """Divide without the corrections of `//` for negative numbers."""
    return jax.lax.div(slot, jnp.int32(size))
