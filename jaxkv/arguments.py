"""Checks of what callers hand to `jaxkv.generate`, before anything costs time."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.fields import MOST, MOST_SEED
from jaxkv.language_model import LanguageModel
from jaxkv.options import Options
from jaxkv.policies.full import Full

Prompts = Sequence[str] | Sequence[Sequence[int]] | str


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


def _is_one(values: Any) -> bool:
    """Return whether this has no entries; an array of no axes has `__len__` too."""
    return not hasattr(values, "__len__") or getattr(values, "ndim", 1) == 0


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


def methods(lm: Any, **given: tuple[Any, str, str]) -> None:
    """Check the kind of each object, by a method that it must have.

    Args:
      lm: must be a language model.
      **given: name of the argument to (value, a method of the right kind, an example).
    """
    if not isinstance(lm, LanguageModel):
        raise ValueError(
            f"generate: the first argument is a model from jaxkv.load, got {lm!r}."
        )
    for name, (value, method, example) in given.items():
        if isinstance(value, type):
            raise ValueError(
                f"generate: {name}= takes an instance, got the class "
                f"{value.__name__}; write {value.__name__}()."
            )
        if not hasattr(value, method):
            raise ValueError(
                f"generate: {name}= takes something like {example}, got {value!r}."
            )


def encode(lm: LanguageModel, prompts: Prompts) -> list[list[int]]:
    """Return the token ids of prompts, or raise ValueError for bad ones."""
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, bytes) or _is_one(prompts):
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
            row = lm.tokenizer(text(index, prompt))["input_ids"]
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


def row_keys(seed: int | Sequence[int], rows: int) -> jax.Array:
    """Return one PRNG key per row: from one seed, or from one seed each."""
    if isinstance(seed, str) or _is_one(seed):
        seed = integer("seed", seed, most=MOST_SEED)
        return jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(int(seed)), jnp.arange(rows)
        )
    if len(seed) != rows:
        raise ValueError(
            f"generate: got {len(seed)} seeds for {rows} prompts; pass one or {rows}."
        )
    seeds = integers("seed", seed, most=MOST_SEED)
    return jnp.stack([jax.random.fold_in(jax.random.key(s), 0) for s in seeds])


def row_budgets(
    budget: int | Sequence[int] | None,
    compression_ratio: float | None,
    ids: list[list[int]],
    *,
    evicts: bool,
) -> tuple[int, ...] | None:
    """Return the budget of each prompt, or None if everything is kept.

    Args:
      budget: see `generate`.
      compression_ratio: see `generate`.
      ids: the prompts.
      evicts: whether the decode policy does.

    Raises:
      ValueError: both are given, or one that does not fit the prompts or the policy.
    """
    if compression_ratio is not None:
        if budget is not None:
            raise ValueError("generate: pass budget= or compression_ratio=, not both.")
        if not isinstance(compression_ratio, int | float | np.number):
            raise ValueError(
                "generate: compression_ratio must be a number, got "
                f"{compression_ratio!r}."
            )
        if not 0 <= compression_ratio < 1:
            raise ValueError(
                "generate: compression_ratio is the fraction removed, in [0, 1); "
                f"got {compression_ratio}."
            )
        if evicts:
            raise ValueError(
                "generate: compression_ratio is a fraction of each prompt, but the "
                "decode policy evicts and needs one budget for prompt and output of "
                "all rows; pass budget= (tokens) instead."
            )
        return tuple(max(1, round(len(row) * (1 - compression_ratio))) for row in ids)
    if budget is None:
        return None
    if isinstance(budget, str) or _is_one(budget):
        return (integer("budget", budget),) * len(ids)
    budgets = tuple(integers("budget", budget))
    if len(budgets) != len(ids):
        raise ValueError(
            f"generate: got {len(budgets)} budgets for {len(ids)} prompts; pass one or "
            f"{len(ids)}."
        )
    if evicts and len(set(budgets)) > 1:
        raise ValueError(
            "generate: the decode policy evicts and needs the same budget for all "
            f"rows, got {sorted(set(budgets))}; pass one number, or decode=Full()."
        )
    return budgets


def spans(
    pool: Sequence[tuple[int, int]] | None, ids: list[list[int]], options: Options
) -> jax.Array | None:
    """Return `pool=` as int32 `[B, 2]`, or None, or raise ValueError."""
    if pool is None:
        return None
    if options.speculate is None:
        raise ValueError("generate: pool= does nothing without speculate=.")
    if isinstance(pool, str | bytes) or _is_one(pool):
        raise ValueError(
            "generate: pool= takes a list with one span (first token, the one after "
            f"the last) per prompt, got {pool!r}."
        )
    if len(pool) != len(ids):
        raise ValueError(
            f"generate: got {len(pool)} spans in pool= for {len(ids)} prompts."
        )
    pool = [integers(f"pool[{i}]", span) for i, span in enumerate(pool)]
    for span, row in zip(pool, ids, strict=True):
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


def check(
    lm: LanguageModel,
    ids: list[list[int]],
    max_new_tokens: int,
    options: Options,
    budgets: tuple[int, ...] | None,
    block: int,
) -> None:
    """Raise ValueError for options that do not fit the model, prompts or budgets."""
    if max_new_tokens < 1:
        raise ValueError(
            f"generate: max_new_tokens must be >= 1, got {max_new_tokens}."
        )
    if block < 1:
        raise ValueError(f"generate: block must be >= 1, got {block}.")
    for budget in {None} if budgets is None else set(budgets):
        dataclasses.replace(options, budget=budget).check()
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
