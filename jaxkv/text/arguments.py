"""Checks of what callers hand to `jaxkv.generate`, before anything costs time."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, TypeGuard

import numpy as np

from jaxkv.expected import brief, check_truth
from jaxkv.fields import MOST, MOST_SEED, check_types
from jaxkv.language_model import LanguageModel
from jaxkv.options import Options, check_roles
from jaxkv.policies.full import Full

# Their elements are no values in an order: a mapping's are its names.
UNORDERED = Mapping | Set
TEXTS = str | bytes | bytearray | memoryview


def integer(name: str, value: Any, *, most: int = MOST) -> int:
    """Return a whole number of at most this magnitude, or raise ValueError.

    Truth values and fractions are refused: they are somebody's mistake.
    """
    try:
        truth = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
        if truth or getattr(value, "ndim", None):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(
            f"generate: {name} must be a whole number, got {brief(value)}."
        ) from None
    if abs(number) > most:
        raise ValueError(
            f"generate: {name} must be between -{most} and {most}, got {number}."
        )
    return number


def integers(name: str, values: Any, *, most: int = MOST) -> list[int]:
    """Return a list of `integer`, or raise ValueError."""
    if isinstance(values, UNORDERED | TEXTS) or not is_iterable(values):
        raise ValueError(
            f"generate: {name} must be a list of whole numbers, got {brief(values)}."
        )
    return [integer(f"{name}[{i}]", v, most=most) for i, v in enumerate(values)]


def is_iterable(values: Any) -> bool:
    """Return whether this is no single value; an array of no axes has `__iter__`."""
    return hasattr(values, "__iter__") and getattr(values, "ndim", 1) > 0


def is_collection(values: Any) -> TypeGuard[Sequence[Any]]:
    """Return whether this has values in an order, and says how many they are."""
    ordered = not isinstance(values, UNORDERED)
    return ordered and hasattr(values, "__len__") and is_iterable(values)


def static_options(call: str, **given: Any) -> Options:
    """Return the static options that a function was given, None being the default.

    Args:
      call: the function.
      **given: fields of `Options`.

    Raises:
      ValueError: an option is of another kind, such as a class instead of an instance.
    """
    made = Options(**{name: x for name, x in given.items() if x is not None})
    check_roles(made, call)
    check_types(dataclasses.replace(made, budget=None), call)  # it may be one per row
    return made


def limits(
    max_new_tokens: int, block: int, on_tokens: Callable[..., Any] | None
) -> tuple[int, int]:
    """Return the longest output and the tokens between two calls of `on_tokens`.

    Raises:
      ValueError: they are no numbers above 0, or `on_tokens` cannot be called.
    """
    numbers = {"max_new_tokens": max_new_tokens, "block": block}
    for name, number in numbers.items():
        numbers[name] = integer(name, number)
        if numbers[name] < 1:
            raise ValueError(f"generate: {name} must be >= 1, got {number}.")
    if on_tokens is not None and not callable(on_tokens):
        raise ValueError(
            "generate: on_tokens= takes a function of the rows' new tokens, got "
            f"{on_tokens!r}."
        )
    return numbers["max_new_tokens"], numbers["block"]


def alternatives(lm: Any, logprobs: bool, top_logprobs: int) -> int | None:
    """Return how many alternatives to each token are noted, None for none of them.

    Raises:
      ValueError: there are no such numbers of tokens, or `logprobs` is no truth value.
    """
    check_truth("generate", logprobs=logprobs)
    number = integer("top_logprobs", top_logprobs)
    most = lm.config.vocab_size if isinstance(lm, LanguageModel) else MOST
    if not 0 <= number <= most:
        raise ValueError(
            f"generate: top_logprobs must be between 0 and {most}, the tokens of the "
            f"vocabulary, got {number}."
        )
    return number if number or logprobs else None


def seeds(seed: int | Sequence[int], rows: int) -> int | list[int]:
    """Return one seed for all rows, or one for each, or raise ValueError."""
    if isinstance(seed, str) or not is_collection(seed):
        return integer("seed", seed, most=MOST_SEED)
    if len(seed) != rows:
        raise ValueError(
            f"generate: got {len(seed)} seeds for {rows} prompts; pass one or {rows}."
        )
    return integers("seed", seed, most=MOST_SEED)


def stop_ids(lm: LanguageModel, given: Sequence[int] | None) -> np.ndarray:
    """Return the ids that end a row, int32 `[E]`; -1 stands for none.

    Raises:
      ValueError: one that was given is no token id of the model.
    """
    stops = lm.stop_ids if given is None else integers("stop_ids", given)
    stops = tuple(dict.fromkeys(stops))  # one that is given twice ends rows once
    for stop in () if given is None else stops:
        if not 0 <= stop < lm.config.vocab_size:
            raise ValueError(
                f"generate: stop_ids has {stop}, which ends nothing: the token ids of "
                f"{lm.name} are 0 to {lm.config.vocab_size - 1}."
            )
    return np.array(stops if len(stops) else [-1], np.int32)


def spans(
    pool: Sequence[tuple[int, int]] | None,
    ids: Sequence[Sequence[int]],
    options: Options,
) -> np.ndarray | None:
    """Return `pool=` as int32 `[B, 2]`, or None, or raise ValueError."""
    if pool is None:
        return None
    if options.speculate is None:
        raise ValueError("generate: pool= does nothing without speculate=.")
    if isinstance(pool, str | bytes) or not is_collection(pool):
        raise ValueError(
            "generate: pool= takes a list with one span (first token, the one after "
            f"the last) per prompt, got {pool!r}."
        )
    if len(pool) != len(ids):
        raise ValueError(
            f"generate: got {len(pool)} spans in pool= for {len(ids)} prompts."
        )
    found = [integers(f"pool[{i}]", span) for i, span in enumerate(pool)]
    for span, row in zip(found, ids, strict=True):
        if len(span) != 2:
            raise ValueError(
                "generate: a span of pool= is two numbers, the first token and the one "
                f"after the last; got {span}."
            )
        first, after = span
        if not 0 <= first < after <= len(row):
            raise ValueError(
                f"generate: pool= has the span ({first}, {after}) for a prompt of "
                f"{len(row)} tokens; it must lie within, and hold at least one."
            )
    return np.array(found, np.int32)


def check_fit(
    lm: LanguageModel,
    ids: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int,
    options: Options,
    budgets: Sequence[int] | None,
    *,
    output: str | None = None,
) -> None:
    """Raise ValueError where prompts, output and options do not fit the model.

    Args:
      lm: the model.
      ids: the prompts.
      max_new_tokens: the longest output.
      options: checked already.
      budgets: of each prompt; None keeps everything.
      output: how messages name what comes behind; None is by `max_new_tokens`.
    """
    if lm.config.vocab_size > np.iinfo(np.int32).max:
        raise ValueError(
            f"generate: {lm.name} has a vocabulary of {lm.config.vocab_size} tokens, "
            "but token ids are int32 here; it cannot be used."
        )
    longest = max(len(row) for row in ids)
    if longest + max_new_tokens > lm.config.max_positions:
        which = "it" if output else "one of them"
        output = output or f"max_new_tokens={max_new_tokens}"
        raise ValueError(
            f"generate: a prompt of {longest} tokens and {output} need "
            f"{longest + max_new_tokens} positions, but {lm.name} was made for "
            f"{lm.config.max_positions}; shorten {which}."
        )
    if budgets is None:
        return
    prefill = options.prefill
    highest = max(getattr(prefill, "fixed_ids", ()), default=0)
    if highest >= lm.config.vocab_size:
        raise ValueError(
            f"generate: fixed_ids of {type(prefill).__name__} has the token id "
            f"{highest}, but {lm.name} has ids below {lm.config.vocab_size}."
        )
    if isinstance(prefill, Full):
        for row, budget in zip(ids, budgets, strict=True):
            least = len(row) + options.decode.spare
            if budget < least:
                raise ValueError(
                    f"generate: the prompt has {len(row)} tokens and {budget=}, but "
                    "prefill=Full() keeps all of them; choose a prefill policy that "
                    f"evicts, such as StreamingLLM(), or a budget of at least {least}."
                )
    # An offset before the prompt starts the pseudo tokens at position 0.
    repeated = longest if getattr(prefill, "repeats", False) else 0
    pseudo = prefill.num_pseudo + repeated
    last = max(longest + prefill.offset, 0) + pseudo
    if last > max(longest, lm.config.max_positions):
        raise ValueError(
            f"generate: a prompt of {longest} tokens and {pseudo} pseudo "
            f"tokens of {type(prefill).__name__} at offset {prefill.offset} need "
            f"{last} positions, but {lm.name} was made for {lm.config.max_positions}; "
            "shorten the prompt, or lower offset or window_size."
        )
