"""The writing of a path of accepted tokens into the cache, in one go.

Axis letters: `B` batch, `T` nodes, `K` key/value heads, `S` slots, `H` head size, `D`
depth of the deepest node.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxkv.kernels import dispatch, tree_attention
from jaxkv.kernels.cache import Nodes, Slots, Token, write
from jaxkv.kernels.per_shard import per_shard
from jaxkv.kernels.shapes import checked
from jaxkv.kernels.tree_attention import Implementation
from jaxkv.kernels.tree_triton import write_path_triton


@checked
def write_path(
    nodes: Nodes,
    slots: Slots,
    path: Int32[Array, "B L"],
    upcoming: Int32[Array, "B K L+1"],
    count: Int32[Array, " B"],
    *,
    implementation: Implementation | None = None,
) -> Slots:
    """Write the first nodes of a path as if one token were written after the other.

    Args:
      nodes: of the tree that has the path.
      slots: of the cache.
      path: `L = D + 1` nodes from the root on.
      upcoming: the slot of each node of the path, and of a token behind it. Where a
        path comes back to a slot, the last write stays; a slot beyond the last one is
        not written.
      count: how many of the nodes to write; 0 leaves a row as it is.
      implementation: "reference" (one token after the other), "xla", "triton" (NVIDIA),
        or None for the best one that can run.

    Returns:
      The slots, their norms as they were; `target` is `upcoming[count]`, or as it was
      where nothing is written.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    if implementation is None:
        implementation = tree_attention.choose(jax.default_backend())
    run = dispatch.resolve("write_path", implementation, _RUNS)
    return per_shard(run, write_path)(nodes, slots, path, upcoming, count)


def _reference(nodes, slots, path, upcoming, count):
    """Do plain decoding's write for each node in turn."""
    take = functools.partial(jnp.take_along_axis, axis=1)
    for step in range(path.shape[1]):
        at = path[:, step, None, None, None]
        writes = step < count
        token = Token(
            take(nodes.key, at)[:, 0],
            take(nodes.value, at)[:, 0],
            jnp.where(writes, nodes.position + step, -1),
        )
        target = jnp.where(writes[:, None], upcoming[:, :, step + 1], slots.target)
        slots = write(token, slots._replace(target=upcoming[:, :, step]))
        slots = slots._replace(target=target)
    return slots


def _xla(nodes, slots, path, upcoming, count):
    """Scatter what no later step of the path overwrites."""
    keys, values, positions, target, _ = slots
    batch, kv_heads, num_slots = positions.shape
    slot = upcoming[..., :-1]
    steps = jnp.arange(path.shape[1], dtype=jnp.int32)[None, None]
    place = last_writes(slot, count, num_slots)
    flags = dict(mode="drop", unique_indices=True)

    def along(x):
        chosen = jnp.take_along_axis(x, path[:, :, None, None], axis=1)
        return chosen.swapaxes(1, 2)  # [B, K, L, H]

    new_positions = jnp.broadcast_to(nodes.position[:, None, None] + steps, slot.shape)
    last = jnp.broadcast_to(count[:, None, None], (batch, kv_heads, 1))
    new_target = jnp.take_along_axis(upcoming, last, axis=2)[..., 0]
    return slots._replace(
        keys=keys.at[place].set(along(nodes.key).astype(keys.dtype), **flags),
        values=values.at[place].set(along(nodes.value).astype(values.dtype), **flags),
        positions=positions.at[place].set(new_positions, **flags),
        target=jnp.where(count[:, None] > 0, new_target, target),
    )


_RUNS = {"reference": _reference, "xla": _xla, "triton": write_path_triton}


def last_writes(slot: jax.Array, count: jax.Array, slots: int):
    """Return where a scatter puts what a path brings, all places different.

    A path may come back to a slot of its own; then only the last write counts, because
    a scatter that hits a place twice has no order. The others get slots beyond the end,
    for the scatter to drop.

    Args:
      slot: int32 `[B, K, D + 1]`, of each node of the path.
      count: int32 `[B]`, how many of them are written.
      slots: `S`, static.

    Returns:
      Indices of the axes `B`, `K` and `S`, which broadcast to `slot`.
    """
    batch, kv_heads, length = slot.shape
    steps = jnp.arange(length, dtype=jnp.int32)
    written = (steps[None] < count[:, None])[:, None]
    same = slot[..., :, None] == slot[..., None, :]
    later = (steps[None, :] > steps[:, None])[None, None]
    again = (same & later & written[..., None, :]).any(-1)
    b = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    k = jnp.arange(kv_heads, dtype=jnp.int32)[None, :, None]
    return b, k, jnp.where(written & ~again, slot, slots + steps)
