"""What happens in a layer with a window, whatever policies do in the others.

Its state is a ring: the newest token overwrites the oldest, so that it holds exactly
the tokens that the layer attends to.
"""

import dataclasses

import jax.numpy as jnp

from jaxkv import state as kv
from jaxkv.policies.base import Prompt
from jaxkv.policies.streaming_llm import StreamingLLM
from jaxkv.state import KVState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring(StreamingLLM):
    """Keep the most recent tokens: `StreamingLLM` without sinks, of `keep` tokens."""

    n_sink: int = 0

    def compress(self, prompt: Prompt, state: KVState, *, budget: int) -> KVState:
        """Keep the last tokens, in order; the first slots hold a row that fits."""
        first = jnp.maximum(prompt.candidates - prompt.keep, 0)[:, None]
        order = jnp.arange(min(budget, prompt.keys.shape[1]), dtype=jnp.int32)
        index = first + order[None]
        last = jnp.minimum(first + prompt.keep[:, None], prompt.candidates[:, None])
        kept = jnp.where(index < last, index, kv.FREE)[:, None]
        shape = *state.target.shape, kept.shape[2]
        return kv.gather(
            *(state, prompt.keys, prompt.values), jnp.broadcast_to(kept, shape)
        )


RING = Ring()


def of_layer(policy, state: KVState):
    """Return what acts on a layer: the policy, or the ring where it has a window."""
    return policy if state.window is None else RING
