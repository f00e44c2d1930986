"""Flags that take several values with commas between them."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

Value = TypeVar("Value")


def values(text: str, read: Callable[[str], Value], takes: str) -> list[Value]:
    """Read each part between commas.

    Args:
      text: of the flag.
      read: makes a value of a part without spaces around it, or raises ValueError.
      takes: how the message begins, such as `--sizes takes numbers,`.

    Returns:
      The values, in their order.

    Raises:
      ValueError: `read` refuses a part.
    """
    try:
        return [read(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{takes} got {text!r}.") from error


def numbers(
    text: str,
    takes: str,
    *,
    outside: str | None = None,
    read: Callable[[str], float] = int,
    least: float = 1,
    most: float = math.inf,
) -> list:
    """Read numbers with commas between them.

    Args:
      text: of the flag.
      takes: see `values`.
      outside: how the message about a number out of bounds begins; None as `takes`.
      read: `int` or `float`.
      least: smallest number that is taken.
      most: largest number that is taken.

    Returns:
      The numbers, in their order.

    Raises:
      ValueError: a part is no number, or out of bounds.
    """
    found = values(text, read, takes)
    if not all(least <= number <= most for number in found):
        raise ValueError(f"{outside or takes} got {text!r}.")
    return found


def positive(flag: str, text: str) -> list[int]:
    """Return positive numbers, each once.

    Raises:
      ValueError: a part is no positive number.
    """
    found = numbers(text, f"{flag} takes positive numbers with commas,")
    return list(dict.fromkeys(found))


def names(
    text: str | None,
    known: Sequence[str],
    unknown: str = "unknown task {!r}; choose among {}.",
) -> list[str]:
    """Return names that a flag gives, each once; None gives all.

    Args:
      text: of the flag.
      known: names to choose among.
      unknown: the message about another name, with two gaps: that name, all known ones.

    Raises:
      ValueError: a name is not known.
    """
    if text is None:
        return list(known)
    wanted = dict.fromkeys(values(text, str, ""))
    for name in wanted:
        if name not in known:
            raise ValueError(unknown.format(name, ", ".join(known)))
    return list(wanted)
