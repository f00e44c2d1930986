"""The attentions that a network can be run with: over a prompt, and over the cache.

Each is an `attend(q, k, v, state, weighing) -> (out, state)`, bound to a policy inside
a traced function; the network calls it once per layer and knows nothing else. In a
layer with a window `ring` acts in the policy's place.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxkv import state as kv
from jaxkv.kernels import decode, prefill, window_scores
from jaxkv.kernels.weighing import Weighing, scale_of
from jaxkv.policies import contract
from jaxkv.policies.base import DecodePolicy, PrefillPolicy, Prompt, Speculable
from jaxkv.ring import of_layer
from jaxkv.state import KVState
from jaxkv.trees import DraftTree

Attend = Callable[
    [jax.Array, jax.Array, jax.Array, Any, Weighing], tuple[jax.Array, Any]
]


class Network(Protocol):
    """What the loops ask of a network; `jaxkv.models.decoder.Decoder` is one.

    `config` has `num_heads`, `num_kv_heads`, `head_dim`, `vocab_size` and `windows`,
    how many tokens each layer attends to, None for all;
    applied to `(tokens, positions, cache, attend)` it returns hidden states and the new
    cache, or with `carried` and `first` what some of its layers make of a prompt (see
    `forward.read_part`); its method `unembed` turns hidden states into logits,
    `frequencies` gives those of each layer's rotation, and `outputs` each layer's
    output projection `[N, H, D]`. It hashes by value.
    """

    config: Any

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the network, as `flax.linen.Module.apply` does."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class EmptyLayer:
    """What prefill hands to a layer in place of its state: an empty one, and limits.

    Attributes:
      state: empty.
      keep: int32 `[B]`, tokens that this layer may keep of each row's prompt.
      frequencies: float32 `[H / 2]`, of the layer's rotation.
      bound: of `keep`, static; at most the slots of the state.
      output: `[N, H, D]`, the layer's output projection, for policies that read it.
    """

    state: KVState
    keep: jax.Array
    frequencies: jax.Array
    bound: int = dataclasses.field(metadata=dict(static=True))
    output: jax.Array | None = None


def empty_layers(
    policy: PrefillPolicy,
    config: Any,
    lengths: jax.Array,
    *,
    slots: tuple[int, ...],
    bound: int,
    keep: jax.Array | None,
    dtype: jax.typing.DTypeLike,
    frequencies: tuple[jax.Array, ...],
    outputs: tuple[jax.Array, ...] | None = None,
) -> tuple[EmptyLayer, ...]:
    """Return what prefill hands to each layer.

    Args:
      policy: says how layers share a budget, and which heads are stored. Layers with a
        window have no part in it.
      config: of the network; see `Network`.
      lengths: int32 `[B]`.
      slots: of each layer's state.
      bound: the most tokens that any row may keep of its prompt.
      keep: int32 `[B]`, what each row may keep; None is `bound`.
      dtype: of keys and values.
      frequencies: of each layer, see `EmptyLayer`.
      outputs: of each layer, see `EmptyLayer`.
    """
    if keep is None:
        keep = jnp.full(lengths.shape, bound, jnp.int32)
    windows = config.windows
    layers = windows.count(None)
    heads = policy.heads(config.num_heads, config.num_kv_heads)
    keeps = kv.by_window(
        windows,
        contract.layer_keeps(policy, keep, lengths, layers),
        lambda window: jnp.full(lengths.shape, window, jnp.int32),
    )
    bounds = kv.by_window(
        windows, contract.layer_budgets(policy, bound, layers), lambda window: window
    )
    return tuple(
        EmptyLayer(
            state=kv.init(
                batch=lengths.shape[0],
                kv_heads=heads if window is None else config.num_kv_heads,
                slots=size,
                head_dim=config.head_dim,
                dtype=dtype,
                window=window,
            ),
            keep=kept,
            frequencies=turn,
            bound=min(most, size),
            output=output,
        )
        for window, size, kept, most, turn, output in zip(
            *(windows, slots, keeps, bounds, frequencies),
            outputs or (None,) * len(slots),
            strict=True,
        )
    )


def begin_layers(
    policy: DecodePolicy,
    network: Network,
    params: Any,
    cache: tuple[KVState, ...],
    lengths: jax.Array,
) -> tuple[KVState, ...]:
    """Begin a decode policy in each layer's state.

    Args:
      policy: see `DecodePolicy.begin`.
      network: static.
      params: its parameters.
      cache: one state per layer, filled.
      lengths: int32 `[B]`, tokens of the prompts.
    """
    places: list[contract.Place | None] = [None] * len(cache)
    if hasattr(policy, "begin_at"):
        frequencies = network.apply({"params": params}, method="frequencies")
        heads = network.config.num_heads
        places = [
            contract.Place(layer, len(cache), heads, turn)
            for layer, turn in enumerate(frequencies)
        ]
    return tuple(
        contract.begin(of_layer(policy, state), state, lengths, place)
        for state, place in zip(cache, places, strict=True)
    )


def append_tokens(
    tokens: jax.Array, lengths: jax.Array, extra: jax.Array, *, offset: int
) -> tuple[jax.Array, jax.Array]:
    """Put pseudo tokens right behind each row's prompt, in place of its padding.

    So the plain causal mask serves ragged rows: no token of a prompt sees them, and
    they see their own row's prompt and each other.

    Args:
      tokens: int32 `[B, P]`, right-padded.
      lengths: int32 `[B]`.
      extra: int32 `[B, N]`; with `N = 0` the tokens stay as they are.
      offset: of the first one's position from the prompt's end; not before 0.

    Returns:
      Tokens and positions, int32 `[B, T]`, with `T` at least `P + N` and a multiple
      of what attention kernels like.
    """
    batch, length = tokens.shape
    count = extra.shape[1]
    total = with_room(length, count) if count else length
    index = jnp.broadcast_to(jnp.arange(total, dtype=jnp.int32), (batch, total))
    behind = index - lengths[:, None]
    start = jnp.maximum(lengths + offset, 0)[:, None]
    tokens = jnp.pad(tokens, ((0, 0), (0, total - length)))
    place = lengths[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    tokens = tokens.at[jnp.arange(batch, dtype=jnp.int32)[:, None], place].set(extra)
    return tokens, jnp.where(behind < 0, index, start + behind)


def with_room(length: int, count: int) -> int:
    """Return to what prompts are padded that so many pseudo tokens stand behind."""
    # Whole tiles: splash attention on TPUs takes no others.
    tile = 128 if jax.default_backend() == "tpu" else 64
    return -(-(length + count) // tile) * tile


def attend_prompt(
    policy: PrefillPolicy,
    *,
    lengths: jax.Array,
    held: jax.Array | None = None,
    implementation: prefill.Implementation | None = None,
    scores_implementation: window_scores.Implementation | None = None,
) -> Attend:
    """Attend causally over right-padded prompts, then evict inside the layer.

    Args:
      policy: what of the prompt the state keeps.
      lengths: int32 `[B]`.
      held: int32 `[B]`, how many of each prompt's first tokens may be kept; None is
        all.
      implementation: of `causal_attention`.
      scores_implementation: of `window_scores`.

    Returns:
      An `attend` that takes an `EmptyLayer` and gives a state. Only one layer's whole
      prompt exists at a time, because the policy runs before the next layer does.
    """

    def attend(q, k, v, layer, weighing):
        out = prefill.causal_attention(
            *(q, k, v),
            scale=scale_of(q),
            window=weighing.window,
            implementation=implementation,
            **weighing.softmax,
        )
        return evict(
            *(out, policy, q, k, v, layer, weighing),
            lengths=lengths,
            held=held,
            implementation=scores_implementation,
        )

    return attend


def evict(
    out: jax.Array,
    policy: PrefillPolicy,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    layer: EmptyLayer,
    weighing: Weighing,
    *,
    lengths: jax.Array,
    held: jax.Array | None,
    implementation: window_scores.Implementation | None,
) -> tuple[jax.Array, KVState]:
    """Return a layer's output, and what a policy keeps of its whole prompt.

    Args:
      out: of the layer's attention; what comes behind it waits for the state.
      policy: of the layers without a window.
      queries: see `Prompt`, and so are the next two.
      keys: see there.
      values: see there.
      layer: what is filled, and how far.
      weighing: of the layer's attention.
      lengths: int32 `[B]`.
      held: see `attend_prompt`.
      implementation: of `window_scores`.
    """
    prompt = Prompt(
        queries=queries,
        keys=keys,
        values=values,
        lengths=lengths,
        keep=layer.keep,
        frequencies=layer.frequencies,
        scale=scale_of(queries),
        implementation=implementation,
        held=held,
        output=layer.output,
        weighing=weighing,
    )
    keeper = of_layer(policy, layer.state)
    state = contract.compress(keeper, prompt, layer.state, budget=layer.bound)
    # Nothing before decoding waits for the state. Without the barrier the compiler may
    # put all evictions last, and hold every layer's whole prompt until then.
    return jax.lax.optimization_barrier((out, state))


def attend_cache(
    policy: DecodePolicy,
    *,
    position: jax.Array,
    implementation: decode.Implementation | None = None,
) -> Attend:
    """Write one token per row into the cache, attend over it, choose the next slot.

    Args:
      policy: how the token is attended from, and which slot the next one overwrites.
      position: int32 `[B]` of the token; -1 for rows that have finished and must not
        change.
      implementation: of `decode_attention`.

    Returns:
      An `attend` that takes queries, keys and values of one token.
    """

    def attend(q, k, v, state, weighing):
        k, v = (_for_heads(x[:, 0], state.keys.shape[1]) for x in (k, v))
        out, state = contract.attend(
            *(of_layer(policy, state), q[:, 0], k, v, state, position),
            weighing=weighing,
            implementation=implementation,
        )
        return out[:, None], state

    return attend


def attend_tree(
    policy: Speculable,
    *,
    position: jax.Array,
    drafts: DraftTree,
    ancestors: jax.Array,
    depth: int,
    implementation: decode.Implementation | None = None,
) -> Attend:
    """Attend from a tree of drafted tokens over the cache, which stays as it is.

    Args:
      policy: what the cache would forget on the way to each node.
      position: int32 `[B]` of the root; -1 for rows that have finished.
      drafts: the trees.
      ancestors: bool `[B, T, T]`.
      depth: of the deepest node that a tree may have, static.
      implementation: of plain decoding; the tree's own goes with it.

    Returns:
      An `attend` that takes queries, keys and values of all nodes, and gives a
      `trees.Pending` in place of the state. It raises ValueError where a path may be
      longer than a layer's window.
    """

    def attend(q, k, v, state, weighing):
        if state.window is not None and depth >= state.window:
            raise ValueError(
                f"a path of {depth + 1} drafted tokens does not fit into the window of "
                f"{state.window} tokens that layers of this network attend to; use "
                "shorter drafts."
            )
        heads = state.keys.shape[1]
        k, v = (jax.vmap(lambda x: _for_heads(x, heads), 1, 1)(x) for x in (k, v))
        return contract.attend_tree(
            *(of_layer(policy, state), q, k, v, state, position, drafts, ancestors),
            depth=depth,
            weighing=weighing,
            implementation=implementation,
        )

    return attend


def _for_heads(x, heads):
    """Repeat `[B, K, H]` for a state that holds one set of tokens per query head.

    Such a state is an analysis (`PrefillPolicy.heads`); all others hold `K` heads.
    """
    return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)
