"""The laws as a suite, for policies of one's own and for other caches.

`check_prefill_policy` and `check_decode_policy` run a tiny network with random weights,
on the prompts and budgets of `jaxkv.laws.programs`. `check_cache` knows nothing of this
library but three functions: any cache of fixed size may be held to it.
"""

import inspect
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from jaxkv.laws import foreign, lawbook
from jaxkv.laws.network import prompts
from jaxkv.laws.programs import LENGTHS, PROMPT, SMALL
from jaxkv.options import Options
from jaxkv.policies import contract
from jaxkv.policies.base import DecodePolicy, PrefillPolicy
from jaxkv.policies.streaming_llm import StreamingLLM

BUDGET = SMALL[0]  # slots while decoding


class LawBroken(AssertionError):
    """Something breaks a law; the message says which, and on what.

    Attributes:
      law: its name, that of a function in `jaxkv.laws`.
    """

    def __init__(self, law: str, message: str):
        self.law = law
        super().__init__(message)


class Cache(Protocol):
    """Three functions by which a cache of another library is looked at.

    Token ids are whole numbers; a cache is whatever the functions hand on.
    """

    def read(
        self, prompts: Sequence[Sequence[int]], budget: int | None
    ) -> tuple[Any, Any]:
        """Read prompts, and keep at most `budget` tokens of each, None for all.

        Returns:
          Logits of the token after each prompt, `[B, V]`, and the cache.
        """

    def step(self, cache: Any, tokens: Sequence[int]) -> tuple[Any, Any]:
        """Feed one token a row.

        Returns:
          Logits of the token after it, `[B, V]`, and the cache.
        """

    def positions(self, cache: Any) -> Sequence[Any]:
        """Return each layer's held positions, `[B, heads, slots]`, below 0 if free."""


def check_prefill_policy(policy: PrefillPolicy, *, seed: int = 0) -> None:
    """Hold a policy of the prompt to the laws.

    Args:
      policy: with options that suit budgets of 6 to 9 tokens.
      seed: of the prompts' tokens.

    Raises:
      LawBroken: it breaks one.
      ValueError: it lacks a method, or refuses the budgets.
    """
    _check_role(policy, PrefillPolicy)
    tokens, _ = prompts(seed, LENGTHS, PROMPT)
    on = f"prompts of {LENGTHS} tokens cut to {SMALL}, seed {seed}"
    for law in lawbook.OF_PROMPTS:
        _hold(law, policy, on, policy, tokens)


def check_decode_policy(policy: DecodePolicy, *, seed: int = 0) -> None:
    """Hold a policy of decoding to the laws, behind prompts that StreamingLLM cuts.

    One that `attends_trees` is held to exact speculation, too.

    Args:
      policy: with options that suit 9 slots.
      seed: of the prompts' tokens, and of what is drawn.

    Raises:
      LawBroken: it breaks one.
      ValueError: it lacks a method, or refuses the budget.
    """
    _check_role(policy, DecodePolicy)
    tokens, lengths = prompts(seed, LENGTHS, PROMPT)
    on = f"prompts of {LENGTHS} tokens, {BUDGET} slots, seed {seed}"
    options = Options(prefill=StreamingLLM(n_sink=1), decode=policy, budget=BUDGET)
    laws: list[Callable[..., None]] = [
        lawbook.full_budget_is_exact,
        lawbook.bounded,
        lawbook.batch_equals_singles,
        lawbook.not_recompiled,
        *lawbook.OF_STEPS,
    ]
    if getattr(policy, "attends_trees", False):
        laws.append(lawbook.exact_speculation_equals_plain)
    given = dict(options=options, tokens=tokens, lengths=lengths, seed=seed)
    for law in laws:
        wanted = inspect.signature(law).parameters
        _hold(law, policy, on, **{k: v for k, v in given.items() if k in wanted})


def check_cache(
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    *,
    budget: int,
    steps: int = 8,
    tolerance: float = 1e-3,
) -> None:
    """Hold the cache of another library to the laws that need nothing of ours.

    Args:
      cache: three functions, see `Cache`.
      prompts: token ids of at least two rows, of different lengths, the longest of them
        longer than `budget`.
      budget: the most tokens that a head may hold.
      steps: greedy tokens behind each prompt.
      tolerance: of logits, absolute, and relative to the largest one.

    Raises:
      LawBroken: it breaks one.
      ValueError: the prompts do not try it.
    """
    lengths = sorted({len(prompt) for prompt in prompts})
    if len(lengths) < 2 or lengths[-1] <= budget:
        raise ValueError(
            "check_cache: prompts need two lengths at least, one of them above "
            f"{budget=}, got {lengths}."
        )
    on = f"prompts of {[len(x) for x in prompts]} tokens, {budget=}, {steps} steps"
    trial = foreign.Trial(cache, prompts, budget, steps, tolerance)
    for law in foreign.LAWS:
        _hold(law, cache, on, trial)


def _check_role(policy: Any, protocol: type) -> None:
    if lacks := contract.missing(policy, protocol):
        raise ValueError(
            f"{type(policy).__name__} is no {protocol.__name__}: it has no "
            f"{', '.join(lacks)}."
        )


def _hold(
    law: Callable[..., None], what: Any, on: str, *args: Any, **named: Any
) -> None:
    """Run a law, and say which it was where it is broken."""
    try:
        law(*args, **named)
    except AssertionError as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        seen = " ".join(str(error).split()) or f"not {where.line}"
        says = inspect.getdoc(law)
        raise LawBroken(
            law.__name__,
            f"{type(what).__name__} breaks the law {law.__name__} ({says}), on {on}: "
            f"{seen[:400]}",
        ) from error
