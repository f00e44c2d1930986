"""What policies share that choose by another policy's scores."""

import dataclasses
from typing import Any

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
        within = self.within
        try:
            check_types(within)
            within.check(budget)
        except ValueError as error:
            raise ValueError(f"{type(self).__name__}: {error}") from error

    @property
    def within(self) -> WholePrompt:
        """The policy within.

        Raises:
          ValueError: it is none that scores tokens.
        """
        policy: Any = self.policy
        if isinstance(policy, WholePrompt) and policy.chooses:
            return policy
        hint = ""
        if isinstance(policy, type):
            hint = f"; write {policy.__name__}()"
        elif hasattr(policy, "attend") and not hasattr(policy, "compress"):
            hint = (
                f"; {type(policy).__name__} decides while decoding, pass it as decode="
            )
        raise ValueError(
            f"{type(self).__name__}: policy takes one of the prompt that scores "
            f"tokens, such as SnapKV(), got {policy!r}{hint}."
        )

    @property
    def num_pseudo(self) -> int:
        """Those of the policy within."""
        return self.within.num_pseudo

    @property
    def offset(self) -> int:  # type: ignore[override]
        """That of the policy within."""
        return self.within.offset

    @property
    def same_budgets(self) -> bool:  # type: ignore[override]
        """As the policy within."""
        return self.within.same_budgets

    @property
    def sketches(self) -> bool:  # type: ignore[override]
        """As the policy within."""
        return self.within.sketches

    @property
    def head_share(self) -> float:  # type: ignore[override]
        """That of the policy within."""
        return self.within.head_share

    @property
    def repeats(self) -> bool:  # type: ignore[override]
        """As the policy within."""
        return self.within.repeats

    @property
    def reads_output(self) -> bool:  # type: ignore[override]
        """As the policy within."""
        return self.within.reads_output

    def pseudo_tokens(
        self, tokens: jax.Array, lengths: jax.Array, *, vocab_size: int, sketch: Sketch
    ) -> jax.Array:
        """Return those of the policy within."""
        return self.within.pseudo_tokens(
            tokens, lengths, vocab_size=vocab_size, sketch=sketch
        )

    def heads(self, num_heads: int, num_kv_heads: int) -> int:
        """Return those of the policy within."""
        return self.within.heads(num_heads, num_kv_heads)

    def layer_budgets(self, budget: int, num_layers: int) -> tuple[int, ...]:
        """Return those of the policy within."""
        return self.within.layer_budgets(budget, num_layers)

    def layer_keeps(self, keep, lengths, num_layers) -> tuple[jax.Array, ...]:
        """Return those of the policy within."""
        return self.within.layer_keeps(keep, lengths, num_layers)

    def rank(self, prompt: Prompt, *, budget: int) -> Ranking:
        """Return the ranking of the policy within."""
        return self.within.rank(prompt, budget=budget)
