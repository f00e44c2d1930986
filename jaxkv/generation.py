"""From the first token to the last: the generation loop, as pure functions of arrays.

`generate_tokens` is `start` (prefill and the first token) followed by `advance` (a
`lax.while_loop` of decode steps), and may be used inside a larger jitted program. The
compiled halves, `start_jit` and `advance_jit`, let `jaxkv.generate` time and stream.

Axis letters: `B` batch, `P` padded prompt, `V` vocabulary, `O` output buffer.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxkv.attention import Network
from jaxkv.forward import decode_step, logits_at_end, read
from jaxkv.given import feed_on
from jaxkv.options import Options
from jaxkv.policies.base import Speculable
from jaxkv.runtime.host_waits import loop
from jaxkv.runtime.programs import bounded_jit
from jaxkv.runtime.seeds import independent
from jaxkv.sampling import Sampler, from_numbers, penalizes, pick_next
from jaxkv.sequences import Generation, append, check_ends, no_logprobs, readable
from jaxkv.speculation import loop as speculation
from jaxkv.speculation import pace
from jaxkv.speculation.drafters import Drafter
from jaxkv.speculation.likeliest import likeliest_tokens
from jaxkv.speculation.loop import Speculation
from jaxkv.state import Cache

Running = Generation[Speculation | None]


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
) -> Running:
    """Prefill and choose the first token.

    Args:
      network: static.
      params: its parameters.
      tokens: int32 `[B, P]`, right-padded.
      lengths: int32 `[B]`, at least 1.
      keys: PRNG keys `[B]`, of any implementation.
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
    likeliest = None
    if options.speculate is not None and options.speculate.likeliest:
        # Behind the prompts may stand pseudo tokens, from which nothing is drafted.
        likeliest = likeliest_tokens(network, params, hidden[:, : tokens.shape[1]])
    return begin(
        *(tokens, lengths, logits, cache, keys, stop_ids),
        options=options,
        max_out=max_out,
        likeliest=likeliest,
        pool=pool,
    )


def begin(
    tokens: jax.Array,
    lengths: jax.Array,
    logits: jax.Array,
    cache: Cache,
    keys: jax.Array,
    stop_ids: jax.Array,
    *,
    options: Options,
    max_out: int,
    likeliest: jax.Array | None = None,
    pool: jax.Array | None = None,
) -> Running:
    """Choose the first token behind prompts that have been read.

    Arguments are those of `start`, but for these:

    Args:
      logits: float32 `[B, V]`, of the token after each prompt.
      cache: one state per layer, begun by the decode policy.
      likeliest: int32 `[B, P, 3]`, from `likeliest_tokens`, if the drafter asks.
    """
    batch, length = tokens.shape
    seen = None
    if penalizes(options.sampler):
        real = jnp.arange(length, dtype=jnp.int32)[None] < lengths[:, None]
        seen = jnp.zeros(logits.shape, bool)
        seen = seen.at[jnp.arange(batch, dtype=jnp.int32)[:, None], tokens].max(real)
    generation: Running = Generation(
        tokens=jnp.full((batch, max_out), -1, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        finite=jnp.ones(batch, bool),
        last=jnp.zeros(batch, jnp.int32),
        position=lengths - 1,
        cache=cache,
        rngs=independent(keys),
        seen=seen,
        speculation=None,
        logprobs=no_logprobs(batch, max_out, options.top_logprobs),
    )
    given = logits, ~generation.done, stop_ids, options.sampler
    generation = _choose(generation, *given)
    if options.speculate is None:
        return readable(generation)
    begun = speculation.begin(
        *(options.speculate, tokens, lengths, generation.last),
        rule=options.accept,
        max_out=max_out,
        likeliest=likeliest,
        pool=pool,
    )
    return readable(dataclasses.replace(generation, speculation=begun))


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
) -> Running:
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

    # What does not depend on the budget is not repeated: all but the evictions, and
    # the sketches of a policy that does so.
    copies = jax.vmap(begin)(keep, keys.reshape(keep.shape))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), copies)


def follow(
    network: Network,
    params: Any,
    generation: Running,
    tokens: jax.Array,
    counts: jax.Array,
    stop_ids: jax.Array,
    *,
    options: Options,
    max_out: int,
) -> Running:
    """Feed more of a prompt behind an output, and choose the first token of the next.

    The cache stays, so that a turn of a conversation costs its own tokens only.

    Args:
      network: static.
      params: its parameters.
      generation: of the output before, without drafts. Its newest token is not in the
        cache yet: `tokens` begin with it, or with what stands in its place.
      tokens: int32 `[B, N]`.
      counts: int32 `[B]`, at least 1; the other tokens are padding.
      stop_ids: int32 `[E]`; -1 stands for none.
      options: static.
      max_out: size `O` of the output buffer.

    Returns:
      The state of the loop after one token of the new output.
    """
    batch = len(tokens)
    at = generation.position
    logits, cache = feed_on(
        *(network, params, tokens, counts, at, generation.cache), options=options
    )
    seen = generation.seen
    if seen is not None:
        real = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] < counts[:, None]
        seen = seen.at[jnp.arange(batch, dtype=jnp.int32)[:, None], tokens].max(real)
    begun = dataclasses.replace(
        generation,
        tokens=jnp.full((batch, max_out), -1, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        position=at + counts - 1,
        cache=cache,
        seen=seen,
    )
    return readable(_choose(begun, logits, ~begun.done, stop_ids, options.sampler))


def advance(
    network: Network,
    params: Any,
    generation: Running,
    until: jax.Array,
    stop_ids: jax.Array,
    prices: jax.Array | None = None,
    *,
    options: Options,
    steps: jax.Array | int | None = None,
) -> Running:
    """Decode until every row has stopped or has `until` tokens.

    Args:
      network: static.
      params: its parameters.
      generation: from `start` or from an earlier call.
      until: int32 scalar, at most `O`, or `[B]`, of each row.
      stop_ids: int32 `[E]`, or `[B, E]`, of each row.
      prices: float32 `[L]`, what a step with drafts of each of `pace.widths` takes, in
        plain steps. None is what the drafter's `break_even` says, and where that is
        "auto", `pace.UNMEASURED`: a traced function measures nothing.
      options: static.
      steps: int32 scalar, when to return, or soon after; `int`: static, see `loop`.

    Returns:
      The state of the loop.
    """
    drafter = options.speculate
    policy = cast(Speculable, options.decode)  # where something is drafted

    def running(g):
        return ~g.done & g.finite & (g.lengths < until)

    def taken(g):
        return g.lengths if drafter is None else g.speculation.counts.steps

    def plain_step(g):
        rows = running(g)
        position = jnp.where(rows, g.position, -1)
        logits, cache = decode_step(
            network, params, g.last, position, g.cache, options=options
        )
        g = dataclasses.replace(g, cache=cache)
        return _choose(g, logits, rows, stop_ids, options.sampler)

    def drafting_steps(drafter: Drafter, widths, prices, g):
        g = speculation.wait(g, plain_step, running)
        rows = running(g)
        g, drafts, brings, width = speculation.draft(
            drafter, options.accept, g, rows, prices
        )
        for index in range(len(widths)):
            step = functools.partial(
                speculation.tree_step,
                *(network, params),
                drafts=drafts,
                brings=brings,
                until=until,
                stop_ids=stop_ids,
                widths=widths[: index + 1],
                depth=drafter.depth,
                policy=policy,
                rule=options.accept,
                sampler=options.sampler,
                implementation=options.decode_implementation,
            )
            g = speculation.once_if(width == index, step, g)
        return g

    step = plain_step
    if drafter is not None:
        widths = pace.widths(drafter, options.accept)
        if prices is None:
            prices = pace.assumed_prices(drafter, options.accept)
        step = functools.partial(drafting_steps, drafter, widths, prices)

    def goes_on(g):
        few = steps is None or (taken(g) - taken(generation)).max() < steps
        return running(g).any() & few

    return readable(loop(goes_on, step, generation, turns=steps))


def _choose(
    g: Running,
    logits: jax.Array,
    rows: jax.Array,
    stop_ids: jax.Array,
    sampler: Sampler,
) -> Running:
    """Choose the next token of some rows, bool `[B]`, and append it."""
    # Rows whose logits are not finite get none, and are marked.
    token = pick_next(sampler, logits, g.rngs, g.position + 1, g.seen)
    finite = from_numbers(logits, token)
    g = dataclasses.replace(g, finite=g.finite & (finite | ~rows))
    count = (rows & finite).astype(jnp.int32)
    return append(g, token[:, None], count, stop_ids, lambda: logits[:, None])


class Output(NamedTuple):
    """Arrays of a finished generation.

    Attributes:
      tokens: int32 `[B, O]`, stop id included, -1 beyond the output.
      lengths: int32 `[B]`.
      stopped: bool `[B]`: by a stop id, not by the limit.
      finite: bool `[B]`: false where logits were NaN or infinite, behind the output.
      cache: one state per layer.
    """

    tokens: jax.Array
    lengths: jax.Array
    stopped: jax.Array
    finite: jax.Array
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
    check_ends(keys, stop_ids, max_new_tokens, max_out)
    begun = start(
        *(network, params, tokens, lengths, keys, stop_ids),
        options=options,
        slots=slots,
        max_out=max_out,
        keep=keep,
    )
    end = advance(network, params, begun, max_new_tokens, stop_ids, options=options)
    return Output(end.tokens, end.lengths, end.done, end.finite, end.cache)


_PARAMS = ("params",)
start_jit = bounded_jit(
    implied=_PARAMS, static_argnames=("network", "options", "slots", "max_out")
)(start)
start_copies_jit = bounded_jit(
    implied=_PARAMS, static_argnames=("network", "options", "slots", "max_out")
)(start_copies)
follow_jit = bounded_jit(
    implied=_PARAMS, static_argnames=("network", "options", "max_out")
)(follow)
advance_jit = bounded_jit(
    implied=_PARAMS,
    static_argnames=("network", "options"),
    donate_argnames="generation",
)(advance)
generate_jit = bounded_jit(
    implied=_PARAMS, static_argnames=("network", "options", "slots", "max_out")
)(generate_tokens)
