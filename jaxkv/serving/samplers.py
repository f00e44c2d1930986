"""A sampler for each row, as arrays: other requests compile nothing.

Axis letters: `R` rows, `V` vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.sampling import Categorical, Greedy, Sampler

Kind = Literal["greedy", "drawn", "cut"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RowSamplers(Sampler):
    """`Greedy` or `Categorical` of each row, whose options are traced.

    A row draws what its own sampler would draw of the same logits and key.

    Attributes:
      temperature: float32 `[R]`; 0 is greedy.
      top_k: int32 `[R]`; 0 keeps all.
      top_p: float32 `[R]`.
      min_p: float32 `[R]`.
      penalties: float32 `[R]`, of repetition; None where no row may have one.
      kind: what the program does for all rows, static: "greedy" draws nothing, "drawn"
        cuts nothing. None asks the rows at each step, for which a GPU's host waits.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    penalties: Any = None
    kind: Kind | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def of(cls, samplers: Sequence[Greedy | Categorical], *, penalties: bool) -> Self:
        """Return samplers as NumPy's arrays.

        Args:
          samplers: of each row.
          penalties: whether to hold those of repetition.
        """

        def column(name: str, usual: float, dtype: Any) -> np.ndarray:
            return np.array([getattr(s, name, usual) for s in samplers], dtype)

        return cls(
            temperature=column("temperature", 0, np.float32),
            top_k=column("top_k", 0, np.int32),
            top_p=column("top_p", 1, np.float32),
            min_p=column("min_p", 0, np.float32),
            penalties=column("repetition_penalty", 1, np.float32)
            if penalties
            else None,
        )

    def needed(self) -> Kind:
        """Return the kind of program that these rows need; of NumPy's arrays."""
        draws = self.temperature > 0
        if not draws.any():
            return "greedy"
        return "cut" if self._cuts().any() else "drawn"

    def _cuts(self) -> Any:
        few = (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)
        return (self.temperature > 0) & few

    @property
    def repetition_penalty(self) -> Any:
        """Of each row, float32 `[R, 1]`, or 1.0."""
        return 1.0 if self.penalties is None else self.penalties[:, None]

    def check(self) -> None:
        """Accept everything: each request's sampler has been checked."""

    def pick(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """Return int32 tokens `[R]` of logits `[R, V]`, with one key per row.

        Where all rows are greedy nothing is drawn, and where none cuts nothing sorted.
        """
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        draws = self.temperature > 0

        def drawn(cut: Callable[[jax.Array], jax.Array]) -> jax.Array:
            warm = _tempered(logits, jnp.where(draws, self.temperature, 1)[:, None])
            return jax.vmap(jax.random.categorical)(keys, cut(warm)).astype(jnp.int32)

        def cut_if_any(warm: jax.Array) -> jax.Array:
            return jax.lax.cond(self._cuts().any(), self._cut, lambda x: x, warm)

        match self.kind:
            case "greedy":
                return best
            case "drawn":
                chosen = drawn(lambda x: x)
            case "cut":
                chosen = drawn(self._cut)
            case None:
                chosen = jax.lax.cond(
                    draws.any(), lambda: drawn(cut_if_any), lambda: best
                )
        return jnp.where(draws, chosen, best)

    def _cut(self, logits: jax.Array) -> jax.Array:
        """Return tempered logits `[R, V]` with dropped tokens at minus infinity."""
        order = jnp.argsort(logits, axis=-1, descending=True)
        ranked = jnp.take_along_axis(logits, order, axis=-1)
        most = jnp.where(self.top_k > 0, self.top_k, logits.shape[-1])
        last = jnp.minimum(most, logits.shape[-1])[:, None] - 1
        least = jnp.take_along_axis(ranked, last, axis=-1)
        ranked = jnp.where(ranked < least, -jnp.inf, ranked)
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        top_p = self.top_p[:, None]
        ranked = jnp.where((before >= top_p) & (top_p < 1), -jnp.inf, ranked)
        kept = jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)
        probabilities = jax.nn.softmax(kept, axis=-1)
        least = self.min_p[:, None] * probabilities.max(-1, keepdims=True)
        return jnp.where(probabilities < least, -jnp.inf, kept)


def _tempered(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """Return logits `[R, V]` over temperatures `[R, 1]`, as `Categorical.filter`."""
    highest = logits.max(-1, keepdims=True)
    fits = jnp.isfinite(highest / temperature)
    return jnp.where(fits, logits / temperature, (logits - highest) / temperature)
