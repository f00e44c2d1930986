"""The writing of a path of accepted tokens into the cache, in one go.

Axis letters: `B` batch, `T` nodes, `K` key/value heads, `S` slots, `H` head size, `D`
depth of the deepest node.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxkv.kernels import dispatch, tree_attention
from jaxkv.kernels.cache import write
from jaxkv.kernels.per_shard import per_shard
from jaxkv.kernels.shapes import check_shape
from jaxkv.kernels.tree_attention import Implementation
from jaxkv.kernels.tree_triton import write_path_triton

_INPUTS = (
    *("B T K H", "B T K H", "B K S H", "B K S H", "B K S", "B K"),
    *("B K D+2", "B D+1", "B", "B"),
)


class Written(NamedTuple):
    """A cache with a path in it.

    Attributes:
      keys: `[B, K, S, H]`.
      values: `[B, K, S, H]`.
      positions: int32 `[B, K, S]`.
      target: int32 `[B, K]`, the slot that the next token overwrites.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    target: jax.Array


def write_path(
    key: jax.Array,
    value: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    target: jax.Array,
    upcoming: jax.Array,
    path: jax.Array,
    count: jax.Array,
    position: jax.Array,
    *,
    implementation: Implementation | None = None,
) -> Written:
    """Write the first nodes of a path as if one token were written after the other.

    Args:
      key: `[B, T, K, H]` of the nodes, rotated.
      value: `[B, T, K, H]` of the nodes.
      keys: `[B, K, S, H]`.
      values: `[B, K, S, H]`.
      positions: int32 `[B, K, S]`.
      target: int32 `[B, K]`.
      upcoming: int32 `[B, K, D + 2]`, the slot of each node of the path, and of a token
        behind it. Where a path comes back to a slot, the last write stays; a slot
        beyond the last one is not written.
      path: int32 `[B, D + 1]`, nodes from the root on.
      count: int32 `[B]`, how many of them to write; 0 leaves a row as it is.
      position: int32 `[B]`, of the root.
      implementation: "reference" (one token after the other), "xla", "triton" (NVIDIA),
        or None for the best one that can run.

    Returns:
      The cache; `target` is `upcoming[count]`, or as it was where nothing is written.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    where = "write_path"
    arguments = (
        *(key, value, keys, values, positions, target),
        *(upcoming, path, count, position),
    )
    names = ("key", "value", "keys", "values", "positions", "target")
    names += ("upcoming", "path", "count", "position")
    sizes = check_shape(
        where, **dict(zip(names, zip(arguments, _INPUTS, strict=True), strict=True))
    )
    if sizes["D+2"] != sizes["D+1"] + 1:
        raise ValueError(
            f"{where}: upcoming has {sizes['D+2']} slots, but a path of "
            f"{sizes['D+1']} nodes needs one more than nodes."
        )
    if implementation is None:
        implementation = tree_attention.choose(jax.default_backend())
    run = dispatch.resolve(where, implementation, _RUNS)
    run = per_shard(run, _INPUTS, _INPUTS[2:6])
    return Written(*run(*arguments))


def _reference(
    key, value, keys, values, positions, target, upcoming, path, count, position
):
    """Do plain decoding's write for each node in turn."""
    cache = (keys, values, positions)
    take = functools.partial(jnp.take_along_axis, axis=1)
    for step in range(path.shape[1]):
        at = path[:, step, None, None, None]
        cache = write(
            *(take(key, at)[:, 0], take(value, at)[:, 0]),
            *cache,
            upcoming[:, :, step],
            jnp.where(step < count, position + step, -1),
        )
        target = jnp.where((step < count)[:, None], upcoming[:, :, step + 1], target)
    return Written(*cache, target)


def _xla(key, value, keys, values, positions, target, upcoming, path, count, position):
    """Scatter what no later step of the path overwrites."""
    batch, kv_heads, slots, _ = keys.shape
    slot = upcoming[..., :-1]
    steps = jnp.arange(path.shape[1], dtype=jnp.int32)
    place = last_writes(slot, count, slots)
    flags = dict(mode="drop", unique_indices=True)

    def along(x):
        chosen = jnp.take_along_axis(x, path[:, :, None, None], axis=1)
        return chosen.swapaxes(1, 2)  # [B, K, D + 1, H]

    new_positions = jnp.broadcast_to(position[:, None, None] + steps, slot.shape)
    last = jnp.broadcast_to(count[:, None, None], (batch, kv_heads, 1))
    new_target = jnp.take_along_axis(upcoming, last, axis=2)[..., 0]
    return Written(
        keys.at[place].set(along(key).astype(keys.dtype), **flags),
        values.at[place].set(along(value).astype(values.dtype), **flags),
        positions.at[place].set(new_positions, **flags),
        jnp.where(count[:, None] > 0, new_target, target),
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
    written = (steps < count[:, None])[:, None]
    same = slot[..., :, None] == slot[..., None, :]
    later = steps[None, :] > steps[:, None]
    again = (same & later & written[..., None, :]).any(-1)
    b = jnp.arange(batch)[:, None, None]
    k = jnp.arange(kv_heads)[None, :, None]
    return b, k, jnp.where(written & ~again, slot, slots + steps)
