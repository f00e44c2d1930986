"""How the kernel of `longflow_tree_tpu` walks a tree: weights and victims of its nodes.

All logits lie in VMEM. The root stands in every path, so its logits, norm and position
have taken the place of what its slot held. What the nodes below it overwrite is another
slot on every path: there it is struck out for one node, whose ancestors' weights stand
beside those of the slots.

`N` are here the query heads of a row and `K` its key/value heads: all of them, or one
group and its head where each has a victim of its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES = 128
_NO_SLOT = float(1 << 24)  # slots are counted in float32, exact below this


class Refs(NamedTuple):
    """The references in the order that Pallas passes them in."""

    target: Any  # [R, K] of the root
    position: Any  # [B] of the root
    oldest: Any  # [B]
    sink: Any  # [1, N, 128], equal lanes; None where the plan has no sink
    parents: Any  # [1, 1, T]
    depths: Any  # [1, 1, T]
    query: Any  # [1, 1, T G, H]
    node_keys: Any  # [1, 1, T, H]
    node_values: Any  # [1, 1, T, H]
    node_norms: Any  # [1, K, T]
    keys: Any  # [1, 1, block, H]
    values: Any  # [1, 1, block, H]
    positions: Any  # [1, K, padded]
    norms: Any  # [1, K, padded]
    out: Any  # [1, 1, T G, H]
    written: Any  # [1, 1, T]; the slot of each node, of the root one for any head
    targets: Any  # [1, 1, T]
    path: Any  # [T], the ancestors of one node by depth
    weights: Any  # [T, N, padded], first logits, of the cache that the root leaves
    fresh: Any  # [T, N, T], likewise, against the nodes
    head_norms: Any  # [N, padded], of the cache that the root leaves
    fresh_norms: Any  # [N, T]
    root: Any  # [N, 128], the slot of the root, equal lanes
    newest: Any  # [1, padded], the greatest position in any head; -1 is free
    oldest_held: Any  # [1, padded], the least
    struck: Any  # [1, padded], 1 where the path of one node has overwritten a slot
    of_head: Any  # [T G, block], weights of one head
    acc: Any  # [T G, H]


def walk(refs: Refs, row, plan):
    """Go from node to node, parents first: weights, and the slot of the next token."""
    refs.struck[...] = jnp.zeros(refs.struck.shape, jnp.float32)
    node = jax.lax.broadcasted_iota(jnp.int32, (1, plan.nodes), 1)

    def visit(t, taken):
        parent = refs.parents[0, 0, t]
        # The root may have a slot for each head, and nobody asks for this one.
        slot = jnp.where(t == 0, 0, refs.targets[0, 0, parent])
        refs.written[0, 0, t] = slot
        taken = jnp.where(node == t, slot, taken)
        order, root_alive = _strike_path(refs, t, taken, node, plan)
        weights = _softmax(refs, t, order, root_alive, node, plan)
        refs.targets[0, 0, t] = _victim(refs, row, t, order, taken, weights, plan)
        _forget_path(refs, t, plan)
        return taken

    jax.lax.fori_loop(0, plan.nodes, visit, jnp.full(node.shape, -1, jnp.int32))


def _strike_path(refs: Refs, t, taken, node, plan):
    """Take from one node's softmax what its path has overwritten.

    Returns:
      The depth of those ancestors, itself included, that no later one has overwritten,
      and 0 for the root and all other nodes, int32 `[1, T]`; and 1 for the heads that
      still hold the root, float32 `[N, 128]`.
    """

    def climb(depth, above):
        refs.path[refs.depths[0, 0, t] - depth] = above
        return refs.parents[0, 0, above]

    jax.lax.fori_loop(0, refs.depths[0, 0, t], climb, t)

    def strike(depth, carry):
        order, root_alive = carry
        above = refs.path[depth]
        slot = refs.written[0, 0, above]
        here, is_slot = _tile_of(slot)
        refs.weights[t, :, here] = jnp.where(
            is_slot, -jnp.inf, refs.weights[t, :, here]
        )
        refs.struck[:, here] = jnp.where(is_slot, 1.0, refs.struck[:, here])
        order = jnp.where(taken == slot, 0, order)
        root_alive = jnp.where(refs.root[...] == slot, 0.0, root_alive)
        return jnp.where(node == above, depth, order), root_alive

    alive = jnp.ones(refs.root.shape, jnp.float32)
    nothing = jnp.zeros(node.shape, jnp.int32), alive
    return jax.lax.fori_loop(1, refs.depths[0, 0, t] + 1, strike, nothing)


def _forget_path(refs: Refs, t, plan):
    """Leave `struck` as it was."""

    def forget(depth, _):
        here, is_slot = _tile_of(refs.written[0, 0, refs.path[depth]])
        refs.struck[:, here] = jnp.where(is_slot, 0.0, refs.struck[:, here])
        return 0

    jax.lax.fori_loop(1, refs.depths[0, 0, t] + 1, forget, 0)


def _softmax(refs: Refs, t, order, root_alive, node, plan):
    """Turn one node's logits into exponentials, and those of the nodes into weights.

    Returns:
      What those of the slots have to be divided by, `[N, 1]`, and the weights of the
      nodes above, without the root, `[N, T]`.
    """
    fresh = refs.fresh[t]
    beside = jnp.where(order > 0, fresh, -jnp.inf)
    top = jnp.max(beside, 1, keepdims=True)
    if plan.sink:
        top = jnp.maximum(top, refs.sink[0, :, :1])

    def look(step, top):
        logits = refs.weights[t, :, lanes(step, plan.chunk)]
        return jnp.maximum(top, jnp.max(logits, 1, keepdims=True))

    top = jax.lax.fori_loop(0, plan.chunks, look, top)
    beside = jnp.exp(beside - top)
    total = jnp.sum(beside, 1, keepdims=True)
    if plan.sink:
        total += jnp.exp(refs.sink[0, :, :1] - top)

    def add(step, total):
        here = lanes(step, plan.chunk)
        powers = jnp.exp(refs.weights[t, :, here] - top)
        refs.weights[t, :, here] = powers
        return total + jnp.sum(powers, 1, keepdims=True)

    total = jax.lax.fori_loop(0, plan.chunks, add, total)
    root = (node == 0) & (root_alive[:, :1] > 0)
    root = jnp.exp(jnp.where(root, fresh, -jnp.inf) - top)
    refs.fresh[t] = (beside + root) / total
    return total, beside / total


def _victim(refs: Refs, row, t, order, taken, weights, plan):
    """Make weights of one node's exponentials, and return the slot that goes next."""
    total, beside = weights
    row = divide(row, plan.per)
    position, oldest = refs.position[row], refs.oldest[row]
    newest = position + refs.depths[0, 0, t] - plan.n_recent
    scale = 1 / total

    def look(step, best):
        here = lanes(step, plan.chunk)
        weights = refs.weights[t, :, here] * scale
        refs.weights[t, :, here] = weights
        importance = jnp.sum(weights * refs.head_norms[:, here], 0, keepdims=True)
        slot = jax.lax.broadcasted_iota(jnp.int32, importance.shape, 1)
        slot += step * plan.chunk
        real = (slot < plan.slots) & (refs.struck[:, here] == 0)
        held, first = refs.newest[:, here], refs.oldest_held[:, here]
        free = real & (held < 0)
        inside = real & (first >= oldest) & (held <= newest)
        slot = slot.astype(jnp.float32)
        kinds = (free, slot), (inside, importance), (real, importance)
        return tuple(
            _lower(old, jnp.where(mask, value, jnp.inf), slot)
            for old, (mask, value) in zip(best, kinds, strict=True)
        )

    shape = (1, plan.chunk)
    nothing = (
        jnp.full(shape, jnp.inf, jnp.float32),
        jnp.full(shape, _NO_SLOT, jnp.float32),
    )
    best = jax.lax.fori_loop(0, plan.chunks, look, (nothing,) * 3)
    free, inside, rest = (_lowest(*kind) for kind in best)
    # Slots that the nodes above have filled; what they held before does not count.
    importance = jnp.sum(beside * refs.fresh_norms[...], 0, keepdims=True)
    alive, held = order > 0, position + order
    allowed = alive & (held >= oldest) & (held <= newest)
    slot = taken.astype(jnp.float32)
    victim = _sooner(rest, _lowest(jnp.where(alive, importance, jnp.inf), slot))[1]
    above = _lowest(jnp.where(allowed, importance, jnp.inf), slot)
    for least, found in (_sooner(inside, above), free):
        victim = jnp.where(least < jnp.inf, found, victim)
    return jnp.min(victim).astype(jnp.int32)


def _lower(best, values, slot):
    """Return the lower values and their slots; of equals the first stays."""
    smaller = values < best[0]
    return jnp.where(smaller, values, best[0]), jnp.where(smaller, slot, best[1])


def _lowest(values, slot):
    """Return the least of the values `[1, L]`, and the lowest slot that has it."""
    least = jnp.min(values, 1, keepdims=True)
    found = jnp.min(jnp.where(values == least, slot, _NO_SLOT), 1, keepdims=True)
    return least, found


def _sooner(one, two):
    """Return the pair of less value, of equals that of the lower slot."""
    second = (two[0] < one[0]) | ((two[0] == one[0]) & (two[1] < one[1]))
    return jnp.where(second, two[0], one[0]), jnp.where(second, two[1], one[1])


def _tile_of(slot):
    """Return the lanes of the tile that a slot lies in, and where it is, `[1, 128]`."""
    start = divide(slot, LANES) * LANES
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
    return pl.ds(pl.multiple_of(start, LANES), LANES), lane == slot - start


def lanes(step, size: int):
    """Return the lanes of a block of slots."""
    return pl.ds(pl.multiple_of(step * size, size), size)


def divide(number, size: int):
    """Divide without the corrections of `//` for negative numbers."""
    return jax.lax.div(number, jnp.int32(size))
