"""The rows of a comparison: methods with their options, and budgets, from flags."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from jaxkv import registry
from jaxkv.options import Options
from jaxkv.policies.base import DecodePolicy, PrefillPolicy
from jaxkv.policies.full import Full

FULL = "full"  # method and budget of the control that keeps everything


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A way to keep a cache small, under the name that results carry.

    Attributes:
      name: as the flag gave it, such as `snapkv:window_size=16`.
      prefill: eviction of the prompt.
      decode: eviction of the output.
    """

    name: str
    prefill: PrefillPolicy = Full()
    decode: DecodePolicy = Full()

    @property
    def bounded(self) -> bool:
        """Whether the method evicts at all, and hence takes a budget."""
        return not (self.prefill == Full() and self.decode == Full())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """A number of tokens, or a percentage of a whole.

    Attributes:
      name: as the flag gave it, such as `6%` or `256`.
      value: the number in it.
    """

    name: str
    value: float

    @property
    def is_percentage(self) -> bool:
        """Whether `value` counts hundredths of the whole."""
        return self.name.endswith("%")

    def tokens(self, whole: float) -> int:
        """Return the budget in tokens where the whole has `whole` of them."""
        return max(
            1, round(whole * self.value / 100 if self.is_percentage else self.value)
        )


def parse_budgets(text: str, *, flag: str = "--budgets") -> list[Budget]:
    """Read budgets such as `1.5%,6%,256`.

    Raises:
      ValueError: a part is neither a percentage in (0, 100] nor a number of tokens, or
        comes twice.
    """
    budgets = []
    for part in (part.strip() for part in text.split(",")):
        number = part.removesuffix("%")
        percentage = number != part
        form = r"\d+(\.\d+)?|\.\d+" if percentage else r"\d+"
        if not re.fullmatch(form, number) or not 0 < float(number) <= (
            100 if percentage else 1 << 30
        ):
            raise ValueError(
                f"{flag} takes tokens such as 256 and percentages such as 6%, with "
                f"commas, got {part!r} in {text!r}."
            )
        budgets.append(Budget(name=part, value=float(number)))
    _refuse_twice([budget.name for budget in budgets], flag)
    return budgets


def parse_prefill_methods(text: str, *, decode: str) -> list[Method]:
    """Read `--methods` that evict a prompt; all but `full` are followed by `decode`.

    Raises:
      ValueError: an unknown method or option, or a method that comes twice.
    """
    follow = registry.parse(decode, registry.DECODE, flag="--decode")
    return _methods(
        text, registry.PREFILL, lambda policy: {"decode": follow}, "prefill"
    )


def parse_decode_methods(text: str, *, prefill: str) -> list[Method]:
    """Read `--methods` that evict the output; all but `full` come after `prefill`.

    Raises:
      ValueError: an unknown method or option, or a method that comes twice.
    """
    before = registry.parse(prefill, registry.PREFILL, flag="--prefill")
    return _methods(text, registry.DECODE, lambda policy: {"prefill": before}, "decode")


def _methods(text: str, table: Mapping[str, type], other, role: str) -> list[Method]:
    found = []
    for name in registry.split_methods(text):
        policy = registry.parse(name, table, flag="--methods")
        beside = {} if policy == Full() else other(policy)
        found.append(Method(name=name, **{role: policy}, **beside))
    if not found:
        raise ValueError(f"--methods names no method; choose among {', '.join(table)}.")
    _refuse_twice([method.name for method in found], "--methods")
    return found


def check_budget(method: Method, budget: Budget, tokens: int, longest: int) -> None:
    """Raise ValueError if a method cannot work with a budget, before anything runs.

    Args:
      method: one that is bounded.
      budget: for the message.
      tokens: the budget in tokens.
      longest: tokens of the longest prompt.
    """
    options = Options(budget=tokens, prefill=method.prefill, decode=method.decode)
    try:
        options.check()
    except ValueError as error:
        raise ValueError(f"{method.name} at {budget.name}: {error}") from error
    kept = tokens - method.decode.spare
    if method.prefill == Full() and kept < longest:
        raise ValueError(
            f"{method.name} at {budget.name}: keeps {kept} tokens of "
            f"prompts of up to {longest}, but nothing evicts them; pass --prefill."
        )


def _refuse_twice(names: Sequence[str], flag: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{flag} has {twice[0]!r} twice; leave one out.")
