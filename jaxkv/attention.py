"""The attentions that a network can be run with: over a prompt, and over the cache.

Each is an `attend(q, k, v, state) -> (out, state)`, bound to a policy inside a traced
function; the network calls it once per layer and knows nothing else.
"""

from collections.abc import Callable

import jax

from jaxkv.kernels import decode, prefill
from jaxkv.policies import DecodePolicy, PrefillPolicy, Prompt, Speculable
from jaxkv.state import KVState
from jaxkv.trees import DraftTree

Attend = Callable[[jax.Array, jax.Array, jax.Array, KVState], tuple[jax.Array, KVState]]


def attend_prompt(
    policy: PrefillPolicy,
    *,
    budget: int,
    lengths: jax.Array,
    implementation: prefill.Implementation | None = None,
) -> Attend:
    """Attend causally over right-padded prompts, then evict inside the layer.

    Args:
      policy: what of the prompt the state keeps.
      budget: tokens that it may keep.
      lengths: int32 `[B]`.
      implementation: of `causal_attention`.

    Returns:
      An `attend` that takes an empty state. Only one layer's whole prompt exists at a
      time, because the policy runs before the next layer does.
    """

    def attend(q, k, v, state):
        scale = q.shape[-1] ** -0.5
        out = prefill.causal_attention(
            q, k, v, scale=scale, implementation=implementation
        )
        prompt = Prompt(q, k.swapaxes(1, 2), v.swapaxes(1, 2), lengths)
        return out, policy.compress(prompt, state, budget=budget)

    return attend


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

    def attend(q, k, v, state):
        out, state = policy.attend(
            q[:, 0], k[:, 0], v[:, 0], state, position, implementation=implementation
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
) -> Attend:
    """Attend from a tree of drafted tokens over the cache, which stays as it is.

    Args:
      policy: what the cache would forget on the way to each node.
      position: int32 `[B]` of the root; -1 for rows that have finished.
      drafts: the trees.
      ancestors: bool `[B, T, T]`.
      depth: of the deepest node that a tree may have, static.

    Returns:
      An `attend` that takes queries, keys and values of all nodes, and gives a
      `trees.Pending` in place of the state.
    """

    def attend(q, k, v, state):
        return policy.verify(
            *(q, k, v, state, position, drafts, ancestors),
            depth=depth,
            implementation=None,
        )

    return attend
