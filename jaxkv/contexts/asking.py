"""Questions behind documents: the way from a context into the loop.

`ask` is a pure function of arrays, and may be used inside a larger jitted program; the
door is `jaxkv.generate(context=)`.

Axis letters: `P` padded document, `B` questions, `Q` padded question, `V` vocabulary.
"""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxkv import generation
from jaxkv import state as kv
from jaxkv.attention import Network
from jaxkv.contexts.context import Context, begun, drawn
from jaxkv.contexts.sharing import Layers
from jaxkv.forward import logits_at_end, read_behind
from jaxkv.generation import Running
from jaxkv.given import feed
from jaxkv.options import Options
from jaxkv.runtime.programs import bounded_jit
from jaxkv.sequences import write
from jaxkv.speculation.likeliest import likeliest_tokens, top_three
from jaxkv.state import Cache


def ask(
    network: Network,
    params: Any,
    context: Context,
    documents: jax.Array,
    tokens: jax.Array,
    counts: jax.Array,
    keys: jax.Array,
    stop_ids: jax.Array,
    *,
    options: Options,
    slots: tuple[int, ...],
    max_out: int,
    pool: jax.Array | None = None,
    crowded: bool = False,
    shared: Layers | None = None,
) -> Running:
    """Put questions behind documents, and choose the first tokens.

    Args:
      network: static.
      params: its parameters.
      context: of this network.
      documents: int32 `[B]`, which one each question is about.
      tokens: int32 `[B, Q]`, the questions, right-padded.
      counts: int32 `[B]`, at least 1.
      keys: PRNG keys `[B]`.
      stop_ids: int32 `[E]`; -1 stands for none.
      options: static.
      slots: of each layer's state, static: enough for what is kept of a document, if
        it is not shared, its question and, if the decode policy keeps everything, the
        output; see `crowded`.
      max_out: size of the output buffer, static.
      pool: int32 `[B, 2]`, the span of document and question that drafts are copied
        from; None is all of it.
      crowded: static; whether the slots may be too few for a row's document and
        question. Then the decode policy evicts while it reads such a question.
      shared: of each layer, what rows do not copy of their documents; see `sharing`.

    Returns:
      The state of the loop after one token, its cache without what is shared.
    """
    asked = put_behind(
        *(network, params, context, documents, tokens, counts),
        options=options,
        slots=slots,
        crowded=crowded,
        shared=shared,
    )
    own, _ = kv.apart(asked.cache)
    return generation.begin(
        *(asked.tokens, asked.lengths, asked.logits, own, keys, stop_ids),
        options=options,
        max_out=max_out,
        likeliest=asked.likeliest,
        pool=pool,
    )


class Asked(NamedTuple):
    """Documents and the questions behind them, read, as `generation.begin` takes them.

    Attributes:
      tokens: int32 `[B, P + Q]`, right-padded.
      lengths: int32 `[B]`.
      logits: float32 `[B, V]`, of the token after each question.
      cache: one state per layer, begun by the decode policy.
      likeliest: int32 `[B, P + Q, 3]` or None, as in `Context`.
    """

    tokens: jax.Array
    lengths: jax.Array
    logits: jax.Array
    cache: Cache
    likeliest: jax.Array | None


def put_behind(
    network: Network,
    params: Any,
    context: Context,
    documents: jax.Array,
    tokens: jax.Array,
    counts: jax.Array,
    *,
    options: Options,
    slots: tuple[int, ...],
    crowded: bool = False,
    shared: Layers | None = None,
) -> Asked:
    """Put questions behind documents; arguments are those of `ask`.

    A question that fits passes in blocks, and the policy begins behind it. One that
    does not is fed token by token to a policy that has begun behind the document. A row
    gets what it gets alone, whatever the others are.
    """
    chosen = drawn(context, documents, slots, shared)
    whole = counts
    if crowded:
        held = chosen.kept + counts + options.decode.spare
        whole = jnp.where(held <= global_slots(chosen.cache), counts, 0)
    hidden, cache = read_behind(
        *(network, params, tokens, whole, chosen.lengths, chosen.cache),
        implementation=options.decode_implementation,
    )
    cache = begun(options.decode, network, params, cache, chosen.lengths + whole)
    logits = logits_at_end(network, params, hidden, jnp.maximum(whole, 1))
    if crowded:
        fed = feed(
            *(network, params, tokens, counts - whole, chosen.lengths),
            *(chosen.logits, cache),
            options=options,
        )
        cache = fed.cache
        logits = jnp.where((whole > 0)[:, None], logits, fed.logits)
    room = ((0, 0), (0, tokens.shape[1]))
    text = write(jnp.pad(chosen.tokens, room), tokens, chosen.lengths, counts)
    likeliest = None
    if options.speculate is not None and options.speculate.likeliest:
        found = likeliest_tokens(network, params, hidden)
        found = found.at[:, 0].set(top_three(chosen.logits))
        of_document = cast(jax.Array, chosen.likeliest)
        likeliest = jnp.pad(of_document, (*room, (0, 0)))
        likeliest = write(likeliest, found, chosen.lengths, counts)
    return Asked(text, chosen.lengths + counts, logits, cache, likeliest)


def global_slots(cache: Cache) -> int:
    """Return the slots of the layers that a budget speaks of."""
    return min(state.slots for state in kv.global_layers(cache))


ask_jit = bounded_jit(
    implied=("params",),
    static_argnames=("network", "options", "slots", "max_out", "crowded"),
)(ask)
