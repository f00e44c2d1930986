"""Checks of what callers hand to `jaxkv.generate`, before anything costs time."""

import operator
from typing import Any

import numpy as np

from jaxkv.language_model import LanguageModel

MOST = 2**31 - 1  # what fits int32
MOST_SEED = 2**63 - 1


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
