"""Checks of what callers hand to `jaxkv.generate`, before anything costs time."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.fields import MOST, MOST_SEED
from jaxkv.language_model import LanguageModel
from jaxkv.models import hf_tokenizer
from jaxkv.options import Options
from jaxkv.policies.full import Full

Prompts = Sequence[str | Sequence[int] | np.ndarray] | str

_KINDS = {  # of options: a method that each must have, and an example
    "prefill": ("compress", "DapQ()"),
    "decode": ("attend", "LongFlow()"),
    "sampler": ("pick", "Greedy()"),
    "speculate": ("draft", "Aligned()"),
    "accept": ("passes", "Exact()"),
}


def integer(name: str, value: Any, *, most: int = MOST) -> int:
    """Return a whole number of at most this magnitude, or raise ValueError.

    Truth values and fractions are refused: they are somebody's mistake.
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(
            f"generate: {name} must be a whole number, got {value!r}."
        ) from None
    if abs(number) > most:
        raise ValueError(
            f"generate: {name} must be between -{most} and {most}, got {number}."
        )
    return number


def integers(name: str, values: Any, *, most: int = MOST) -> list[int]:
    """Return a list of `integer`, or raise ValueError."""
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise ValueError(
            f"generate: {name} must be a list of whole numbers, got {values!r}."
        )
    return [integer(f"{name}[{i}]", v, most=most) for i, v in enumerate(values)]


def is_collection(values: Any) -> TypeGuard[Sequence[Any]]:
    """Return whether this is no single value; an array of no axes has `__len__` too."""
    return hasattr(values, "__len__") and getattr(values, "ndim", 1) > 0


def token_ids(index: int, prompt: Any) -> Any:
    """Return the ids of a prompt that is no text, an array or a list of integers."""
    if isinstance(prompt, np.ndarray):
        if prompt.ndim != 1 or prompt.dtype.kind not in "iu":
            raise ValueError(
                f"generate: prompt {index} must be a text or a list of token ids, got "
                f"an array of shape {prompt.shape} and dtype {prompt.dtype}."
            )
        return prompt  # thousands of long prompts need not become lists
    if isinstance(prompt, bytes) or not hasattr(prompt, "__iter__"):
        raise ValueError(
            f"generate: prompt {index} must be a text or a list of token ids, got "
            f"{prompt!r}."
        )
    return integers(f"prompts[{index}]", prompt)


def text(index: int, prompt: str) -> str:
    """Return a prompt that tokenizers can read, or raise ValueError."""
    if not prompt:
        raise ValueError(f"generate: prompt {index} is empty.")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"generate: prompt {index} is no valid Unicode: character "
            f"{error.start} is half of a pair (a lone surrogate)."
        ) from None
    return prompt


def static_options(**given: Any) -> Options:
    """Return the static options that `generate` was given, None being the default.

    Args:
      **given: fields of `Options`.

    Raises:
      ValueError: an option is of another kind, such as a class instead of an instance.
    """
    made = Options(**{name: x for name, x in given.items() if x is not None})
    for name, (method, example) in _KINDS.items():
        value = getattr(made, name)
        if value is None:
            continue  # no drafts
        if isinstance(value, type):
            raise ValueError(
                f"generate: {name}= takes an instance, got the class "
                f"{value.__name__}; write {value.__name__}()."
            )
        if not hasattr(value, method):
            raise ValueError(
                f"generate: {name}= takes something like {example}, got {value!r}."
            )
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


def encode(lm: LanguageModel, prompts: Prompts) -> list[list[int]]:
    """Return the token ids of prompts, or raise ValueError for bad ones."""
    if not isinstance(lm, LanguageModel):
        raise ValueError(
            f"generate: the first argument is a model from jaxkv.load, got {lm!r}."
        )
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, bytes) or not is_collection(prompts):
        raise ValueError(
            "generate: prompts must be a list of texts or of lists of token ids, got "
            f"{prompts!r}."
        )
    if len(prompts) == 0:
        raise ValueError("generate: got no prompts; pass at least one.")
    ids = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if lm.tokenizer is None:
                raise ValueError(
                    f"generate: {lm.name} has no tokenizer; pass token ids, not text."
                )
            row = hf_tokenizer.encode(lm.tokenizer, text(index, prompt))
        else:
            row = token_ids(index, prompt)
        if not len(row):
            raise ValueError(f"generate: prompt {index} has no tokens.")
        if np.min(row) < 0 or np.max(row) >= lm.config.vocab_size:
            raise ValueError(
                f"generate: prompt {index} has token ids outside "
                f"[0, {lm.config.vocab_size})."
            )
        ids.append(row)
    return ids


def seeds(seed: int | Sequence[int], rows: int) -> int | list[int]:
    """Return one seed for all rows, or one for each, or raise ValueError."""
    if isinstance(seed, str) or not is_collection(seed):
        return integer("seed", seed, most=MOST_SEED)
    if len(seed) != rows:
        raise ValueError(
            f"generate: got {len(seed)} seeds for {rows} prompts; pass one or {rows}."
        )
    return integers("seed", seed, most=MOST_SEED)


def stop_ids(lm: LanguageModel, given: Sequence[int] | None) -> jax.Array:
    """Return the ids that end a row, int32 `[E]`; -1 stands for none."""
    stops = lm.stop_ids if given is None else integers("stop_ids", given)
    return jnp.asarray(stops if len(stops) else [-1], int)


def spans(
    pool: Sequence[tuple[int, int]] | None, ids: list[list[int]], options: Options
) -> jax.Array | None:
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
    return jnp.asarray(pool, jnp.int32)


def check_fit(
    lm: LanguageModel,
    ids: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int,
    options: Options,
    budgets: Sequence[int] | None,
) -> None:
    """Raise ValueError where prompts, output and options do not fit the model.

    Args:
      lm: the model.
      ids: the prompts.
      max_new_tokens: the longest output.
      options: checked already.
      budgets: of each prompt; None keeps everything.
    """
    if lm.config.vocab_size > np.iinfo(np.int32).max:
        raise ValueError(
            f"generate: {lm.name} has a vocabulary of {lm.config.vocab_size} tokens, "
            "but token ids are int32 here; it cannot be used."
        )
    longest = max(len(row) for row in ids)
    if longest + max_new_tokens > lm.config.max_positions:
        raise ValueError(
            f"generate: a prompt of {longest} tokens and max_new_tokens="
            f"{max_new_tokens} need {longest + max_new_tokens} positions, but "
            f"{lm.name} was made for {lm.config.max_positions}; shorten one of them."
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
    last = max(longest + prefill.offset, 0) + prefill.num_pseudo
    if last > max(longest, lm.config.max_positions):
        raise ValueError(
            f"generate: a prompt of {longest} tokens and {prefill.num_pseudo} pseudo "
            f"tokens of {type(prefill).__name__} at offset {prefill.offset} need "
            f"{last} positions, but {lm.name} was made for {lm.config.max_positions}; "
            "shorten the prompt, or lower offset or window_size."
        )
