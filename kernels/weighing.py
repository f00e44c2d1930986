"""What a layer's attention does beside scaling its logits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighing:
    """How a layer weighs tokens, beside the scale of its logits.

    Attributes:
      window: how many tokens each token attends to, itself the last; None is all.
      sink: float `[N]`, of each head, a logit beside those of the tokens, whose weight
        goes nowhere (gpt-oss); None is none.
      cap: bound of the logits, `cap * tanh(logits / cap)` (Gemma 2); None is none.
    """

    window: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    sink: jax.Array | None = None
    cap: float | None = dataclasses.field(default=None, metadata=dict(static=True))

    @property
    def softmax(self) -> dict[str, Any]:
        """What is not usual about the softmax, as operations take it."""
        found = dict(sink=self.sink, cap=self.cap)
        return {name: x for name, x in found.items() if x is not None}


PLAIN = Weighing()


def capped(logits: jax.Array, cap: float | None) -> jax.Array:
    """Return logits bounded by `cap`, smoothly; None leaves them as they are."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def scale_of(queries: jax.Array) -> float:
    """Return what the logits of these queries `[..., H]` are multiplied by."""
    return queries.shape[-1] ** -0.5
