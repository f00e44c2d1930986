"""The Pallas kernel of `longflow_tree_tpu`: what happens in one step of its grid.

Axis letters and references are those of `longflow_walk_tpu_body`, which does what comes
between the last key and the first value.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxkv.kernels.longflow_walk_tpu_body import LANES, Refs, divide, lanes, walk
from jaxkv.kernels.weighing import capped

_NEVER = jnp.iinfo(jnp.int32).max  # above every position


def longflow_tree(*refs, plan):
    """Leave all logits in VMEM, walk the tree on them, then multiply with the values.

    The second axis of the grid is 0 while keys pass and 1 while values do.
    """
    refs = refs if plan.sink else (*refs[:3], None, *refs[3:])
    refs = Refs(*refs)
    row, pass_, k, step = (pl.program_id(axis) for axis in range(4))
    last = step == plan.steps - 1
    live = refs.position[divide(row, plan.per)] >= 0

    @pl.when(live & (pass_ == 0))
    def _():
        _take_logits(refs, row, k, step, plan)

    @pl.when(live & (pass_ == 0) & (k == plan.kv_heads - 1) & last)
    def _():
        walk(refs, row, plan)

    @pl.when(live & (pass_ == 1))
    def _():
        _weigh(refs, row, k, step, plan)

    @pl.when(jnp.logical_not(live) & (pass_ == 1) & last)
    def _():
        refs.out[...] = jnp.zeros(refs.out.shape, refs.out.dtype)

        def forget(node, _):
            refs.written[0, 0, node] = jnp.int32(0)
            refs.targets[0, 0, node] = jnp.int32(0)
            return 0

        jax.lax.fori_loop(0, plan.nodes, forget, 0)


def _take_logits(refs: Refs, row, k, step, plan):
    """Write the root, and keep the logits of one block of slots of one head."""
    here = lanes(step, plan.block)
    root = clamp(refs.target[row, k], plan)
    held = refs.positions[0, pl.ds(k, 1), here]
    slot = step * plan.block + jax.lax.broadcasted_iota(jnp.int32, held.shape, 1)
    is_root, is_slot = slot == root, slot < plan.slots
    occupied = is_slot & (held >= 0)

    def by_node(x):  # [T G, ...] to [T, G, ...]
        return x.reshape(plan.nodes, plan.group, x.shape[1])

    query = refs.query[0, 0]
    fresh = _logits(query, refs.node_keys[0, 0], plan)
    logits = _logits(query, refs.keys[0, 0], plan)
    logits = jnp.where(occupied, logits, -jnp.inf)
    logits = jnp.where(is_root, fresh[:, :1], logits)
    logits = by_node(logits)
    fresh_norms = refs.node_norms[0, pl.ds(k, 1), :]
    norms = jnp.where(occupied, refs.norms[0, pl.ds(k, 1), here], 0.0)
    norms = jnp.where(is_root, fresh_norms[:, :1], norms)
    norms = jnp.broadcast_to(norms, (plan.group, plan.block))

    @_for_heads_of(k, plan)
    def _(mine):
        refs.weights[:, mine, here] = logits
        refs.head_norms[mine, here] = norms

    position = refs.position[divide(row, plan.per)]
    held = jnp.where(is_root, position, jnp.where(is_slot, held, -1))
    first = k == 0
    above = jnp.where(first, -1, refs.newest[:, here])
    below = jnp.where(first, _NEVER, refs.oldest_held[:, here])
    refs.newest[:, here] = jnp.maximum(above, held)
    refs.oldest_held[:, here] = jnp.minimum(below, jnp.where(held < 0, _NEVER, held))

    @pl.when(step == 0)
    def _():
        of_nodes = by_node(fresh)
        norms = jnp.broadcast_to(fresh_norms, (plan.group, plan.nodes))
        roots = jnp.full((plan.group, LANES), root, jnp.int32)

        @_for_heads_of(k, plan)
        def _(mine):
            refs.fresh[:, mine, :] = of_nodes
            refs.fresh_norms[mine, :] = norms
            refs.root[mine, :] = roots


def _weigh(refs: Refs, row, k, step, plan):
    """Add one block of values of one head to the output of all nodes."""
    here = lanes(step, plan.block)
    held = refs.positions[0, pl.ds(k, 1), here]
    slot = step * plan.block + jax.lax.broadcasted_iota(jnp.int32, held.shape, 1)
    occupied = (slot < plan.slots) & (held >= 0)

    @pl.when(step == 0)
    def _():
        @_for_heads_of(k, plan)
        def _(mine):
            fresh = refs.fresh[:, mine, :].reshape(-1, plan.nodes)
            refs.acc[...] = _combine(fresh, refs.node_values[0, 0], plan)

    @_for_heads_of(k, plan)
    def _(mine):
        refs.of_head[...] = refs.weights[:, mine, here].reshape(-1, plan.block)

    weights = refs.of_head[...]
    # The root's weight is among those of the nodes.
    weights = jnp.where(slot == clamp(refs.target[row, k], plan), 0.0, weights)
    full = jnp.sum(jnp.where(occupied, 1.0, 0.0)) == plan.block

    @pl.when(full)
    def _():
        refs.acc[...] += _combine(weights, refs.values[0, 0], plan)

    @pl.when(jnp.logical_not(full))
    def _():
        # See `attend_tpu_body`: 0 x NaN is NaN.
        mask = jnp.where(occupied, 1.0, 0.0)
        mask = jnp.broadcast_to(mask, (plan.head_dim, plan.block)).T
        values = refs.values[0, 0].astype(jnp.float32)
        values = jnp.where(mask > 0, values, 0.0).astype(plan.dtype)
        refs.acc[...] += _combine(weights, values, plan)

    @pl.when(step == plan.steps - 1)
    def _():
        refs.out[0, 0] = refs.acc[...].astype(refs.out.dtype)


def _logits(query, keys, plan):
    """Return the logits of queries `[M, H]` against keys `[L, H]`, float32 `[M, L]`."""
    logits = jax.lax.dot_general(
        *(query, keys, (((1,), (1,)), ((), ()))),
        precision=plan.precision,
        preferred_element_type=jnp.float32,
    )
    return capped(plan.scale * logits, plan.cap)


def _combine(weights, values, plan):
    """Multiply weights `[M, L]` with values `[L, H]`, float32 `[M, H]`."""
    return jax.lax.dot_general(
        *(weights.astype(values.dtype), values, (((1,), (0,)), ((), ()))),
        precision=plan.precision,
        preferred_element_type=jnp.float32,
    )


def _for_heads_of(k, plan):
    """Return a decorator that calls with the query heads that read head `k`.

    They are no multiple of a tile, so where they begin has to be known to the compiler.
    """

    def decorate(function):
        for head in range(plan.kv_heads):
            mine = pl.ds(head * plan.group, plan.group)
            pl.when(k == head)(functools.partial(function, mine))

    return decorate


def clamp(slot, plan):
    """Return a slot that exists."""
    return jnp.clip(slot, 0, plan.slots - 1)
