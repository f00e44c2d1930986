"""Documents that grow: with questions behind them, or as prompts with their outputs.

Axis letters: `B` rows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv import state as kv
from jaxkv.attention import Network
from jaxkv.contexts.context import Context, Documents, counted, drawn
from jaxkv.forward import decode_step, logits_at_end, read_behind
from jaxkv.options import Options
from jaxkv.runtime.programs import bounded_jit
from jaxkv.state import Cache, KVState


def read_on(
    network: Network,
    params: Any,
    context: Context,
    documents: jax.Array,
    tokens: jax.Array,
    counts: jax.Array,
    *,
    options: Options,
    slots: tuple[int, ...],
) -> Documents:
    """Put questions behind documents, so that these are longer; see `ask`.

    Each has a copy of its document, whose slots are to be those of one text.
    """
    chosen = drawn(context, documents, slots)
    hidden, cache = read_behind(
        *(network, params, tokens, counts, chosen.lengths, chosen.cache),
        implementation=options.decode_implementation,
    )
    logits = logits_at_end(network, params, hidden, counts)
    return counted(cache, chosen.lengths + counts, logits)


def settle(
    network: Network,
    params: Any,
    token: jax.Array,
    position: jax.Array,
    cache: Cache,
    *,
    options: Options,
) -> Documents:
    """Feed the newest tokens of outputs, so that what is left of texts is documents.

    Args:
      network: static.
      params: its parameters.
      token: int32 `[B]`, which the cache does not hold yet.
      position: int32 `[B]`, theirs.
      cache: one state per layer; what a decode policy remembers is dropped, and what
        rows share is copied, since documents that are longer share no slots.
      options: static.
    """
    logits, cache = decode_step(
        network, params, token, position, cache, options=options
    )
    if options.decode.evicts:
        cache = tuple(map(_without_victim, cache))
    cache = tuple(kv.pack(kv.own_all(state)) for state in cache)
    return counted(cache, position + 1, logits)


def _without_victim(state: KVState) -> KVState:
    """Return a state without the token that the next one would have overwritten.

    So whoever goes on with the same budget finds a slot, as in the loop.
    """
    if state.window is not None:
        return state
    slots = jnp.arange(state.slots, dtype=jnp.int32)
    gone = slots[None, None] == state.target[..., None]
    positions = jnp.where(gone, kv.FREE, state.positions)
    return dataclasses.replace(state, positions=positions)


settle_jit = bounded_jit(implied=("params",), static_argnames=("network", "options"))(
    settle
)
read_on_jit = bounded_jit(
    implied=("params",), static_argnames=("network", "options", "slots")
)(read_on)
