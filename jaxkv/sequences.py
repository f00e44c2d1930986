"""Sequences that are being generated: what the loop carries, and how it grows.

Axis letters: `B` batch, `V` vocabulary, `O` output buffer, `N` new tokens, `E` stop
ids.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxkv.expected import brief as told
from jaxkv.expected import check_array
from jaxkv.kernels.per_shard import everywhere
from jaxkv.shown import brief
from jaxkv.state import Cache

Drafts = TypeVar("Drafts", covariant=True)


class LogProbs(NamedTuple):
    """How likely the network held the tokens of outputs, whatever the sampler did.

    Attributes:
      chosen: float32 `[B, O]`, the logarithm of each token's probability, in nats.
      tokens: int32 `[B, O, A]`, the likeliest tokens in its place, the likeliest first.
      values: float32 `[B, O, A]`, theirs.
    """

    chosen: jax.Array
    tokens: jax.Array
    values: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation(Generic[Drafts]):
    """A batch of sequences in the middle of being generated: the loop's carry.

    Attributes:
      tokens: int32 `[B, O]`, the output so far, a stop id included; -1 beyond it.
      lengths: int32 `[B]`, tokens of the output so far.
      done: bool `[B]`, rows that ended by a stop id.
      finite: bool `[B]`, rows whose logits were numbers so far. The others go no
        further: what would be chosen from NaN or infinity means nothing.
      last: int32 `[B]`, the newest token, which the cache does not hold yet.
      position: int32 `[B]`, the newest token's position.
      cache: one state per layer.
      rngs: PRNG keys `[B]`, one per row; a token's key is the row's, folded with the
        token's position, so what a row gets depends on no other row.
      seen: bool `[B, V]` for the repetition penalty, or None if it is off.
      speculation: what drafting carries along, a pytree of its own (see
        `speculation.loop.Speculation`); None without drafts.
      logprobs: of the output so far; None if nobody asked.
    """

    tokens: jax.Array
    lengths: jax.Array
    done: jax.Array
    finite: jax.Array
    last: jax.Array
    position: jax.Array
    cache: Cache
    rngs: jax.Array
    seen: jax.Array | None
    speculation: Drafts
    logprobs: LogProbs | None = None

    __repr__ = brief


def append(
    g: Generation[Drafts],
    new: jax.Array,
    count: jax.Array,
    stop_ids: jax.Array,
    logits: Callable[[], jax.Array] | None = None,
) -> Generation[Drafts]:
    """Append the first `count` of the new tokens to each row's output.

    Args:
      g: the sequences. What speculation carries along stays as it is.
      new: int32 `[B, N]`; one for a plain step, a path for a step with drafts.
      count: int32 `[B]`, at most `N`; 0 leaves a row as it is. A stop id among these
        tokens must be the last one.
      stop_ids: int32 `[E]`, or `[B, E]`, of each row.
      logits: returns what the new tokens were chosen from, float32 `[B, N, V]`; called
        if their log-probabilities are noted.

    Returns:
      The sequences after these tokens.
    """
    rows = jnp.arange(new.shape[0], dtype=jnp.int32)[:, None]
    order = jnp.arange(new.shape[1], dtype=jnp.int32)[None]
    added = order < count[:, None]
    # One token at most is the last one, so that a sum looks it up.
    last = jnp.where(order == count[:, None] - 1, new, 0).sum(1, dtype=jnp.int32)
    return dataclasses.replace(
        g,
        tokens=write(g.tokens, new, g.lengths, count),
        lengths=g.lengths + count,
        done=g.done | (added & is_stop(new, stop_ids)).any(1),
        last=jnp.where(count > 0, last, g.last),
        position=g.position + count,
        seen=None if g.seen is None else g.seen.at[rows, new].max(added),
        logprobs=None
        if g.logprobs is None or logits is None
        else _noted(g.logprobs, logits(), new, g.lengths, count),
    )


def readable(g: Generation[Drafts]) -> Generation[Drafts]:
    """Let every host have all of a generation but its cache, and what is as large."""
    whole = everywhere(dataclasses.replace(g, cache=(), seen=None))
    return dataclasses.replace(whole, cache=g.cache, seen=g.seen)


def no_logprobs(batch: int, most: int, alternatives: int | None) -> LogProbs | None:
    """Return room for `most` tokens of each of `batch` outputs, or None for None."""
    if alternatives is None:
        return None
    shape = (batch, most)
    return LogProbs(
        chosen=jnp.zeros(shape, jnp.float32),
        tokens=jnp.zeros((*shape, alternatives), jnp.int32),
        values=jnp.zeros((*shape, alternatives), jnp.float32),
    )


def _noted(noted, logits, new, start, count):
    """Write the log-probabilities of new tokens behind those that are there."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    values, tokens = jax.lax.top_k(logprobs, noted.tokens.shape[-1])
    chosen = jnp.take_along_axis(logprobs, new[..., None], axis=-1)[..., 0]
    found = LogProbs(chosen, tokens.astype(jnp.int32), values)
    return jax.tree.map(lambda old, x: write(old, x, start, count), noted, found)


def write(
    buffer: jax.Array, new: jax.Array, start: jax.Array, count: jax.Array
) -> jax.Array:
    """Write the first `count` of the new tokens into each row, from `start` on.

    Args:
      buffer: `[B, O, ...]`.
      new: `[B, N, ...]`.
      start: int32 `[B]`.
      count: int32 `[B]`.

    Returns:
      The buffer; what would lie beyond its end is dropped.
    """
    order = jnp.arange(new.shape[1], dtype=jnp.int32)[None]
    beyond = buffer.shape[1]
    index = jnp.where(order < count[:, None], start[:, None] + order, beyond)
    # Row by row, as devices that share out the rows can do it.
    return jax.vmap(lambda row, at, x: row.at[at].set(x, mode="drop"))(
        buffer, index, new
    )


def is_stop(tokens: jax.Array, stop_ids: jax.Array) -> jax.Array:
    """Return which of the tokens `[B, N]` are stop ids, `[E]` or `[B, E]`; bool."""
    of_rows = stop_ids if stop_ids.ndim == 2 else stop_ids[None]
    return (tokens[:, :, None] == of_rows[:, None]).any(-1)


def alternatives(noted: LogProbs, lengths: Sequence[int]) -> Any:
    """Return the likeliest tokens in place of each one, None where none were noted."""
    if not noted.tokens.shape[-1]:
        return None
    rows = zip(noted.tokens.tolist(), noted.values.tolist(), lengths, strict=True)
    return tuple(
        tuple(
            dict(zip(*one, strict=True))
            for one in zip(tokens[:length], values[:length], strict=True)
        )
        for tokens, values, length in rows
    )


def check_ends(keys: Any, stop_ids: Any, max_new_tokens: Any, max_out: Any) -> None:
    """Raise ValueError for arguments of `generate_tokens` that are of another kind.

    Args:
      keys: PRNG keys `[B]`.
      stop_ids: int32 `[E]`, or `[B, E]`.
      max_new_tokens: int32 scalar, or `[B]`.
      max_out: the size of the output buffer.
    """
    dtype = getattr(keys, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key) or keys.ndim < 1:
        raise ValueError(
            "generate_tokens: keys= takes a PRNG key for each row, such as "
            f"jax.random.split(jax.random.key(0), rows), got {told(keys)}."
        )
    check_array("generate_tokens", "stop_ids", stop_ids, "E", "B E")
    if not isinstance(max_new_tokens, int):
        check_array("generate_tokens", "max_new_tokens", max_new_tokens, "", "B")
    if not isinstance(max_out, int) or max_out < 1:
        raise ValueError(
            "generate_tokens: max_out= takes a number of at least 1, got "
            f"{told(max_out)}."
        )
