"""What lm-evaluation-harness says of a generation, in our words.

Does without the harness itself; see `harness.py`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from jaxkv.sampling import Categorical, Greedy, Sampler
from jaxkv.text import arguments

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DRAWS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """How a task wants its outputs.

    Attributes:
      until: strings that end an output.
      new: tokens of the longest one.
      sampler: chooses them.
    """

    until: tuple[str, ...]
    new: int
    sampler: Sampler

    @classmethod
    def read(cls, given: Mapping[str, Any], new: int) -> "Wanted":
        """Read the harness' arguments of a generation.

        Args:
          given: `generation_kwargs` of a task.
          new: tokens of the longest output where they do not say.

        Raises:
          ValueError: one is unknown, or means nothing.
        """
        left = dict(given)
        until = left.pop("until", None) or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        limits = [left.pop(name) for name in _LIMITS if name in left]
        limits = [limit for limit in limits if limit is not None]
        draws = {n: left.pop(n) for n in _DRAWS if left.get(n) is not None}
        draws = {n: int(x) if n == "top_k" else float(x) for n, x in draws.items()}
        temperature = draws.pop("temperature", None)
        sampling = left.pop("do_sample", None)
        if sampling is None:
            sampling = bool(temperature)
        left = {name: x for name, x in left.items() if x is not None}
        if left:
            raise ValueError(
                f"generation arguments {', '.join(sorted(left))} are not known here; "
                f"known are until, do_sample, {', '.join((*_LIMITS, *_DRAWS))}."
            )
        penalty = draws.get("repetition_penalty", 1.0)
        return cls(
            until=until,
            new=above_0("max_gen_toks", limits[0] if limits else new),
            sampler=Categorical(temperature=temperature or 1.0, **draws)
            if sampling and temperature != 0
            else Greedy(repetition_penalty=penalty),
        )

    def ended(self, text: str) -> bool:
        """Return whether a stop string is in a text."""
        return any(stop in text for stop in self.until)

    def cut(self, text: str) -> str:
        """Return a text up to its first stop string."""
        return functools.reduce(lambda x, stop: x.split(stop)[0], self.until, text)


def above_0(name: str, value: Any) -> int:
    """Return a whole number of at least 1, also from text, or raise ValueError."""
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    number = arguments.integer(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}.")
    return number
