"""Reading a prompt once for a policy that sketches: what is held, and evicted behind.

The sketch is decoded from an eviction, while the whole prompt is held beside it. Then
the sketched tokens alone run through the network, behind the prompt that is held, and
the policy evicts by their queries.

Axis letters: `B` batch, `P` padded prompt, `T` prompt and pseudo tokens, padded, `N`
pseudo tokens, `K` key/value heads, `H` head size, `V` vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.attention import Attend, evict, with_room
from jaxkv.kernels import prefill, window_scores
from jaxkv.kernels.weighing import scale_of
from jaxkv.policies.base import PrefillPolicy
from jaxkv.state import KVState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldLayer:
    """What an eviction has left of a layer's prompts, and the whole of them.

    Attributes:
      state: filled.
      keys: `[B, P, K, H]`, rotated; padding means nothing.
      values: `[B, P, K, H]`.
    """

    state: KVState
    keys: jax.Array
    values: jax.Array


def hold(attend: Attend, length: int) -> Attend:
    """Return an attention over prompts that gives a `HeldLayer` in place of a state.

    Args:
      attend: of `attend_prompt`.
      length: `P`; pseudo tokens beyond are not held.
    """

    def attend_and_hold(q, k, v, layer, weighing):
        out, state = attend(q, k, v, layer, weighing)
        return out, HeldLayer(state=state, keys=k[:, :length], values=v[:, :length])

    return attend_and_hold


def attend_behind(
    policy: PrefillPolicy,
    *,
    lengths: jax.Array,
    held: jax.Array | None = None,
    scores_implementation: window_scores.Implementation | None = None,
) -> Attend:
    """Attend from pseudo tokens alone to prompts that are held, then evict.

    That computes what `attend_prompt` does for prompts with these tokens behind them,
    but for the prompts' own queries: the policy sees zeros.

    Args:
      policy: what of the prompt the state keeps.
      lengths: int32 `[B]`.
      held: see `attend_prompt`.
      scores_implementation: of `window_scores`.

    Returns:
      An `attend` that takes queries, keys and values of the pseudo tokens, and an
      `EmptyLayer` beside keys and values of a `HeldLayer`, which may have fewer rows:
      they repeat in turn. It gives a state.
    """

    def attend(q, k, v, given, weighing):
        layer, *whole = given
        length = with_room(whole[0].shape[1], k.shape[1])

        def behind(whole, more):
            room = ((0, 0), (0, length - whole.shape[1]), (0, 0), (0, 0))
            whole = jnp.tile(jnp.pad(whole, room), (len(more) // len(whole), 1, 1, 1))
            return prefill.put_behind(whole, more, lengths)

        keys, values = map(behind, whole, (k, v))
        out = prefill.attention_behind(
            *(q, keys, values, lengths),
            scale=scale_of(q),
            window=weighing.window,
            **weighing.softmax,
        )
        return evict(
            *(out, policy, behind(jnp.zeros_like(q[:, :0]), q), keys, values),
            *(layer, weighing),
            lengths=lengths,
            held=held,
            implementation=scores_implementation,
        )

    return attend


def decode_greedily(
    step: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
    logits: jax.Array,
    lengths: jax.Array,
    cache: Any,
    *,
    steps: int,
) -> jax.Array:
    """Return the likeliest token behind prompts, the one behind it, and so on.

    Args:
      step: from token and position, int32 `[B]`, and the cache to logits `[B, V]` and
        the next cache.
      logits: `[B, V]`, of the first token.
      lengths: int32 `[B]`, its position.
      cache: with room for the others.
      steps: how many tokens.

    Returns:
      Int32 `[B, steps]`.
    """

    def likeliest(logits):
        return logits.argmax(-1).astype(jnp.int32)

    def turn(carry, position):
        token, cache = carry
        logits, cache = step(token, position, cache)
        token = likeliest(logits)
        return (token, cache), token

    first = likeliest(logits)
    positions = lengths[None] + jnp.arange(steps - 1, dtype=jnp.int32)[:, None]
    _, rest = jax.lax.scan(turn, (first, cache), positions)
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def by_rows(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return a function of rows that does what `jax.vmap` maps as more of its rows.

    Kernels know no `vmap`, and many rows cost less than one row many times.

    Args:
      function: of what all rows have in common, such as weights, and of arrays with an
        axis of rows in front, as all of its results have. It is given more rows, and
        in common what there was: where that has rows as well, they repeat in turn.
    """
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(size, batched, common, rows):
        def fold(x, batched):
            x = x if batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        if any(jax.tree.leaves(batched[0])):  # nothing in common: one after the other
            out = jax.lax.map(
                lambda index: mapped(
                    *jax.tree.map(
                        lambda x, own: x[index] if own else x, [common, rows], batched
                    )
                ),
                jnp.arange(size, dtype=jnp.int32),
            )
        else:
            out = mapped(common, jax.tree.map(fold, rows, batched[1]))
            out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return mapped
