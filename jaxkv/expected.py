"""What public functions were handed, against what they take: refused in one line."""

import os
import reprlib
from typing import Any

import numpy as np

TRUTH = (bool, np.bool_)
PATH = (str, os.PathLike)


def brief(value: Any) -> str:
    """Return what a value looks like, in one line; an array may be large."""
    words = reprlib.Repr()
    words.maxstring = words.maxother = words.maxlong = 60
    return " ".join(words.repr(value).split())


def check_kind(
    call: str,
    name: str,
    value: Any,
    kinds: type | tuple[type, ...],
    words: str,
    *,
    hint: str = "",
) -> None:
    """Raise ValueError for an argument that is not of the kind that is expected.

    Args:
      call: the function that was called.
      name: of its argument.
      value: what was given.
      kinds: as `isinstance` takes them.
      words: what is expected.
      hint: what to do, where the words do not say it.
    """
    if not isinstance(value, kinds):
        more = f"; {hint}" if hint else ""
        raise ValueError(f"{call}: {name}= takes {words}, got {brief(value)}{more}.")


def check_truth(call: str, **given: Any) -> None:
    """Raise ValueError for arguments, by name, that are neither true nor false.

    A number or a word is somebody's mistake: the word "no" is as true as any other.
    """
    for name, value in given.items():
        check_kind(call, name, value, TRUTH, "True or False")


def check_text(call: str, **given: Any) -> None:
    """Raise ValueError for arguments, by name, that are no texts."""
    for name, value in given.items():
        check_kind(call, name, value, str, "a text")


def check_path(call: str, **given: Any) -> None:
    """Raise ValueError for arguments, by name, that are no paths.

    Nor is the empty text, which would be the folder that the process is in.
    """
    for name, value in given.items():
        kinds = () if value == "" else PATH
        check_kind(call, name, value, kinds, "a path, as text or a pathlib.Path")


def check_array(call: str, name: str, value: Any, *shapes: str) -> None:
    """Raise ValueError for an argument that is no array of whole numbers.

    Args:
      call: the function that was called.
      name: of its argument.
      value: an array, or what is traced as one.
      *shapes: letters of axes, such as "B P"; how many there are is checked.
    """
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    ranks = [len(shape.split()) for shape in shapes]
    if kind not in ("i", "u") or getattr(value, "ndim", None) not in ranks:
        lists = " or ".join(f"[{', '.join(shape.split())}]" for shape in shapes)
        raise ValueError(
            f"{call}: {name}= takes an int32 array {lists}, got {brief(value)}."
        )
