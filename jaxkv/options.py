"""What is static about a generation: the budget, and who decides what."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Self

from annotated_types import Ge

from jaxkv import outside
from jaxkv.fields import as_python, check_types
from jaxkv.kernels import decode as decode_kernels
from jaxkv.kernels import prefill as prefill_kernels
from jaxkv.kernels import window_scores
from jaxkv.policies import contract
from jaxkv.policies.base import DecodePolicy, PrefillPolicy
from jaxkv.policies.full import Full
from jaxkv.sampling import Greedy, Sampler
from jaxkv.speculation.drafters import Drafter
from jaxkv.speculation.rules import Exact, Rule
from jaxkv.state import by_window


class _Role(NamedTuple):
    """What an option of `generate` is for."""

    example: str
    protocol: type
    usual: str = ""  # where the usual answers are


_ROLES = {
    "prefill": _Role(
        "DapQ()",
        PrefillPolicy,
        "; jaxkv.policies.base.WholePrompt has all but compress, or scores instead",
    ),
    "decode": _Role(
        "LongFlow()",
        DecodePolicy,
        "; jaxkv.policies.base.PlainAttention has begin and default_implementation",
    ),
    "sampler": _Role("Greedy()", Sampler),
    "speculate": _Role("Aligned()", Drafter),
    "accept": _Role("Exact()", Rule),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is static about a generation; equal options share one compiled program.

    Attributes:
      budget: tokens that a layer's cache may keep of the prompt and, if `decode`
        evicts, of prompt and output together; None keeps everything, whatever `prefill`
        says. To a program it is a bound: rows may have less, see `forward.prefill`.
      prefill: the prompt's eviction.
      decode: the output's eviction.
      sampler: how a token is chosen.
      speculate: how tokens are drafted; None decodes one at a time.
      accept: which drafted tokens pass.
      top_logprobs: how many alternatives to each token of the output have their
        log-probabilities noted, beside its own; None notes none.
      prefill_implementation: of `kernels.prefill.causal_attention`; None is the best.
      decode_implementation: of `kernels.decode.decode_attention`, and of what goes with
        it in `kernels.tree_attention`; None is the best.
      scores_implementation: of `kernels.window_scores.window_scores`; None is the best.
    """

    budget: int | None = None
    prefill: PrefillPolicy = Full()
    decode: DecodePolicy = Full()
    sampler: Sampler = Greedy()
    speculate: Drafter | None = None
    accept: Rule = Exact()
    top_logprobs: Annotated[int, Ge(0)] | None = None
    prefill_implementation: prefill_kernels.Implementation | None = None
    decode_implementation: decode_kernels.Implementation | None = None
    scores_implementation: window_scores.Implementation | None = None

    def __post_init__(self) -> None:
        """Take NumPy's scalars as Python's, in the policies as well."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, as_python(value))

    def check(self, budgets: Iterable[int] | None = None) -> None:
        """Check everything that can be known without a model and its prompts.

        Args:
          budgets: those of the rows, in place of `budget`. They may be empty, where
            prompts decide them that are not read yet.

        Raises:
          ValueError: options of wrong types, or at odds with each other.
        """
        roles = (self.prefill, self.decode, self.sampler, self.speculate, self.accept)
        for options in (*roles, self):
            check_types(options)
        check_roles(self, "Options")
        self.sampler.check()
        self._check_speculation()
        for budget in [self.budget] if budgets is None else sorted(set(budgets)):
            self._check_budget(budget)

    def _check_speculation(self) -> None:
        """Raise ValueError where drafts go with nothing, or not with the rest."""
        self.accept.check()
        if self.speculate is None:
            if self.accept != Exact():
                raise ValueError(
                    f"accept={type(self.accept).__name__} does nothing without drafts; "
                    "pass speculate= too."
                )
            return
        self.speculate.check()
        if not getattr(
            self.decode, "attends_trees", False
        ):  # many know nothing of drafts
            raise ValueError(
                f"{self.decode} cannot verify drafts; speculation works with Full(), "
                "StreamingLLM(), and LongFlow() of interval 1 and any score but "
                "deletion."
            )
        if not self.accept.exact and self.sampler != Greedy():
            raise ValueError(
                f"accept={type(self.accept).__name__} is lossy, and defined for greedy "
                "decoding without a repetition penalty only; use Greedy(), or the "
                "exact rule, which draws what plain decoding draws."
            )

    def _check_budget(self, budget: int | None) -> None:
        """Raise ValueError for a budget that the policies cannot work with."""
        if budget is None:
            if self.decode.evicts:
                raise ValueError(
                    f"{type(self.decode).__name__} evicts while decoding and needs a "
                    "budget; pass budget= (tokens per layer and head)."
                )
            return
        if self.speculate is not None and self.decode.evicts:
            path = self.speculate.depth + 1
            if path > budget:
                raise ValueError(
                    f"{type(self.speculate).__name__}: a path of {path} tokens does "
                    f"not fit into the {budget} slots of the budget; use a budget of "
                    f"at least {path} or shorter drafts."
                )
        if budget < 1:
            raise ValueError(f"budget must be at least 1 token, got {budget}.")
        self.decode.check(budget)
        spare = self.decode.spare
        if budget <= spare:
            raise ValueError(
                f"{budget=} leaves nothing of the prompt, because "
                f"{type(self.decode).__name__} keeps {spare} of it free; use a budget "
                f"of at least {spare + 1}."
            )
        self.prefill.check(budget - spare)
        if self.decode.evicts and not self.prefill.same_budgets:
            heads = getattr(self.prefill, "head_share", 1.0) > 1
            raise ValueError(
                f"{type(self.prefill).__name__} gives "
                f"{'heads' if heads else 'layers'} different budgets, but "
                f"{type(self.decode).__name__} evicts while decoding and needs one for "
                "all; use decode=Full() or another prefill policy."
            )

    @property
    def prompt_budget(self) -> int | None:
        """Tokens of the prompt that a layer may keep; None for all."""
        return None if self.budget is None else self.budget - self.decode.spare

    def of_the_loop(self) -> Self:
        """Return what decoding reads, so that prompts of any policy share its program.

        The budget is in the shape of the cache by then.
        """
        return dataclasses.replace(
            self,
            budget=None,
            prefill=Full(),
            prefill_implementation=None,
            scores_implementation=None,
        )

    def num_slots(self, prompt: int, new: int, *, kept: int | None = None) -> int:
        """Return the slots of a state.

        Args:
          prompt: padded tokens.
          new: outputs.
          kept: tokens of the prompt that the layer may keep, if `decode` does not
            evict; None is `budget`.
        """
        if self.budget is None:
            return prompt + new
        if self.decode.evicts:
            return min(self.budget, prompt + new)
        return min(self.budget if kept is None else kept, prompt) + new

    def layer_slots(
        self, prompt: int, new: int, windows: Sequence[int | None]
    ) -> tuple[int, ...]:
        """Return the slots of each layer, enough for prompts of any length.

        Those of layers without a window are `num_slots`. The others hold their window.

        Args:
          prompt: padded tokens.
          new: outputs.
          windows: of each layer; None is all tokens.
        """
        layers = windows.count(None)
        bounds: tuple[int | None, ...] = (None,) * layers
        if self.budget is not None:
            bounds = contract.layer_budgets(self.prefill, self.budget, layers)
        sizes = (self.num_slots(prompt, new, kept=bound) for bound in bounds)
        return by_window(windows, sizes, lambda window: min(window, prompt + new))


def check_roles(options: Options, call: str) -> None:
    """Raise ValueError where an option lacks methods or attributes that its role needs.

    Args:
      options: of a generation.
      call: the function that was called.
    """
    for name, role in _ROLES.items():
        value = getattr(options, name)
        if value is None and name == "speculate":
            continue  # no drafts
        if isinstance(value, type):
            raise ValueError(
                f"{call}: {name}= takes an instance, got the class {value.__name__}; "
                f"write {value.__name__}()."
            )
        lacks = contract.missing(value, role.protocol)
        declared = [n for n in vars(role.protocol) if not n.startswith("_")]
        what = f"{call}: {name}= takes something like {role.example}, got {value!r}"
        if len(lacks) == len(declared):
            raise ValueError(f"{what}.")
        if lacks:
            own = type(value).__name__
            raise ValueError(f"{what}; {own} has no {', '.join(lacks)}{role.usual}.")


def described(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of `jaxkv.generate` ready for JSON, policies with fields.

    One that is not ours has a digest of its source beside them.
    """

    def told(value: Any) -> Any:
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return value
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        digest = outside.source_digest(value)
        own = {} if digest is None else {"source": digest}
        whole = {"name": type(value).__name__} | own
        return whole | {name: told(x) for name, x in fields.items()}

    return {name: told(value) for name, value in arguments.items()}
