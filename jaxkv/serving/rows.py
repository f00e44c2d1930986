"""Rows that requests come to and go from: pure functions of arrays, of fixed shapes.

A row is a row of `generation.Running`. A prompt is read by itself (`read_prompts`,
`read_questions`) into a state of the rows' own shapes, put into a free row (`insert`),
and decoded with the others (`advance`). What a request asked for, `Terms`, is traced:
other requests compile nothing. A row is free whose limit is 0.

Axis letters: `R` rows, `A` requests that are read together, `P` padded prompt, `O`
output buffer, `E` stop ids, `M` tokens of a block.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import generation
from jaxkv import state as kv
from jaxkv.attention import Network, begin_layers
from jaxkv.contexts import asking
from jaxkv.contexts.context import Context
from jaxkv.forward import logits_at_end, read, read_part
from jaxkv.generation import Running
from jaxkv.options import Options
from jaxkv.runtime.programs import SHELF, Shelf, bounded_jit
from jaxkv.sampling import Greedy
from jaxkv.sequences import LogProbs
from jaxkv.serving.samplers import RowSamplers
from jaxkv.speculation.likeliest import likeliest_tokens
from jaxkv.state import Cache
from jaxkv.text.planning import bucket


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What is static about rows; they never change it.

    Attributes:
      slots: of each layer's state.
      prompt: tokens of the longest prompt, documents of contexts included, padded.
      max_out: size `O` of the output buffer.
      options: of all rows; the sampler is each row's own.
    """

    slots: tuple[int, ...]
    prompt: int
    max_out: int
    options: Options


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Terms:
    """What the request of each row has asked for.

    Attributes:
      limits: int32 `[R]`, the longest output; 0 where the row is free.
      stops: int32 `[R, E]`; -1 stands for none.
      samplers: of each row.
    """

    limits: Any
    stops: Any
    samplers: RowSamplers


class Report(NamedTuple):
    """What a block has come to.

    Attributes:
      tokens: int32 `[R, M]`, new tokens of each row.
      lengths: int32 `[R]`, tokens of the outputs so far.
      done: bool `[R]`, rows that ended by a stop id.
      finite: bool `[R]`, rows whose logits were numbers.
      logprobs: of the new tokens; None if nobody asked.
    """

    tokens: jax.Array
    lengths: jax.Array
    done: jax.Array
    finite: jax.Array
    logprobs: LogProbs | None


def no_terms(rows: int, *, stops: int, penalties: bool) -> Terms:
    """Return the terms of free rows, as NumPy's arrays."""
    return Terms(
        limits=np.zeros(rows, np.int32),
        stops=np.full((rows, stops), -1, np.int32),
        samplers=RowSamplers.of([Greedy()] * rows, penalties=penalties),
    )


def empty(
    network: Network, params: Any, terms: Terms, keys: jax.Array, *, shape: Shape
) -> Running:
    """Return rows that nobody has come to yet.

    Args:
      network: static.
      params: its parameters.
      terms: of all rows.
      keys: PRNG keys `[R]`, whatever they are.
      shape: static.
    """
    rows = len(terms.limits)
    counts = jax.ShapeDtypeStruct((rows,), jnp.int32)
    options = shape.options
    unbounded = options.budget is None or options.decode.evicts
    like = jax.eval_shape(
        lambda params, tokens, counts, keys, terms, keep: read_prompts(
            *(network, params, tokens, counts, keys, terms, keep), shape=shape
        )[0],
        params,
        jax.ShapeDtypeStruct((rows, bucket(1)), jnp.int32),
        counts,
        keys,
        terms,
        None if unbounded else counts,
    )
    like = dataclasses.replace(like, rngs=counts)  # of keys there is no 0
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    cache = tuple(
        dataclasses.replace(s, positions=jnp.full_like(s.positions, kv.FREE))
        for s in blank.cache
    )
    return dataclasses.replace(blank, cache=cache, rngs=keys)


class Part(NamedTuple):
    """What the first layers have made of prompts.

    Attributes:
      carried: what the next layer takes.
      cache: a state of each of these layers.
    """

    carried: Any
    cache: Cache


def read_layers(
    network: Network,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    keep: jax.Array | None,
    carried: Any,
    *,
    shape: Shape,
    first: int,
    count: int,
) -> tuple[Any, Cache]:
    """Read whole prompts in some of the layers; arguments are those of `read_prompts`.

    Args:
      network: static.
      params: its parameters.
      tokens: int32 `[A, P]`, right-padded.
      lengths: int32 `[A]`.
      keep: int32 `[A]` or None.
      carried: what the layer before returned; None for the first.
      shape: static.
      first: of these layers, static.
      count: how many they are, static.

    Returns:
      What the next layer takes, and a state of each of these.
    """
    return read_part(
        *(network, params, tokens, lengths, carried),
        options=shape.options,
        slots=shape.slots,
        keep=keep,
        first=first,
        count=count,
    )


def read_prompts(
    network: Network,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    terms: Terms,
    keep: jax.Array | None,
    part: Part | None = None,
    *,
    shape: Shape,
    first: int = 0,
) -> tuple[Running, Report]:
    """Read whole prompts, keep what the policy keeps, and choose their first tokens.

    Args:
      network: static.
      params: its parameters.
      tokens: int32 `[A, P]`, right-padded.
      lengths: int32 `[A]`.
      keys: PRNG keys `[A]`.
      terms: of `A` requests.
      keep: int32 `[A]`, tokens that may be kept of each prompt; None is what the shape
        says.
      part: what earlier layers have made of the prompts; None where all are read here.
      shape: static.
      first: of the layers that are left, static.

    Returns:
      The requests as rows, and a report of the first tokens.
    """
    options = shape.options
    how: Any = dict(options=options, slots=shape.slots, keep=keep)
    given = (network, params, tokens, lengths)
    if part is None:
        hidden, cache = read(*given, **how)
    else:
        count = len(shape.slots) - first
        carried, cache = part
        hidden, rest = read_part(*given, carried, **how, first=first, count=count)
        cache = begin_layers(options.decode, network, params, cache + rest, lengths)
    likeliest = None
    if options.speculate is not None and options.speculate.likeliest:
        likeliest = likeliest_tokens(network, params, hidden[:, : tokens.shape[1]])
    logits = logits_at_end(network, params, hidden, lengths)
    asked = asking.Asked(tokens, lengths, logits, cache, likeliest)
    return _begin(asked, keys, terms, shape)


def read_questions(
    network: Network,
    params: Any,
    context: Context,
    documents: jax.Array,
    tokens: jax.Array,
    counts: jax.Array,
    keys: jax.Array,
    terms: Terms,
    *,
    shape: Shape,
) -> tuple[Running, Report]:
    """Read questions behind documents, and choose the first tokens of the answers.

    Args:
      network: static.
      params: its parameters.
      context: of this network.
      documents: int32 `[A]`, which one each question is about.
      tokens: int32 `[A, Q]`, the questions, right-padded.
      counts: int32 `[A]`.
      keys: PRNG keys `[A]`.
      terms: of `A` requests.
      shape: static.

    Returns:
      The requests as rows, and a report of the first tokens.
    """
    asked = asking.put_behind(
        *(network, params, context, documents, tokens, counts),
        options=shape.options,
        slots=shape.slots,
    )
    return _begin(asked, keys, terms, shape)


def _begin(
    asked: asking.Asked, keys: jax.Array, terms: Terms, shape: Shape
) -> tuple[Running, Report]:
    """Choose first tokens, in buffers of the rows' own widths."""

    def fitted(x: jax.Array) -> jax.Array:
        more = max(shape.prompt - x.shape[1], 0)
        pad = [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x[:, : shape.prompt], pad)

    begun = generation.begin(
        *(fitted(asked.tokens), asked.lengths, asked.logits, asked.cache, keys),
        terms.stops,
        options=dataclasses.replace(shape.options, sampler=terms.samplers),
        max_out=shape.max_out,
        likeliest=None if asked.likeliest is None else fitted(asked.likeliest),
    )
    return begun, _report(begun, jnp.zeros_like(begun.lengths), 1)


def _report(rows: Running, since: jax.Array, most: int) -> Report:
    """Report `most` tokens of each row, from those at `since`, int32 `[R]`, on."""
    order = jnp.arange(most, dtype=jnp.int32)[None] + since[:, None]
    order = jnp.minimum(order, rows.tokens.shape[1] - 1)

    def new(x: jax.Array) -> jax.Array:
        at = order.reshape(*order.shape, *(1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, at, axis=1)

    noted = None if rows.logprobs is None else jax.tree.map(new, rows.logprobs)
    return Report(new(rows.tokens), rows.lengths, rows.done, rows.finite, noted)


def insert(rows: Running, new: Running, at: jax.Array) -> Running:
    """Put requests that have been read into rows.

    Args:
      rows: all of them.
      new: of `A` rows.
      at: int32 `[A]`, their places; `R` is none.
    """
    return jax.tree.map(lambda x, y: x.at[at].set(y, mode="drop"), rows, new)


def advance(
    network: Network,
    params: Any,
    rows: Running,
    terms: Terms,
    steps: jax.Array | None,
    prices: jax.Array | None,
    *,
    shape: Shape,
    most: int,
    fixed: int | None = None,
) -> tuple[Running, Report]:
    """Decode a block in all rows that have not ended.

    Args:
      network: static.
      params: its parameters.
      rows: the rows.
      terms: theirs.
      steps: int32 scalar, or None with `fixed`; see `generation.advance`.
      prices: float32 `[L]`; see `generation.advance`.
      shape: static.
      most: new tokens of a row that are reported, `M`, static.
      fixed: steps that are taken whatever the rows do, static, or None.
    """
    options = dataclasses.replace(shape.options.of_the_loop(), sampler=terms.samplers)
    after = generation.advance(
        *(network, params, rows, terms.limits, terms.stops, prices),
        options=options,
        steps=steps if fixed is None else fixed,
    )
    return after, _report(after, rows.lengths, most)


_PARAMS = ("params",)
# Long prompts have a program for each of their parts.
_jit = functools.partial(bounded_jit, shelf=Shelf(most=256, most_maps=SHELF.most_maps))
read_layers_jit = _jit(
    implied=_PARAMS, static_argnames=("network", "shape", "first", "count")
)(read_layers)
read_prompts_jit = _jit(implied=_PARAMS, static_argnames=("network", "shape", "first"))(
    read_prompts
)
read_questions_jit = _jit(implied=_PARAMS, static_argnames=("network", "shape"))(
    read_questions
)
empty_jit = _jit(implied=_PARAMS, static_argnames=("network", "shape"))(empty)
insert_jit = _jit(static_argnames=(), donate_argnames="rows")(insert)
advance_jit = _jit(
    implied=_PARAMS,
    static_argnames=("network", "shape", "most", "fixed"),
    donate_argnames="rows",
)(advance)
