"""Given tokens through the network, behind what a cache holds: one by one or in blocks.

Axis letters: `B` batch, `N` given tokens, `V` vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkv.attention import Network
from jaxkv.forward import decode_step, logits_at_end, read_behind
from jaxkv.options import Options
from jaxkv.policies.base import DecodePolicy
from jaxkv.state import Cache


class Fed(NamedTuple):
    """What the network made of given tokens.

    Attributes:
      log_probs: float32 `[B, N]`, the logarithm of each token's probability after all
        tokens before it, in nats; 0 beyond a row's tokens.
      likeliest: bool `[B, N]`, whether no token was likelier in its place.
      logits: float32 `[B, V]`, of the token after each row's last one.
      cache: one state per layer.
    """

    log_probs: jax.Array
    likeliest: jax.Array
    logits: jax.Array
    cache: Cache


def feed(
    network: Network,
    params: Any,
    tokens: jax.Array,
    counts: jax.Array,
    position: jax.Array,
    logits: jax.Array,
    cache: Cache,
    *,
    options: Options,
) -> Fed:
    """Feed given tokens one by one, whatever the network would have chosen.

    The decode policy evicts on the way, as it does while generating.

    Args:
      network: static.
      params: its parameters.
      tokens: int32 `[B, N]`.
      counts: int32 `[B]`, how many of a row's tokens to feed; the others are padding.
      position: int32 `[B]`, of the first of them.
      logits: float32 `[B, V]`, what the network expects there.
      cache: one state per layer.
      options: static.
    """

    batch, number = tokens.shape

    def step(order, fed):
        running = order < counts
        token = jax.lax.dynamic_index_in_dim(tokens, order, axis=1, keepdims=False)
        chosen = jnp.take_along_axis(fed.logits, token[:, None], axis=1)[:, 0]
        log_prob = chosen - jax.nn.logsumexp(fed.logits, axis=1)
        log_prob = jnp.where(running, log_prob, 0.0)[:, None]
        best = (running & (chosen >= fed.logits.max(1)))[:, None]
        logits, cache = decode_step(
            *(network, params, token, jnp.where(running, position + order, -1)),
            fed.cache,
            options=options,
        )
        return Fed(
            jax.lax.dynamic_update_slice_in_dim(fed.log_probs, log_prob, order, axis=1),
            jax.lax.dynamic_update_slice_in_dim(fed.likeliest, best, order, axis=1),
            jnp.where(running[:, None], logits, fed.logits),
            cache,
        )

    none = jnp.zeros((batch, number), jnp.float32)
    begun = Fed(none, none > 0, logits, cache)
    # As many steps as there are tokens, not as the buffer is wide.
    steps = jnp.minimum(counts.max(), number)
    return jax.lax.fori_loop(jnp.int32(0), steps, step, begun)


def in_blocks(policy: DecodePolicy, cache: Cache) -> bool:
    """Return whether given tokens may pass in blocks, instead of one by one.

    They may where the policy overwrites nothing on the way, and its memory, which only
    its own `attend` can bring up to date, is empty.
    """
    return not policy.evicts and not jax.tree.leaves([s.memory for s in cache])


def feed_on(
    network: Network,
    params: Any,
    tokens: jax.Array,
    counts: jax.Array,
    position: jax.Array,
    cache: Cache,
    *,
    options: Options,
) -> tuple[jax.Array, Cache]:
    """Feed given tokens, in blocks where the decode policy evicts nothing on the way.

    Args:
      network: static.
      params: its parameters.
      tokens: int32 `[B, N]`.
      counts: int32 `[B]`, at least 1; the other tokens are padding.
      position: int32 `[B]`, of the first of them.
      cache: one state per layer.
      options: static.

    Returns:
      Float32 logits `[B, V]` of the token after each row's last one, and the cache.
    """
    given = (network, params, tokens, counts, position)
    if in_blocks(options.decode, cache):
        how = options.decode_implementation
        hidden, cache = read_behind(*given, cache, implementation=how)
        return logits_at_end(network, params, hidden, counts), cache
    unknown = jnp.zeros((len(tokens), network.config.vocab_size), jnp.float32)
    fed = feed(*given, unknown, cache, options=options)
    return fed.logits, fed.cache
