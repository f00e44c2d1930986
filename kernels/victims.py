"""Which slots are given up: free ones first, then the least important evictable one.

Axis letters: `B` batch, `K` key/value heads, `S` slots.

A slot is *free* where it holds no token. It is *evictable* while its token's position
`p` satisfies `oldest <= p <= newest`. With `shared`, the heads of a layer give up one
slot together: it is free if it is free in every head, and evictable if the token of
every head that holds one there is. (Prefill leaves the same slots free in every head,
so that they coincide; if ever they do not, no token is overwritten unweighed.) Where
the heads of a row lie on several devices, each tells the others in four bytes a slot
what its heads think of it, and all choose alike.
"""

import jax
import jax.numpy as jnp


def classes(
    positions: jax.Array, oldest: jax.Array, newest: jax.Array, *, shared: bool
) -> tuple[jax.Array, jax.Array]:
    """Return which slots are free and which are evictable.

    Args:
      positions: int32 `[B, K, S]`, negative where a slot is free.
      oldest: int32 `[B]`, least position that may be evicted.
      newest: int32 `[B]`, greatest position that may be evicted.
      shared: one answer for all heads.

    Returns:
      Two bool arrays `[B, K, S]`, or `[B, 1, S]` if shared; no slot is in both.
    """
    free = positions < 0
    inside = (positions >= oldest[:, None, None]) & (positions <= newest[:, None, None])
    if not shared:
        return free, inside
    free_everywhere = free.all(axis=1, keepdims=True)
    return free_everywhere, (free | inside).all(axis=1, keepdims=True) & (
        ~free_everywhere
    )


def choose_victim(
    importance: jax.Array,
    positions: jax.Array,
    oldest: jax.Array,
    newest: jax.Array,
    *,
    shared: bool,
    axis: str | None = None,
) -> jax.Array:
    """Return the slot that the next token overwrites.

    Args:
      importance: float32 `[B, K, S]`, finite; what free slots hold does not matter.
      positions: int32 `[B, K, S]`.
      oldest: int32 `[B]`.
      newest: int32 `[B]`.
      shared: average the importance over the heads and give up one slot for all.
      axis: of the mesh that the heads are spread over, inside a `shard_map`; None where
        these are all heads.

    Returns:
      int32 `[B, K]`: the lowest free slot; else the evictable slot of least
      importance; else, where nothing is evictable, the slot of least importance. Ties
      go to the lowest slot.
    """
    shape = positions.shape[:2]
    free, evictable = classes(positions, oldest, newest, shared=shared)
    if shared:
        importance = _mean_over_heads(importance, positions)
    if shared and axis is not None:
        mine = told(importance, free, evictable)
        importance, free, evictable = heard(
            jax.lax.all_gather(mine, axis, axis=1, tiled=True)
        )
    candidate = evictable | ~evictable.any(-1, keepdims=True)
    order = jnp.where(candidate, importance, jnp.inf)
    order = jnp.where(free, -jnp.inf, order)
    slot = jnp.argmin(order, axis=-1).astype(jnp.int32)
    return jnp.broadcast_to(slot[:, :1] if shared else slot, shape)


def told(importance: jax.Array, free: jax.Array, evictable: jax.Array) -> jax.Array:
    """Return in one float32 a slot what devices tell each other of it.

    Args:
      importance: float32, not negative; what free slots hold does not matter.
      free: bool, likewise shaped.
      evictable: bool.

    Returns:
      The importance: negative, -0.0 too, where a slot is protected, infinite where it
      is free.
    """
    bits = jax.lax.bitcast_convert_type(importance, jnp.int32)
    bits = jnp.where(evictable, bits, bits | jnp.iinfo(jnp.int32).min)  # the sign
    return jnp.where(free, jnp.inf, jax.lax.bitcast_convert_type(bits, jnp.float32))


def heard(told: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return what several, who have `told` `[B, D, S]`, hold together of each slot.

    Returns:
      The mean importance, and whether a slot is free and evictable, all `[B, 1, S]`.
    """
    absent = told == jnp.inf
    importance = jnp.where(absent, 0, jnp.abs(told)).mean(axis=1, keepdims=True)
    free = absent.all(axis=1, keepdims=True)
    barred = (~absent & jnp.signbit(told)).any(axis=1, keepdims=True)
    return importance, free, ~barred & ~free


def all_heads(
    importance: jax.Array, positions: jax.Array, axis: str | None
) -> tuple[jax.Array, jax.Array]:
    """Return what all devices know of the heads of their rows.

    Args:
      importance: float32 `[B, K, S]`, of the heads on this device.
      positions: int32 `[B, K, S]`.
      axis: of the mesh that the heads are spread over; None leaves all as it is.

    Returns:
      Both for all heads, in their order, so that every device computes to the last bit
      what one alone would. It costs one exchange of 8 bytes per slot and head.
    """
    if axis is None:
        return importance, positions
    bits = jax.lax.bitcast_convert_type(importance, jnp.int32)
    both = jnp.stack([bits, positions])
    bits, positions = jax.lax.all_gather(both, axis, axis=2, tiled=True)
    return jax.lax.bitcast_convert_type(bits, jnp.float32), positions


def free_least(
    importance: jax.Array,
    positions: jax.Array,
    oldest: jax.Array,
    newest: jax.Array,
    *,
    count: int,
    shared: bool,
) -> jax.Array:
    """Free the `count` least important slots of those heads that have none free.

    Args:
      importance: float32 `[B, K, S]`, finite.
      positions: int32 `[B, K, S]`.
      oldest: int32 `[B]`.
      newest: int32 `[B]`.
      count: slots to free at once. Where fewer are evictable, the least important of
        the others make up for them.
      shared: average the importance over the heads and free the same slots in all.

    Returns:
      int32 `[B, K, S]`, the positions that stay. Ties go to the lowest slot.
    """
    free, evictable = classes(positions, oldest, newest, shared=shared)
    if shared:
        importance = _mean_over_heads(importance, positions)
    least = jnp.lexsort((importance, ~evictable), axis=-1)[..., :count]
    least = least.astype(jnp.int32)
    slots = jnp.arange(positions.shape[2], dtype=jnp.int32)[None, None, None]
    chosen = (least[..., None] == slots).any(-2) & ~free.any(-1, keepdims=True)
    return jnp.where(chosen, -1, positions)


def next_free(positions: jax.Array, *, shared: bool) -> jax.Array:
    """Return the lowest free slot, int32 `[B, K]`; 0 where none is.

    Args:
      positions: int32 `[B, K, S]`.
      shared: take the lowest that is free in every head.
    """
    free = positions < 0
    if shared:
        free = free.all(axis=1, keepdims=True)
    slot = jnp.argmax(free, axis=-1).astype(jnp.int32)
    return jnp.broadcast_to(slot, positions.shape[:2])


def _mean_over_heads(importance, positions):
    """Average `[B, K, S]` to `[B, 1, S]`; a head without a token there adds nothing."""
    return jnp.where(positions >= 0, importance, 0).mean(axis=1, keepdims=True)
