"""How likely given tokens are behind documents: candidates, weighed against each other.

Axis letters: `B` rows, `Q` padded candidate, `V` vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkv.attention import Network
from jaxkv.contexts.context import Context, begun, drawn
from jaxkv.contexts.sharing import Layers
from jaxkv.forward import read_behind
from jaxkv.given import feed, in_blocks
from jaxkv.options import Options
from jaxkv.runtime.programs import bounded_jit


class Likelihoods(NamedTuple):
    """How likely given tokens are behind documents.

    Attributes:
      logprobs: float32 `[B, Q]`, the logarithm of each token's probability, in nats; 0
        beyond a row's tokens.
      likeliest: bool `[B, Q]`, whether none was likelier in its place.
    """

    logprobs: jax.Array
    likeliest: jax.Array


def weigh(
    network: Network,
    params: Any,
    context: Context,
    documents: jax.Array,
    tokens: jax.Array,
    counts: jax.Array,
    *,
    options: Options,
    slots: tuple[int, ...],
    chunk: int = 64,
    shared: Layers | None = None,
) -> Likelihoods:
    """Return how likely given tokens are behind documents.

    They are read at once or, if the decode policy evicts, fed one by one.

    Args:
      network: static.
      params: its parameters.
      context: of this network.
      documents: int32 `[B]`, which one each row follows.
      tokens: int32 `[B, Q]`, right-padded.
      counts: int32 `[B]`, at least 1.
      options: static.
      slots: see `ask`.
      chunk: tokens whose logits exist at a time, in each row, static.
      shared: see `ask`.
    """
    chosen = drawn(context, documents, slots, shared)
    where = (*(network, params, tokens, counts, chosen.lengths),)
    if not in_blocks(options.decode, chosen.cache):
        cache = begun(options.decode, network, params, chosen.cache, chosen.lengths)
        fed = feed(*where, chosen.logits, cache, options=options)
        return Likelihoods(fed.log_probs, fed.likeliest)
    hidden, _ = read_behind(
        *(*where, chosen.cache), implementation=options.decode_implementation
    )

    number = tokens.shape[1]
    rest = chances(network, params, hidden[:, :-1], tokens[:, 1:], chunk=chunk)
    first = _chances(chosen.logits[:, None], tokens[:, :1])
    found = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, rest)
    real = jnp.arange(number, dtype=jnp.int32)[None] < counts[:, None]
    return Likelihoods(jnp.where(real, found.logprobs, 0.0), found.likeliest & real)


def chances(
    network: Network, params: Any, hidden: jax.Array, ids: jax.Array, *, chunk: int = 64
) -> Likelihoods:
    """Return how likely tokens are by the hidden states that they were chosen from.

    Args:
      network: static.
      params: its parameters.
      hidden: `[B, N, D]`.
      ids: int32 `[B, N]`.
      chunk: tokens whose logits exist at a time, in each row, static.
    """
    batch, number = ids.shape
    size = max(1, min(chunk, number))
    parts = tuple(
        jnp.pad(x, ((0, 0), (0, -number % size)) + ((0, 0),) * (x.ndim - 2))
        .reshape(batch, -1, size, *x.shape[2:])
        .swapaxes(0, 1)
        for x in (hidden, ids)
    )

    def of(part):
        states, tokens = part
        logits = network.apply({"params": params}, states, method="unembed")
        return _chances(logits, tokens)

    return jax.tree.map(
        lambda x: x.swapaxes(0, 1).reshape(batch, -1)[:, :number],
        jax.lax.map(of, parts),
    )


def _chances(logits, ids):
    """Return the likelihoods of tokens `[B, N]` by what they were chosen from."""
    chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    total = jax.nn.logsumexp(logits, axis=-1)
    return Likelihoods(chosen - total, chosen >= logits.max(-1))


weigh_jit = bounded_jit(
    implied=("params",), static_argnames=("network", "options", "slots", "chunk")
)(weigh)
