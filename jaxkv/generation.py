"""From the first token to the last: the generation loop, as pure functions of arrays.

`generate_tokens` is `start` (prefill and the first token) followed by `advance` (a
`lax.while_loop` of decode steps), and may be used inside a larger jitted program. The
compiled halves, `start_jit` and `advance_jit`, are what `jaxkv.generate` calls, so that
time to first token can be told apart from time per token, and text can be streamed.

Axis letters: `B` batch, `P` padded prompt, `V` vocabulary, `O` output buffer.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkv.forward import Cache, Network, decode_step, logits_at_end, read
from jaxkv.options import Options
from jaxkv.sampling import pick_next
from jaxkv.speculation import loop as speculation
from jaxkv.speculation.likeliest import likeliest_tokens
from jaxkv.speculation.loop import Speculation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """A batch of sequences in the middle of being generated: the loop's carry.

    Attributes:
      tokens: int32 `[B, O]`, the output so far, a stop id included; -1 beyond it.
      lengths: int32 `[B]`, tokens of the output so far.
      done: bool `[B]`, rows that ended by a stop id.
      last: int32 `[B]`, the newest token, which the cache does not hold yet.
      position: int32 `[B]`, the newest token's position.
      cache: one state per layer.
      keys: PRNG keys `[B]`, one per row; a token's key is the row's, folded with the
        token's position, so what a row gets depends on no other row.
      seen: bool `[B, V]` for the repetition penalty, or None if it is off.
      speculation: drafts and their statistics, or None if there are none.
    """

    tokens: jax.Array
    lengths: jax.Array
    done: jax.Array
    last: jax.Array
    position: jax.Array
    cache: Cache
    keys: jax.Array
    seen: jax.Array | None
    speculation: Speculation | None = None


def start(
    network: Network,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    stop_ids: jax.Array,
    *,
    options: Options,
    slots: int | tuple[int, ...],
    max_out: int,
    keep: jax.Array | None = None,
    pool: jax.Array | None = None,
) -> Generation:
    """Prefill and choose the first token.

    Args:
      network: static.
      params: its parameters.
      tokens: int32 `[B, P]`, right-padded.
      lengths: int32 `[B]`, at least 1.
      keys: PRNG keys `[B]`.
      stop_ids: int32 `[E]`; -1 stands for none.
      options: static.
      slots: of every layer's state, or of each layer's; see `Options.layer_slots`.
      max_out: size `O` of the output buffer.
      keep: int32 `[B]` or None; see `forward.prefill`.
      pool: int32 `[B, 2]`, the span of each prompt that drafts are copied from, its
        first index and the one after its last; None is all of it.

    Returns:
      The state of the loop after one token.
    """
    hidden, cache = read(
        network, params, tokens, lengths, options=options, slots=slots, keep=keep
    )
    logits = logits_at_end(network, params, hidden, lengths)
    batch, length = tokens.shape
    seen = None
    if options.sampler.repetition_penalty != 1:
        real = jnp.arange(length) < lengths[:, None]
        seen = jnp.zeros(logits.shape, bool)
        seen = seen.at[jnp.arange(batch)[:, None], tokens].max(real)
    generation = _emit(
        Generation(
            tokens=jnp.full((batch, max_out), -1, jnp.int32),
            lengths=jnp.zeros(batch, jnp.int32),
            done=jnp.zeros(batch, bool),
            last=jnp.zeros(batch, jnp.int32),
            position=lengths - 1,
            cache=cache,
            keys=keys,
            seen=seen,
        ),
        logits,
        jnp.ones(batch, bool),
        stop_ids,
        options.sampler,
    )
    if options.speculate is None:
        return generation
    likeliest = None
    if options.speculate.likeliest:
        # Behind the prompts may stand pseudo tokens, from which nothing is drafted.
        likeliest = likeliest_tokens(network, params, hidden[:, :length])
    begun = speculation.begin(
        *(options.speculate, tokens, lengths, generation.last),
        max_out=max_out,
        likeliest=likeliest,
        pool=pool,
    )
    return dataclasses.replace(generation, speculation=begun)


def start_copies(
    network: Network,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    stop_ids: jax.Array,
    *,
    options: Options,
    slots: int | tuple[int, ...],
    max_out: int,
    keep: jax.Array,
) -> Generation:
    """Prefill each prompt once, and begin as many outputs as it has budgets.

    Arguments are those of `start`, but for these:

    Args:
      tokens: int32 `[U, P]`.
      lengths: int32 `[U]`.
      keys: PRNG keys `[C * U]`.
      keep: int32 `[C, U]`.

    Returns:
      The state of `C * U` rows: all prompts with their first budget, then all of them
      with the second, and so on.
    """

    def begin(keep, keys):
        return start(
            *(network, params, tokens, lengths, keys, stop_ids),
            options=options,
            slots=slots,
            max_out=max_out,
            keep=keep,
        )

    # What does not depend on the budget is not repeated: all but the evictions.
    copies = jax.vmap(begin)(keep, keys.reshape(keep.shape))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), copies)


def advance(
    network: Network,
    params: Any,
    generation: Generation,
    until: jax.Array,
    stop_ids: jax.Array,
    *,
    options: Options,
) -> Generation:
    """Decode until every row has stopped or has `until` tokens.

    Args:
      network: static.
      params: its parameters.
      generation: from `start` or from an earlier call.
      until: int32 scalar, at most `O`.
      stop_ids: int32 `[E]`.
      options: static.

    Returns:
      The state of the loop.
    """

    def active(g):
        return ~g.done & (g.lengths < until)

    def step(g):
        running = active(g)
        position = jnp.where(running, g.position, -1)
        logits, cache = decode_step(
            network, params, g.last, position, g.cache, options=options
        )
        g = dataclasses.replace(g, cache=cache)
        return _emit(g, logits, running, stop_ids, options.sampler)

    if options.speculate is not None:
        return speculation.advance(
            *(network, params, generation, until, stop_ids),
            options=options,
            active=active,
            plain_step=step,
        )
    return jax.lax.while_loop(lambda g: active(g).any(), step, generation)


class Output(NamedTuple):
    """Arrays of a finished generation.

    Attributes:
      tokens: int32 `[B, O]`, stop id included, -1 beyond the output.
      lengths: int32 `[B]`.
      stopped: bool `[B]`: by a stop id, not by the limit.
      cache: one state per layer.
    """

    tokens: jax.Array
    lengths: jax.Array
    stopped: jax.Array
    cache: Cache


def generate_tokens(
    network: Network,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    stop_ids: jax.Array,
    max_new_tokens: jax.Array,
    *,
    options: Options,
    slots: int | tuple[int, ...],
    max_out: int,
    keep: jax.Array | None = None,
) -> Output:
    """Generate from token ids, in one traceable function: `start`, then `advance`.

    Arguments are theirs; `max_new_tokens` is a traced int32 scalar, at most `max_out`.
    """
    generation = start(
        network,
        params,
        tokens,
        lengths,
        keys,
        stop_ids,
        options=options,
        slots=slots,
        max_out=max_out,
        keep=keep,
    )
    end = advance(
        network, params, generation, max_new_tokens, stop_ids, options=options
    )
    return Output(end.tokens, end.lengths, end.done, end.cache)


def _emit(g, logits, running, stop_ids, sampler):
    """Choose the next token of the running rows and append it to their output."""
    rows = jnp.arange(logits.shape[0])
    position = g.position + 1
    picked = pick_next(sampler, logits, g.keys, position, g.seen)
    token = jnp.where(running, picked, g.last)
    column = jnp.where(running, g.lengths, g.tokens.shape[1])
    return dataclasses.replace(
        g,
        tokens=g.tokens.at[rows, column].set(token, mode="drop"),
        lengths=g.lengths + running,
        done=g.done | (running & (token[:, None] == stop_ids).any(-1)),
        last=token,
        position=jnp.where(running, position, g.position),
        seen=None if g.seen is None else g.seen.at[rows, token].max(running),
    )


start_jit = jax.jit(start, static_argnames=("network", "options", "slots", "max_out"))
start_copies_jit = jax.jit(
    start_copies, static_argnames=("network", "options", "slots", "max_out")
)
advance_jit = jax.jit(
    advance, static_argnames=("network", "options"), donate_argnames="generation"
)
generate_jit = jax.jit(
    generate_tokens, static_argnames=("network", "options", "slots", "max_out")
)
