"""The ways through the network: a prompt, more of it, one token after it.

All bind `attend` to a layer's state, and know nothing of how a token is chosen.

Axis letters: `B` batch, `P` padded prompt, `T` prompt and pseudo tokens, padded, `N`
tokens behind it, `V` vocabulary, `D` hidden size.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv import state as kv
from jaxkv import trees
from jaxkv.attention import (
    Network,
    append_tokens,
    attend_cache,
    attend_prompt,
    attend_tree,
    begin_layers,
    empty_layers,
)
from jaxkv.expected import brief, check_array, check_kind
from jaxkv.kernels import decode, dispatch, tree_attention
from jaxkv.options import Options
from jaxkv.policies import contract
from jaxkv.policies.full import Full
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
      ValueError: `keep` without `options.budget`.
    """
    inputs = _inputs(network, params, tokens, lengths, options, slots, keep, held)
    hidden, cache = network.apply({"params": params}, *inputs)
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
      options: static; a prefill policy that `sketches` would do so for each part.
      slots: of each layer's state.
      keep: see `prefill`.
      first: of the layers, static.
      count: how many, static.

    Returns:
      What the next part takes, behind the last layer the hidden states of all
      positions; and the states of these layers, which the decode policy has not begun.
    """
    inputs = _inputs(network, params, tokens, lengths, options, slots, keep, None)
    tokens, positions, empty, attend = inputs
    layers = empty[first : first + count]
    given = (tokens, positions, layers, attend, carried, first)
    return network.apply({"params": params}, *given)


def _inputs(network, params, tokens, lengths, options, slots, keep, held):
    """Return what a network reads prompts from: tokens, positions, layers, attend."""
    check_static("prefill", network, params, options)
    check_array("prefill", "tokens", tokens, "B P")
    check_array("prefill", "lengths", lengths, "B")
    layers = len(network.config.windows)
    each = (slots,) * layers if isinstance(slots, int) else slots
    if not isinstance(each, tuple) or len(each) != layers or not _sizes(each):
        raise ValueError(
            "prefill: slots= takes a number of at least 1, or a tuple of one for each "
            f"of the {layers} layers, got {brief(slots)}."
        )
    if keep is not None:
        check_array("prefill", "keep", keep, "B")
    if keep is not None and options.budget is None:
        raise ValueError(
            "prefill: keep= says how much of options.budget each row uses, but that "
            "is None; set Options(budget=), the most that any row may keep."
        )
    policy = Full() if options.budget is None else options.prefill
    pseudo = contract.pseudo_tokens(
        policy,
        tokens,
        lengths,
        vocab_size=network.config.vocab_size,
        sketch=lambda other, steps: _sketch(
            *(network, params, tokens, lengths, keep, options, other, steps)
        ),
    )
    tokens, positions = append_tokens(tokens, lengths, pseudo, offset=policy.offset)
    attend = attend_prompt(
        policy,
        lengths=lengths,
        held=held,
        implementation=options.prefill_implementation,
        scores_implementation=options.scores_implementation,
    )
    bound = options.prompt_budget
    if isinstance(slots, int):
        slots = kv.all_slots(network.config.windows, slots)
    empty = empty_layers(
        policy,
        network.config,
        lengths if held is None else held,
        slots=slots,
        bound=max(slots) if bound is None else bound,
        keep=keep,
        dtype=params["embedding"].dtype,
        frequencies=network.apply({"params": params}, method="frequencies"),
        outputs=network.apply({"params": params}, method="outputs")
        if getattr(policy, "reads_output", False)
        else None,
    )
    return tokens, positions, empty, attend


def check_static(call: str, network: Any, params: Any, options: Any) -> None:
    """Raise ValueError where what a program is traced for is of another kind.

    Args:
      call: the function that was called.
      network: has `config` and `apply`.
      params: its parameters.
      options: `Options`.
    """
    if not hasattr(network, "config") or not hasattr(network, "apply"):
        raise ValueError(
            f"{call}: network= takes a network, such as the model's lm.network, got "
            f"{brief(network)}."
        )
    # A network of one's own may have parameters of any structure.
    if not (leaves := jax.tree.leaves(params)) or not all(
        hasattr(leaf, "dtype") for leaf in leaves
    ):
        raise ValueError(
            f"{call}: params= takes the parameters of the network, such as lm.params, "
            f"got {brief(params)}."
        )
    check_kind(call, "options", options, Options, "jaxkv.Options()")


def _sizes(numbers: tuple[Any, ...]) -> bool:
    """Return whether all of these are numbers of slots."""
    return all(isinstance(x, int) and x >= 1 for x in numbers)


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


def _sketch(network, params, tokens, lengths, keep, options, policy, steps):
    """Decode greedily from an evicted prompt; see `policies.base.Sketch`."""
    options = dataclasses.replace(
        options, budget=options.prompt_budget, prefill=policy, decode=Full()
    )
    slots = options.layer_slots(tokens.shape[1], steps, network.config.windows)
    logits, cache = prefill(
        network, params, tokens, lengths, options=options, slots=slots, keep=keep
    )

    def step(carry, position):
        token, cache = carry
        logits, cache = decode_step(
            network, params, token, position, cache, options=options
        )
        token = logits.argmax(-1).astype(jnp.int32)
        return (token, cache), token

    first = logits.argmax(-1).astype(jnp.int32)
    positions = lengths[None] + jnp.arange(steps - 1, dtype=jnp.int32)[:, None]
    _, rest = jax.lax.scan(step, (first, cache), positions)
    return jnp.concatenate([first[:, None], rest.T], axis=1)


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
