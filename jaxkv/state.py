"""The fixed-size key/value cache of one attention layer, as an immutable value.

A cache is a tuple of `KVState`, one per layer: a tuple is updated in place under
donation, while a stacked array is copied by every scan over the layers.

Axis letters: `B` batch, `K` key/value heads, `S` slots, `H` head size, `P` prompt.
*Position* is where a token stands in its sequence; *slot* is where it lies here.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.kernels.cache import SharedSlots, Slots
from jaxkv.shown import brief

FREE = -1  # in `positions`: nothing lies in this slot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared:
    """What rows of one layer attend to beside their own slots; nobody writes to it.

    Attributes:
      slots: of the documents, each held once for all rows about it.
      most: rows that the document with the most of them has, or more. Static.
    """

    slots: SharedSlots
    most: int = dataclasses.field(metadata=dict(static=True))

    __repr__ = brief


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVState:
    """Slots of one attention layer; their number never changes.

    Invariants:
      * slot `s` of head `(b, k)` is occupied iff `positions[b, k, s] >= 0`, and then
        its position is unique among that head's slots;
      * keys are stored rotated for the position they were produced at, and never
        rotated again;
      * the order of slots has no meaning, and what lies in a free slot is unspecified
        (it may be NaN): nobody reads it.

    Attributes:
      keys: `[B, K, S, H]`.
      values: `[B, K, S, H]`.
      positions: int32 `[B, K, S]`, position of the token in each slot, `FREE` if none.
      target: int32 `[B, K]`, the slot that the next token overwrites. Choosing it is
        the one thing that a decode policy does.
      memory: what a decode policy remembers from step to step, a pytree of its own
        (see `DecodePolicy.begin`); empty for those that remember nothing.
      window: how many tokens the layer attends to, the newest among them; None is all.
        With a window the slots are a ring that holds exactly these tokens: as many
        slots, or as many as there will be tokens if they are fewer, and the oldest is
        overwritten, whatever budget and policies say. Static.
      shared: what every row attends to beside these slots; None is nothing.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    target: jax.Array
    memory: Any = ()
    window: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    shared: Shared | None = None

    __repr__ = brief

    @property
    def slots(self) -> int:
        """Number of slots `S` of each row alone."""
        return self.keys.shape[2]


Cache = tuple[KVState, ...]  # one state per layer


def init(
    *,
    batch: int,
    kv_heads: int,
    slots: int,
    head_dim: int,
    dtype: jax.typing.DTypeLike,
    window: int | None = None,
) -> KVState:
    """Return a state whose slots are all free; the first token goes to slot 0."""
    shape = (batch, kv_heads, slots, head_dim)
    return KVState(
        keys=jnp.zeros(shape, dtype),
        values=jnp.zeros(shape, dtype),
        positions=jnp.full(shape[:3], FREE, jnp.int32),
        target=jnp.zeros(shape[:2], jnp.int32),
        window=window,
    )


def occupied(state: KVState) -> jax.Array:
    """Return which slots hold a token, bool `[B, K, S]`."""
    return state.positions >= 0


def occupancy(state: KVState) -> jax.Array:
    """Return how many slots hold a token, shared ones included, int32 `[B, K]`."""
    own = occupied(state).sum(-1, dtype=jnp.int32)
    if state.shared is None:
        return own
    _, _, positions, owner = state.shared.slots
    return own + (positions >= 0).sum(-1, dtype=jnp.int32)[owner]


def to_slots(state: KVState, norms: jax.Array | None = None) -> Slots:
    """Return the cache as kernels take it, with norms if they are to score it."""
    return Slots(state.keys, state.values, state.positions, state.target, norms)


def from_slots(slots: Slots, state: KVState, memory: Any) -> KVState:
    """Return a state that holds what a kernel made of its slots, and this memory."""
    keys, values, positions, target, _ = slots
    return dataclasses.replace(
        state,
        keys=keys,
        values=values,
        positions=positions,
        target=target,
        memory=memory,
    )


def fill(
    state: KVState, keys: jax.Array, values: jax.Array, lengths: jax.Array
) -> KVState:
    """Put whole prompts into an empty state, token `p` into slot `p`.

    Args:
      state: empty, with room for the longest prompt; padding may exceed the slots.
      keys: `[B, P, K, H]`, right-padded.
      values: `[B, P, K, H]`.
      lengths: int32 `[B]`, prompt lengths; padding stays free.

    Returns:
      The state, with `target` at each row's first free slot.
    """
    keys, values = (x[:, : state.slots].swapaxes(1, 2) for x in (keys, values))
    batch, kv_heads, length, _ = keys.shape
    order = jnp.arange(length, dtype=jnp.int32)[None]
    positions = jnp.where(order < lengths[:, None], order, FREE)[:, None]
    positions = jnp.broadcast_to(positions, (batch, kv_heads, length))
    filled = _put(state, keys, values, positions)
    target = jnp.minimum(lengths, state.slots - 1)[:, None]
    return dataclasses.replace(
        filled, target=jnp.broadcast_to(target, state.target.shape).astype(jnp.int32)
    )


def gather(
    state: KVState, keys: jax.Array, values: jax.Array, positions: jax.Array
) -> KVState:
    """Copy the tokens that an eviction keeps into the first slots of an empty state.

    Args:
      state: empty, with at least `M` slots. It may hold several heads for each one of
        `keys`: one per query head, say.
      keys: `[B, P, K, H]` of the prompt, token `p` at position `p`.
      values: `[B, P, K, H]`.
      positions: int32 `[B, heads of the state, M]`, what to keep, all different for one
        head; `FREE` leaves a slot free.

    Returns:
      The state, with `target` at each head's first free slot.
    """
    batch, heads, _ = positions.shape
    # Straight from the layout of the projection, so that no whole prompt is transposed.
    where = (
        jnp.arange(batch, dtype=jnp.int32)[:, None, None],
        jnp.maximum(positions, 0),
        (jnp.arange(heads, dtype=jnp.int32) // (heads // keys.shape[2]))[:, None],
    )
    filled = _put(state, keys[where], values[where], positions)
    return dataclasses.replace(filled, target=first_free(filled))


def _put(state, keys, values, positions):
    """Overwrite the first slots; `target` stays as it is."""
    start = (0, 0, 0, 0)
    update = jax.lax.dynamic_update_slice
    return dataclasses.replace(
        state,
        keys=update(state.keys, keys.astype(state.keys.dtype), start),
        values=update(state.values, values.astype(state.values.dtype), start),
        positions=update(state.positions, positions, start[:3]),
    )


def grow(state: KVState, more: int) -> KVState:
    """Append free slots to a state whose decode policy keeps everything.

    Args:
      state: of one layer; with a window it has no more slots than that.
      more: slots.

    Returns:
      The state, with `target` at each head's first free slot.
    """

    if state.window is not None:
        more = max(min(more, state.window - state.slots), 0)

    def pad(x: jax.Array, value: int) -> jax.Array:
        width = [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (x.ndim - 3)
        return jnp.pad(x, width, constant_values=value)

    grown = dataclasses.replace(
        state,
        keys=pad(state.keys, 0),
        values=pad(state.values, 0),
        positions=pad(state.positions, FREE),
    )
    return dataclasses.replace(grown, target=first_free(grown))


def resize(state: KVState, slots: int) -> KVState:
    """Return a state of so many slots, which must hold all that it holds.

    Args:
      state: of one layer, filled from the first slot on, whose decode policy keeps
        everything.
      slots: more than it has, or fewer.

    Returns:
      The state, with `target` at each head's first free slot.
    """
    if slots >= state.slots:
        return grow(state, slots - state.slots)
    cut = dataclasses.replace(
        state,
        keys=state.keys[:, :, :slots],
        values=state.values[:, :, :slots],
        positions=state.positions[:, :, :slots],
    )
    return dataclasses.replace(cut, target=first_free(cut))


def share(state: KVState, owner: jax.Array, *, most: int) -> Shared:
    """Return a state's slots, as rows share them.

    Args:
      state: of one layer, a row per document.
      owner: int32 `[B]`, the document of each row.
      most: see `Shared`.
    """
    slots = SharedSlots(state.keys, state.values, state.positions, owner)
    return Shared(slots=slots, most=most)


def apart(cache: Cache) -> tuple[Cache, tuple[Shared | None, ...]]:
    """Return the states without what is shared, and what is shared of each layer."""
    own = tuple(dataclasses.replace(state, shared=None) for state in cache)
    return own, tuple(state.shared for state in cache)


def beside(cache: Cache, shared: Sequence[Shared | None]) -> Cache:
    """Return the states with what `apart` took of them."""
    both = zip(cache, shared, strict=True)
    return tuple(dataclasses.replace(state, shared=found) for state, found in both)


def own_all(state: KVState) -> KVState:
    """Return a state whose rows hold what they shared, in front of their other slots.

    Args:
      state: of one layer, whose decode policy keeps everything.

    Returns:
      The state, with `target` at each head's first free slot.
    """
    if state.shared is None:
        return state
    keys, values, positions, owner = state.shared.slots

    def behind(theirs: jax.Array, own: jax.Array) -> jax.Array:
        return jnp.concatenate([theirs[owner], own], axis=2)

    whole = dataclasses.replace(
        state,
        keys=behind(keys, state.keys),
        values=behind(values, state.values),
        positions=behind(positions, state.positions),
        shared=None,
    )
    return dataclasses.replace(whole, target=first_free(whole))


def pack(state: KVState) -> KVState:
    """Return a state with its tokens in the first slots, in order, and no memory."""
    last = jnp.iinfo(jnp.int32).max
    order = jnp.argsort(jnp.where(occupied(state), state.positions, last), axis=-1)
    packed = dataclasses.replace(
        state,
        keys=jnp.take_along_axis(state.keys, order[..., None], axis=2),
        values=jnp.take_along_axis(state.values, order[..., None], axis=2),
        positions=jnp.take_along_axis(state.positions, order, axis=2),
        memory=(),
    )
    return dataclasses.replace(packed, target=first_free(packed))


def first_free(state: KVState) -> jax.Array:
    """Return the lowest free slot of each head, int32 `[B, K]`; 0 where none is."""
    return jnp.argmax(~occupied(state), axis=-1).astype(jnp.int32)


def by_window(
    windows: Sequence[int | None],
    of_global: Iterable[Any],
    of_sliding: Callable[[int], Any],
) -> tuple[Any, ...]:
    """Return a value for each layer.

    Args:
      windows: of each layer; see `KVState`.
      of_global: the values of the layers without a window, in their order.
      of_sliding: the value of a layer with this window.
    """
    rest = iter(of_global)
    return tuple(next(rest) if w is None else of_sliding(w) for w in windows)


def all_slots(windows: Sequence[int | None], slots: int) -> tuple[int, ...]:
    """Return so many slots for the layers without a window, and whole windows."""
    return tuple(slots if window is None else window for window in windows)


def global_layers(cache: Cache) -> Cache:
    """Return the states of the layers that attend to all tokens, which a budget cuts.

    All of them where there is none.
    """
    return tuple(state for state in cache if state.window is None) or cache


def sliding_layers(cache: Cache) -> Cache:
    """Return the states of the layers that hold a window."""
    return tuple(state for state in cache if state.window is not None)


def num_bytes(cache: Cache) -> int:
    """Return the bytes that a cache occupies, bookkeeping included."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
