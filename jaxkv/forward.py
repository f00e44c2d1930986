"""The ways through the network: a prompt, more of it, one token after it.

All bind `attend` to a layer's state, and know nothing of how a token is chosen.

Axis letters: `B` batch, `P` padded prompt, `T` prompt and pseudo tokens, padded, `N`
tokens behind it, `V` vocabulary, `D` hidden size.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv import trees
from jaxkv.attention import (
    Network,
    attend_cache,
    attend_tree,
    begin_layers,
)
from jaxkv.expected import brief, check_array
from jaxkv.inputs import (
    check_prompts,
    check_sketch,
    check_static,
    empty_for,
    read_inputs,
    sketches,
)
from jaxkv.kernels import decode, dispatch, tree_attention
from jaxkv.options import Options
from jaxkv.policies import contract
from jaxkv.policies.full import Full
from jaxkv.sketching import attend_behind, by_rows, decode_greedily, hold
from jaxkv.state import Cache, KVState


def prefill(
    network: Network,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    options: Options,
    slots: int | tuple[int, ...],
    keep: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """Run prompts through the network and keep what the policy keeps.

    Args:
      network: static.
      params: its parameters.
      tokens: int32 `[B, P]`, right-padded.
      lengths: int32 `[B]`, at least 1.
      options: static.
      slots: of the state of every layer without a window, or of each layer's.
      keep: int32 `[B]`, tokens that each row may keep of its prompt, at most
        `options.prompt_budget`; other numbers compile nothing. None is that bound.

    Returns:
      Logits of the token after each prompt, float32 `[B, V]`, and the cache.

    Raises:
      ValueError: `keep` without `options.budget`, or an argument of another kind.
    """
    hidden, cache = read(
        network, params, tokens, lengths, options=options, slots=slots, keep=keep
    )
    return logits_at_end(network, params, hidden, lengths), cache


def read(
    network: Network,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    options: Options,
    slots: int | tuple[int, ...],
    keep: jax.Array | None,
    held: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """Run prompts through the network, as `prefill` does, and choose no token.

    They pass once, also where the policy `sketches`: then all layers' keys and values
    are held until the sketch is there, and its tokens pass behind them.

    Args:
      network: static.
      params: its parameters.
      tokens: int32 `[B, P]`, right-padded.
      lengths: int32 `[B]`, at least 1.
      options: static.
      slots: see `prefill`.
      keep: see `prefill`.
      held: int32 `[B]`, how many of each prompt's first tokens may be kept; None is
        all. The others are a question: they score, and do not enter the cache.

    Returns:
      Hidden states of all positions, `[B, T, D]`, and the cache. Behind the prompts'
      `P` positions may stand those of pseudo tokens.

    Raises:
      ValueError: `keep` without `options.budget`, or a policy that sketches and asks
        for no sketch, or the other way round.
    """
    check_prompts(network, params, tokens, lengths, options, slots, keep)
    given = network, params, tokens, lengths, options, slots, keep, held
    if sketches(options):
        hidden, cache, _ = _read_and_sketch(*given)
    else:
        hidden, cache = network.apply({"params": params}, *read_inputs(*given))
    return hidden, begin_layers(options.decode, network, params, cache, lengths)


def read_part(
    network: Network,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    carried: Any,
    *,
    options: Options,
    slots: tuple[int, ...],
    keep: jax.Array | None,
    first: int,
    count: int,
) -> tuple[Any, Cache]:
    """Run prompts through some of the layers; other arguments are those of `read`.

    A policy sees a layer's whole prompt and no other layer's, so that this is where a
    prompt may be read in parts, whatever the policy.

    Args:
      network: static.
      params: its parameters.
      tokens: int32 `[B, P]`, right-padded.
      lengths: int32 `[B]`, at least 1.
      carried: what the call for the layers before returned; None for the first.
      options: static.
      slots: of each layer's state.
      keep: see `prefill`.
      first: of the layers, static.
      count: how many, static.

    Returns:
      What the next part takes, behind the last layer the hidden states of all
      positions; and the states of these layers, which the decode policy has not begun.

    Raises:
      ValueError: the prefill policy `sketches`, for which a prompt is read whole.
    """
    check_prompts(network, params, tokens, lengths, options, slots, keep)
    if sketches(options):
        raise ValueError(
            f"read_part: {type(options.prefill).__name__} decodes a sketch from the "
            "whole prompt before it evicts, got some of the layers; use read."
        )
    inputs = read_inputs(network, params, tokens, lengths, options, slots, keep, None)
    tokens, positions, empty, attend = inputs
    layers = empty[first : first + count]
    given = (tokens, positions, layers, attend, carried, first)
    return network.apply({"params": params}, *given)


def logits_at_end(
    network: Network, params: Any, hidden: jax.Array, lengths: jax.Array
) -> jax.Array:
    """Return the logits of the token after each prompt.

    Args:
      network: static.
      params: its parameters.
      hidden: `[B, T, D]`, from `read`.
      lengths: int32 `[B]`, tokens of the prompts.

    Returns:
      Float32 logits `[B, V]`.
    """
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return network.apply({"params": params}, last, method="unembed")


def _read_and_sketch(network, params, tokens, lengths, options, slots, keep, held):
    """Read prompts for a policy that sketches; return what `_hold` does."""
    policy, found = options.prefill, None

    def sketch(other, steps):
        nonlocal found
        check_sketch(policy, other, steps)
        how = dataclasses.replace(
            options, budget=options.prompt_budget, prefill=other, decode=Full()
        )
        room = how.layer_slots(tokens.shape[1], steps, network.config.windows)
        found = _hold(network, params, tokens, lengths, how, room, keep, None)
        hidden, cache, _ = found
        logits = logits_at_end(network, params, hidden, lengths)
        return _sketcher(network, how, steps)(params, (logits, lengths, cache))

    pseudo = contract.pseudo_tokens(
        policy,
        tokens,
        lengths,
        vocab_size=network.config.vocab_size,
        sketch=sketch,
    )
    if found is None:
        raise ValueError(
            f"{type(policy).__name__}.pseudo_tokens must ask for a sketch where its "
            "sketches is True, got none; call sketch, or set it to False."
        )
    hidden, _, whole = found
    evict = _evicter(network, options, slots)
    cache = evict((params, whole), (pseudo, lengths, keep, held))
    return hidden, cache, whole


def _hold(network, params, tokens, lengths, options, slots, keep, held):
    """Return hidden states, states, and each layer's keys and values of all prompts."""
    given = network, params, tokens, lengths, options, slots, keep, held
    if sketches(options):
        return _read_and_sketch(*given)
    *inputs, attend = read_inputs(*given)
    attend = hold(attend, tokens.shape[1])
    hidden, layers = network.apply({"params": params}, *inputs, attend)
    whole = tuple((layer.keys, layer.values) for layer in layers)
    return hidden, tuple(layer.state for layer in layers), whole


def _sketcher(network, options, steps) -> Callable[[Any, Any], jax.Array]:
    """Return what decodes sketches greedily; see `policies.base.Sketch`."""

    def run(params, rows):
        def step(*token):
            return decode_step(network, params, *token, options=options)

        return decode_greedily(step, *rows, steps=steps)

    return by_rows(run)


def _evicter(network, options, slots) -> Callable[[Any, Any], Cache]:
    """Return what runs pseudo tokens behind prompts that are held, and evicts these."""

    def run(common, rows):
        params, whole = common
        pseudo, lengths, keep, held = rows
        candidates = lengths if held is None else held
        empty = empty_for(network, params, candidates, options, slots, keep)
        attend = attend_behind(
            options.prefill,
            lengths=lengths,
            held=held,
            scores_implementation=options.scores_implementation,
        )
        start = jnp.maximum(lengths + options.prefill.offset, 0)[:, None]
        positions = start + jnp.arange(pseudo.shape[1], dtype=jnp.int32)[None]
        layers = tuple((e, *kv) for e, kv in zip(empty, whole, strict=True))
        _, cache = network.apply({"params": params}, pseudo, positions, layers, attend)
        return cache

    return by_rows(run)


def read_behind(
    network: Network,
    params: Any,
    tokens: jax.Array,
    counts: jax.Array,
    position: jax.Array,
    cache: Cache,
    *,
    implementation: decode.Implementation | None = None,
    block: int = 32,
) -> tuple[jax.Array, Cache]:
    """Run more tokens through the network, behind what a cache holds; all are kept.

    They pass as chains of drafts do that are all accepted: `block` tokens at a time.

    Args:
      network: static.
      params: its parameters.
      tokens: int32 `[B, N]`, right-padded.
      counts: int32 `[B]`; the other tokens are padding. 0 leaves a row as it is.
      position: int32 `[B]`, of the first of them.
      cache: one state per layer, with a free slot for each token from `target` on.
      implementation: of `decode_step`; what goes with it is used.
      block: the most tokens that pass together, static.

    Returns:
      Hidden states, `[B, N, D]`, of which padding means nothing, and the cache.
    """
    batch, number = tokens.shape
    # No token of a block may push another of it out of a window.
    block = min(block, number, *(state.window or block for state in cache))
    tokens = jnp.pad(tokens, ((0, 0), (0, -number % block)))
    order = jnp.broadcast_to(jnp.arange(block, dtype=jnp.int32), (batch, block))
    above = order[:, :, None] >= order[:, None]
    how = dispatch.counterpart(implementation, tree_attention.Implementation)

    def step(index, carry):
        hidden, cache = carry
        first = index * block
        count = jnp.clip(counts - first, 0, block)
        at = jnp.where(count > 0, position + first, -1)
        given = jax.lax.dynamic_slice_in_dim(tokens, first, block, axis=1)
        attend = attend_tree(
            Full(),
            position=at,
            drafts=trees.chain(given),
            ancestors=above,
            depth=block - 1,
            implementation=implementation,
        )
        positions = jnp.maximum(at, 0)[:, None] + order
        seen, pending = network.apply(
            {"params": params}, given, positions, cache, attend
        )
        cache = tuple(
            trees.commit(state, layer, order, count, at, implementation=how)
            for state, layer in zip(cache, pending, strict=True)
        )
        return jax.lax.dynamic_update_slice_in_dim(hidden, seen, first, axis=1), cache

    width = params["embedding"].shape[1]
    hidden = jnp.zeros((*tokens.shape, width), params["embedding"].dtype)
    blocks = (counts.max() + block - 1) // block
    hidden, cache = jax.lax.fori_loop(jnp.int32(0), blocks, step, (hidden, cache))
    return hidden[:, :number], cache


def decode_step(
    network: Network,
    params: Any,
    token: jax.Array,
    position: jax.Array,
    cache: Cache,
    *,
    options: Options,
) -> tuple[jax.Array, Cache]:
    """Feed one token per row and return the logits of the next.

    Args:
      network: static.
      params: its parameters.
      token: int32 `[B]`.
      position: int32 `[B]`; -1 for rows that have finished: their state is unchanged
        and their logits mean nothing.
      cache: one state per layer.
      options: static.

    Returns:
      Float32 logits `[B, V]` and the new cache.

    Raises:
      ValueError: an argument is of another kind.
    """
    check_static("decode_step", network, params, options)
    check_array("decode_step", "token", token, "B")
    check_array("decode_step", "position", position, "B")
    if not isinstance(cache, tuple) or not all(isinstance(s, KVState) for s in cache):
        raise ValueError(
            "decode_step: cache= takes a tuple with a KVState for each layer, as "
            f"jaxkv.prefill returns, got {brief(cache)}."
        )
    attend = attend_cache(
        options.decode,
        position=position,
        implementation=options.decode_implementation,
    )
    hidden, cache = network.apply(
        {"params": params},
        jnp.maximum(token, 0)[:, None],
        jnp.maximum(position, 0)[:, None],
        cache,
        attend,
    )
    return network.apply({"params": params}, hidden[:, 0], method="unembed"), cache
