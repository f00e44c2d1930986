"""What the policies that evict while decoding have in common.

Each puts the new token into `state.target`, attends, and names the next slot: a free
one first, else the least important one. They differ in what importance is and in what
is never evicted. What a policy remembers of earlier steps lies in `state.memory`.

Axis letters: `B` batch, `K` key/value heads, `S` slots.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Lt

from jaxkv import state as kv
from jaxkv.kernels import decode, dispatch, shared_slots, tree_attention, victims
from jaxkv.kernels.cache import Nodes, Token
from jaxkv.kernels.weighing import PLAIN, Weighing, scale_of
from jaxkv.policies.fitting import fit
from jaxkv.state import KVState
from jaxkv.trees import DraftTree, Pending

Recent = Annotated[int, Ge(0)] | Annotated[float, Ge(0), Lt(1)]  # tokens, or a fraction


def check_room(
    name: str,
    budget: int,
    *,
    n_sink: int = 0,
    n_recent: Recent = 0,
    count: int = 1,
) -> None:
    """Raise ValueError unless `count` slots can be evicted beside what is protected."""
    recent = num_recent(n_recent, budget)
    if budget < n_sink + recent + count:
        raise ValueError(
            f"{name}: budget={budget} is too small for {n_sink} sinks, {recent} recent "
            f"tokens and {count} to evict at a time; use a budget of at least "
            f"{n_sink + recent + count} or protect less."
        )


def num_recent(n_recent: Recent, slots: int) -> int:
    """Return how many tokens `n_recent` means; a fraction is one of `slots`."""
    if isinstance(n_recent, float | np.floating):
        return int(n_recent * slots)
    return n_recent


def attend_and_write(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    state: KVState,
    position: jax.Array,
    *,
    implementation: decode.Implementation | None,
    weighing: Weighing = PLAIN,
) -> tuple[jax.Array, KVState]:
    """Do all of `DecodePolicy.attend` but the choice: `target` stays as it is."""
    arrays = query, Token(key, value, position), kv.to_slots(state)
    how: dict[str, Any] = dict(scale=scale_of(query), **weighing.softmax)
    if state.shared is None:
        out, slots = decode.decode_attention(
            *arrays, **how, implementation=implementation
        )
    else:
        out, slots = shared_slots.attend_from_token(
            *(*arrays, state.shared.slots),
            **how,
            most=state.shared.most,
            implementation=dispatch.counterpart(
                implementation, shared_slots.Implementation
            ),
        )
    return out, kv.from_slots(slots, state, state.memory)


def attend_tree_by_depth(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    state: KVState,
    position: jax.Array,
    upcoming: jax.Array,
    drafts: DraftTree,
    ancestors: jax.Array,
    *,
    implementation: decode.Implementation | None,
    weighing: Weighing = PLAIN,
) -> tuple[jax.Array, Pending]:
    """Do `Speculable.attend_tree` where the next tokens' slots are known beforehand.

    Args:
      query: `[B, T, N, H]`, rotated.
      key: `[B, T, K, H]`, rotated.
      value: `[B, T, K, H]`.
      state: of one layer.
      position: int32 `[B]`, of the root.
      upcoming: int32 `[B, K, D + 2]`, the slots of the next `D + 2` tokens.
      drafts: no deeper than `D`.
      ancestors: bool `[B, T, T]`.
      implementation: of `DecodePolicy.attend`; its `dispatch.counterpart` is used.
      weighing: of `DecodePolicy.attend`.

    Returns:
      The output and what is pending.
    """
    before = query, Nodes(key, value, position), kv.to_slots(state)
    behind = upcoming, drafts.depths, ancestors
    how: dict[str, Any] = dict(scale=scale_of(query), **weighing.softmax)
    if state.shared is None:
        out = tree_attention.tree_attention(
            *(*before, *behind),
            **how,
            implementation=dispatch.counterpart(
                implementation, tree_attention.Implementation
            ),
        )
    else:
        out = shared_slots.attend_from_tree(
            *(*before, state.shared.slots, *behind),
            **how,
            most=state.shared.most,
            implementation=dispatch.counterpart(
                implementation, shared_slots.Implementation
            ),
        )
    return out, Pending(key, value, upcoming)


def start_sums(state: KVState) -> KVState:
    """Return the state with a sum of 0 per slot, float32 `[B, K, S]`, in its memory."""
    return dataclasses.replace(
        state, memory=jnp.zeros(state.positions.shape, jnp.float32)
    )


def attend_and_sum(
    query, key, value, state, position, *, implementation, weighing=PLAIN
) -> tuple[jax.Array, KVState]:
    """Write and attend as `attend_and_write` does, and add the weights to `memory`.

    The weights are XLA's whatever computes the output, averaged over the query heads of
    a key/value head. A new token's sum starts with what it attends to itself.
    """
    out, state = attend_and_write(
        *(query, key, value, state, position),
        implementation=implementation,
        weighing=weighing,
    )
    weights = decode.decode_weights(
        query,
        state.keys,
        state.positions,
        scale=scale_of(query),
        exact=implementation == "reference",
        **weighing.softmax,
    ).mean(axis=2)
    new = (
        jnp.arange(state.slots, dtype=jnp.int32)[None, None] == state.target[..., None]
    )
    sums = jnp.where(new, 0, state.memory) + weights
    sums = jnp.where(position[:, None, None] >= 0, sums, state.memory)
    return out, dataclasses.replace(state, memory=sums)


def aim_at_least(
    state: KVState,
    importance: jax.Array,
    position: jax.Array,
    *,
    n_sink: int = 0,
    n_recent: Recent = 0,
    shared: bool,
) -> KVState:
    """Set `target` to the next victim, except in rows that have finished.

    Args:
      state: with the new token in it.
      importance: float32 `[B, K, S]`.
      position: int32 `[B]` of the new token; -1 for finished rows.
      n_sink: first positions that are protected.
      n_recent: newest tokens that are; see `num_recent`.
      shared: one victim for all heads.
    """
    fit("importance", importance, "B K S", state.positions.shape, jnp.floating)
    victim = victims.choose_victim(
        importance,
        state.positions,
        jnp.full_like(position, n_sink),
        position - num_recent(n_recent, state.slots),
        shared=shared,
    )
    target = jnp.where(position[:, None] >= 0, victim, state.target)
    return dataclasses.replace(state, target=target)


def evict_in_bulk(
    state: KVState,
    importance: Callable[[jax.Array], jax.Array],
    position: jax.Array,
    oldest: jax.Array,
    newest: jax.Array,
    *,
    count: int,
    shared: bool,
    at_once: int = 8,
) -> KVState:
    """Free the `count` least important tokens once no slot is free, and aim at one.

    Rows of prompts of different lengths are full at different steps. So importance is
    computed for a few rows at a time, until none is full: a step costs as much as it
    evicts, however large the batch.

    Args:
      state: with the new token in it.
      importance: from rows, int32 `[R]`, to float32 `[R, K, S]`; called in the steps
        that evict only.
      position: int32 `[B]` of the new token; -1 for finished rows, which do not change.
      oldest: int32 `[B]`, least position that may be evicted.
      newest: int32 `[B]`, greatest position that may be evicted.
      count: tokens to free at once.
      shared: the same slots in all heads.
      at_once: rows whose importance is computed together.
    """
    running = position >= 0
    free, _ = victims.classes(state.positions, oldest, newest, shared=shared)
    full = running & (~free.any(-1)).any(-1)

    def evict(carry):
        positions, full = carry
        _, rows = jax.lax.top_k(full.astype(jnp.int32), min(at_once, len(full)))
        before = positions[rows]
        left = victims.free_least(
            *(importance(rows), before, oldest[rows], newest[rows]),
            count=count,
            shared=shared,
        )
        left = jnp.where(full[rows][:, None, None], left, before)
        return positions.at[rows].set(left), full.at[rows].set(False)

    positions, _ = jax.lax.while_loop(
        lambda carry: carry[1].any(), evict, (state.positions, full)
    )
    target = victims.next_free(positions, shared=shared)
    target = jnp.where(running[:, None], target, state.target)
    return dataclasses.replace(state, positions=positions, target=target)
