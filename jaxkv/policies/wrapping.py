"""What policies share that choose by another policy's scores."""

import dataclasses

import jax

from jaxkv.fields import check_types
from jaxkv.policies.base import Prompt, Ranking, Sketch, WholePrompt
from jaxkv.policies.snapkv import SnapKV


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrapper(WholePrompt):
    """Answers as the policy does that it is around.

    Attributes:
      policy: any policy of the prompt that scores tokens.
    """

    policy: WholePrompt = SnapKV()

    def check(self, budget: int) -> None:
        """Ask the policy within."""
        name = type(self).__name__
        if not isinstance(self.policy, WholePrompt) or not self.policy.chooses:
            raise ValueError(
                f"{name}: policy takes one of the prompt that scores tokens, such as "
                f"SnapKV(), got {self.policy!r}."
            )
        try:
            check_types(self.policy)
            self.policy.check(budget)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    @property
    def num_pseudo(self) -> int:
        """Those of the policy within."""
        return self.policy.num_pseudo

    @property
    def offset(self) -> int:  # type: ignore[override]
        """That of the policy within."""
        return self.policy.offset

    @property
    def same_budgets(self) -> bool:  # type: ignore[override]
        """As the policy within."""
        return self.policy.same_budgets

    @property
    def sketches(self) -> bool:  # type: ignore[override]
        """As the policy within."""
        return self.policy.sketches

    @property
    def head_share(self) -> float:  # type: ignore[override]
        """That of the policy within."""
        return self.policy.head_share

    @property
    def repeats(self) -> bool:  # type: ignore[override]
        """As the policy within."""
        return self.policy.repeats

    @property
    def reads_output(self) -> bool:  # type: ignore[override]
        """As the policy within."""
        return self.policy.reads_output

    def pseudo_tokens(
        self, tokens: jax.Array, lengths: jax.Array, *, vocab_size: int, sketch: Sketch
    ) -> jax.Array:
        """Return those of the policy within."""
        return self.policy.pseudo_tokens(
            tokens, lengths, vocab_size=vocab_size, sketch=sketch
        )

    def heads(self, num_heads: int, num_kv_heads: int) -> int:
        """Return those of the policy within."""
        return self.policy.heads(num_heads, num_kv_heads)

    def layer_budgets(self, budget: int, num_layers: int) -> tuple[int, ...]:
        """Return those of the policy within."""
        return self.policy.layer_budgets(budget, num_layers)

    def layer_keeps(self, keep, lengths, num_layers) -> tuple[jax.Array, ...]:
        """Return those of the policy within."""
        return self.policy.layer_keeps(keep, lengths, num_layers)

    def rank(self, prompt: Prompt, *, budget: int) -> Ranking:
        """Return the ranking of the policy within."""
        return self.policy.rank(prompt, budget=budget)
