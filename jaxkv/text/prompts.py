"""What callers may hand to `jaxkv.generate` as prompts, and the token ids it makes."""

from collections import UserDict
from collections.abc import Mapping, Sequence, Set
from typing import Any, Protocol

import numpy as np

from jaxkv.fields import MOST
from jaxkv.language_model import LanguageModel, check_model
from jaxkv.models.hf import tokenizer as hf_tokenizer
from jaxkv.text.arguments import (
    TEXTS,
    UNORDERED,
    brief,
    integers,
    is_collection,
    is_iterable,
)


class HasArray(Protocol):
    """An array of token ids of any library: NumPy's, JAX's, PyTorch's."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """Return it as NumPy's."""


Prompts = (
    Sequence[str | Sequence[int] | HasArray]
    | HasArray
    | str
    | UserDict[str, Any]  # transformers' BatchEncoding
)

# Of a tokenizer's output: what it may hold besides ids and mask. None of it says
# anything that the ids do not.
_BESIDE = {"token_type_ids", "special_tokens_mask", "offset_mapping", "length"}


def encode(lm: LanguageModel, prompts: Prompts, *, behind: bool = False) -> list[Any]:
    """Return the token ids of prompts, or raise ValueError for bad ones.

    Args:
      lm: the model.
      behind: whether something stands before them, so that texts get no special token.
      prompts: a text; a list of texts, and of lists or arrays of token ids; or what a
        transformers tokenizer returns, whose attention mask says what is padding.

    Returns:
      The ids of each prompt, in a list or an array.
    """
    check_model("generate", lm)
    ids = []
    given = _listed(lm, prompts)
    texts = iter(_text_ids(lm, given, behind=behind))
    for index, prompt in enumerate(given):
        text = isinstance(prompt, str)
        row = next(texts) if text else _token_ids(index, prompt)
        if not len(row):
            raise ValueError(f"generate: prompt {index} has no tokens.")
        if np.min(row) < 0 or np.max(row) >= lm.config.vocab_size:
            raise ValueError(
                f"generate: prompt {index} has token ids outside "
                f"[0, {lm.config.vocab_size}), {_outside(lm, row)}."
            )
        ids.append(row)
    return ids


def _outside(lm: LanguageModel, row: Any) -> str:
    """Name a token that the network has no row for."""
    values = np.asarray(row)
    first = int(values[(values < 0) | (values >= lm.config.vocab_size)][0])
    token = None
    if lm.tokenizer is not None and 0 <= first <= MOST:
        token = lm.tokenizer.convert_ids_to_tokens(first)
    if token is None:
        return f"such as {first}"
    return (
        f"such as {first}, which is {token!r}: the tokenizer of {lm.name} has more "
        "tokens than its network; leave that one out"
    )


def too_long(tokenizer: Any, text: str, most: int) -> bool:
    """Return whether a text has more tokens than this, without counting all of them.

    Its beginning is tokenised until that has twice as many. Where the text is cut, the
    tokens may be others than in the whole, but only near by.

    Args:
      tokenizer: of the model.
      text: a prompt.
      most: tokens.

    Returns:
      True if it certainly has more; False if it must be counted.
    """
    characters = 8 * most
    while characters < len(text):
        begins = tokenizer(text[:characters], add_special_tokens=False)["input_ids"]
        if len(begins) > 2 * most + 64:
            return True
        characters *= 2
    return False


def _listed(lm: LanguageModel, prompts: Any) -> Sequence[Any]:
    """Return prompts as a list, whatever they came in."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, UserDict) and "input_ids" in prompts:
        prompts = _unpadded(lm, prompts)
    prompts = _as_array(prompts)
    if isinstance(prompts, TEXTS | UNORDERED) or not is_collection(prompts):
        raise ValueError(
            "generate: prompts must be a list of texts or of lists of token ids, got "
            f"{_kind(prompts)}."
        )
    if len(prompts) == 0:
        raise ValueError("generate: got no prompts; pass at least one.")
    return prompts


def _unpadded(lm: LanguageModel, given: Mapping[str, Any]) -> list[Any]:
    """Return the rows of a tokenizer's output without their padding."""
    unknown = sorted(set(given) - {"input_ids", "attention_mask"} - _BESIDE)
    if unknown:
        raise ValueError(
            "generate: of a tokenizer's output input_ids and attention_mask are read, "
            f"but it holds {', '.join(unknown)}, too; pass its input_ids alone."
        )
    rows = _rows("input_ids", given["input_ids"])
    if "attention_mask" not in given:
        pad = getattr(lm.tokenizer, "pad_token_id", None)
        if any(len(row) and pad in (row[0], row[-1]) for row in rows):
            raise ValueError(
                "generate: the tokenizer's output may be padded, but has no "
                "attention_mask that says where; call it with "
                "return_attention_mask=True."
            )
        return rows
    masks = _rows("attention_mask", given["attention_mask"])
    if [len(mask) for mask in masks] != [len(row) for row in rows]:
        raise ValueError(
            "generate: input_ids and attention_mask of the tokenizer's output differ "
            "in shape."
        )
    return [
        _masked(index, row, np.asarray(mask))
        for index, (row, mask) in enumerate(zip(rows, masks, strict=True))
    ]


def _masked(index: int, row: Any, mask: np.ndarray) -> np.ndarray:
    """Return the ids of a row that are no padding, on either side of them."""
    ids, kept = _token_ids(index, row), np.flatnonzero(mask)
    first, after = (kept[0], kept[-1] + 1) if len(kept) else (0, 0)
    if not np.isin(mask, (0, 1)).all() or after - first != len(kept):
        raise ValueError(
            f"generate: the attention mask of prompt {index} must be ones, and zeros "
            "where padding is on their left or right."
        )
    return np.asarray(ids)[first:after]


def _rows(name: str, values: Any) -> list[Any]:
    """Return the rows of ids; those of a single text are none, but numbers."""
    values = _as_array(values)
    if isinstance(values, np.ndarray):
        return [values] if values.ndim == 1 else list(np.atleast_1d(values))
    if isinstance(values, TEXTS) or not is_collection(values):
        raise ValueError(
            f"generate: {name} of the tokenizer's output must be a list, got "
            f"{_kind(values)}."
        )
    return list(values) if any(map(is_iterable, values)) else [values]


def _text_ids(
    lm: LanguageModel, prompts: Sequence[Any], *, behind: bool
) -> Sequence[list[int]]:
    """Return the ids of those prompts that are texts, or raise ValueError."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            _check_text(lm, index, prompt)
    if behind and texts:
        return lm.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return hf_tokenizer.encode(lm.tokenizer, texts)


def _check_text(lm: LanguageModel, index: int, prompt: str) -> None:
    """Raise ValueError for a text that has no token ids, or too many of them."""
    if lm.tokenizer is None:
        raise ValueError(
            f"generate: {lm.name} has no tokenizer; pass token ids, not text."
        )
    if not prompt:
        raise ValueError(f"generate: prompt {index} is empty.")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"generate: prompt {index} is no valid Unicode: character "
            f"{error.start} is half of a pair (a lone surrogate)."
        ) from None
    most = lm.config.max_positions
    if too_long(lm.tokenizer, prompt, most):
        raise ValueError(
            f"generate: prompt {index} has {len(prompt)} characters and more than "
            f"{most} tokens, but {lm.name} was made for {most}; shorten it."
        )


def _token_ids(index: int, prompt: Any) -> Any:
    """Return the ids of a prompt that is no text, an array or a list of integers."""
    prompt = _as_array(prompt)
    if isinstance(prompt, np.ndarray):
        if prompt.ndim != 1 or (prompt.size and prompt.dtype.kind not in "iu"):
            raise _neither(index, _kind(prompt))
        return prompt  # thousands of long prompts need not become lists
    if isinstance(prompt, TEXTS | UNORDERED | UserDict) or not is_iterable(prompt):
        raise _neither(index, _kind(prompt))
    values = list(prompt)
    for value in values:
        if isinstance(value, TEXTS):
            raise _neither(index, f"a {type(prompt).__name__} with {_kind(value)}")
    return integers(f"prompts[{index}]", values)


def _neither(index: int, what: str) -> ValueError:
    """Return the error about a prompt that is neither a text nor token ids."""
    return ValueError(
        f"generate: prompt {index} must be a text or a list of token ids, got {what}; "
        'prompts are a list of such, as in ["a text", [5, 6, 7]].'
    )


def _as_array(values: Any) -> Any:
    """Return arrays of JAX, PyTorch or pandas as NumPy's, other values as they are.

    Raises:
      ValueError: values are masked, so that nothing is known of what lies there.
    """
    if np.ma.is_masked(values):
        raise ValueError(
            "generate: a masked array has no token ids where it is masked; pass a list "
            "of each row's compressed()."
        )
    if isinstance(values, np.ndarray) or not hasattr(values, "__array__"):
        return values
    if hasattr(values, "detach"):  # PyTorch's, on whatever device
        values = values.detach().cpu()
    try:
        return np.asarray(values)
    except TypeError:  # random keys of JAX, dtypes that NumPy does not know
        return values


def _kind(value: Any) -> str:
    """Return what a value is, and what it looks like."""
    name = type(value).__name__
    if isinstance(value, Mapping | UserDict):
        return f"a {name} with the keys {brief(list(value))}"
    if isinstance(value, Set) or hasattr(value, "__next__"):
        return f"a {name}, which is no list"
    if isinstance(value, np.ndarray):
        one = f" {brief(value.item())}" if value.ndim == 0 else ""
        return f"an array{one} of shape {value.shape} and dtype {value.dtype}"
    return f"the {name} {brief(value)}"
