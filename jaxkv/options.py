"""What is static about a generation: the budget, and who decides what."""

import dataclasses

from jaxkv.fields import check_types
from jaxkv.kernels import decode as decode_kernels
from jaxkv.kernels import prefill as prefill_kernels
from jaxkv.kernels import window_scores
from jaxkv.policies.base import DecodePolicy, PrefillPolicy
from jaxkv.policies.full import Full
from jaxkv.sampling import Greedy, Sampler
from jaxkv.speculation import loop as speculation
from jaxkv.speculation.drafters import Drafter
from jaxkv.speculation.rules import Exact, Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is static about a generation; equal options share one compiled program.

    Attributes:
      budget: tokens that a layer's cache may keep of the prompt and, if `decode`
        evicts, of prompt and output together; None keeps everything, whatever `prefill`
        says. Rows may have less: see `prefill`.
      prefill: the prompt's eviction.
      decode: the output's eviction.
      sampler: how a token is chosen.
      speculate: how tokens are drafted; None decodes one at a time.
      accept: which drafted tokens pass.
      prefill_implementation: of `kernels.prefill.causal_attention`; None is the best.
      decode_implementation: of `kernels.decode.decode_attention`, and of what goes with
        it in `kernels.tree`; None is the best.
      scores_implementation: of `kernels.window_scores.window_scores`; None is the best.
    """

    budget: int | None = None
    prefill: PrefillPolicy = Full()
    decode: DecodePolicy = Full()
    sampler: Sampler = Greedy()
    speculate: Drafter | None = None
    accept: Rule = Exact()
    prefill_implementation: prefill_kernels.Implementation | None = None
    decode_implementation: decode_kernels.Implementation | None = None
    scores_implementation: window_scores.Implementation | None = None

    def check(self) -> None:
        """Raise ValueError for options of wrong types or at odds with each other."""
        roles = (self.prefill, self.decode, self.sampler, self.speculate, self.accept)
        for options in (*roles, self):
            check_types(options)
        self.sampler.check()
        speculation.check(self)
        if self.budget is None:
            if self.decode.evicts:
                raise ValueError(
                    f"{type(self.decode).__name__} evicts while decoding and needs a "
                    "budget; pass budget= (tokens per layer and head)."
                )
            return
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1 token, got {self.budget}.")
        self.decode.check(self.budget)
        if self.prompt_budget < 1:
            raise ValueError(
                f"budget={self.budget} leaves nothing of the prompt, because "
                f"{type(self.decode).__name__} keeps {self.decode.spare} of it free; "
                f"use a budget of at least {self.decode.spare + 1}."
            )
        self.prefill.check(self.prompt_budget)
        if self.decode.evicts and not self.prefill.same_budgets:
            raise ValueError(
                f"{type(self.prefill).__name__} gives layers different budgets, but "
                f"{type(self.decode).__name__} evicts while decoding and needs one for "
                "all; use decode=Full() or another prefill policy."
            )

    @property
    def prompt_budget(self) -> int | None:
        """Tokens of the prompt that a layer may keep; None for all."""
        return None if self.budget is None else self.budget - self.decode.spare

    def num_slots(self, prompt: int, new: int) -> int:
        """Return the slots of a state for `prompt` padded tokens and `new` outputs."""
        if self.budget is None:
            return prompt + new
        if self.decode.evicts:
            return min(self.budget, prompt + new)
        return min(self.budget, prompt) + new

    def layer_slots(self, prompt: int, new: int, num_layers: int) -> tuple[int, ...]:
        """Return `num_slots` layer by layer, enough for prompts of any length."""
        if self.budget is None or self.decode.evicts:
            return (self.num_slots(prompt, new),) * num_layers
        budgets = self.prefill.layer_budgets(self.budget, num_layers)
        return tuple(min(budget, prompt) + new for budget in budgets)
