"""Whether options are of the types, and in the bounds, that their dataclass declares.

A bound stands beside its field: `window_size: Annotated[int, Ge(1)] = 32`, in the words
of `annotated_types`. The `check` of a class compares fields with each other and with
the budget. It comes after this, and need not ask what a value is.
"""

import dataclasses
import math
import operator
import types
import typing
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Le, Lt, Predicate

MOST = 2**31 - 1  # what fits int32
MOST_SEED = 2**63 - 1
BOUNDS = {  # how a bound is kept, and its words
    Ge: (operator.ge, "at least"),
    Gt: (operator.gt, "above"),
    Le: (operator.le, "at most"),
    Lt: (operator.lt, "below"),
}


def odd(number: int) -> bool:
    """Return whether a number is odd, as a size with a middle must be."""
    return number % 2 == 1


OddSize = Annotated[int, Predicate(odd), Ge(1)]


def check_types(options: Any, call: str | None = None) -> None:
    """Raise ValueError for an option that is not what its annotation says.

    Checked are annotations of int, float, bool, str, None, Literal and `tuple[x, ...]`
    of them; others are left to the class. Neither a truth value nor NaN is a number. A
    float may be given as a whole number, and NumPy's scalars are taken as Python's.
    Whole numbers must fit int32, a `seed` int64. Infinity is a number; `Lt(math.inf)`
    refuses it. Of the bounds, `Ge`, `Gt`, `Le`, `Lt` and `Predicate` are known.

    Args:
      options: a dataclass that can be hashed; anything else that can has no annotations
        and passes, as do classes whose annotations cannot be evaluated (their names
        imported for type checkers only).
      call: the function that they are arguments of; None names their class.
    """
    for field, hint in _fields(options):
        value = getattr(options, field)
        name = f"{call or type(options).__name__}: {field}"
        if not _fits(value, hint):
            raise ValueError(f"{name} takes {words(hint)}, got {value!r}.")
        most = MOST_SEED if field == "seed" else MOST
        for number in _numbers(value, hint):
            if abs(number) > most:
                raise ValueError(
                    f"{name} must be between -{most} and {most}, got {number}."
                )
        for number in _beyond(value, hint):
            raise ValueError(f"{name} must be {bounds(hint)}, got {number}.")
    try:
        hash(options)
    except TypeError as error:
        raise ValueError(
            f"{type(options).__name__} is a static argument of jax.jit and must be "
            f"hashable, but: {error}; use a frozen dataclass, and tuples for lists."
        ) from error


def as_python(options: Any) -> Any:
    """Return options with Python's numbers in place of NumPy's scalars.

    A NumPy scalar has a dtype, which arithmetic with arrays would follow.

    Args:
      options: a dataclass, or a value such as one of its fields has.
    """
    if isinstance(options, np.generic):
        return options.item()
    if isinstance(options, tuple) and any(isinstance(x, np.generic) for x in options):
        return tuple(map(as_python, options))
    if not dataclasses.is_dataclass(options) or isinstance(options, type):
        return options
    given = {f.name: getattr(options, f.name, None) for f in _made_of(options)}
    python = {name: as_python(value) for name, value in given.items()}
    changed = {name: x for name, x in python.items() if x is not given[name]}
    return dataclasses.replace(options, **changed) if changed else options


def _made_of(options: Any) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(options) if field.init]


def _fields(options: Any) -> list[tuple[str, Any]]:
    """Return the fields of a dataclass that have a value, and their annotations."""
    if not dataclasses.is_dataclass(options):
        return []
    try:
        hints = typing.get_type_hints(type(options), include_extras=True)
    except Exception:  # whatever the text of an annotation raises when it is evaluated
        return []
    names = (field.name for field in dataclasses.fields(options))
    return [(name, hints.get(name)) for name in names if hasattr(options, name)]


def kinds(hint: Any) -> tuple[Any, ...]:
    """Return the parts of a union, or what is none as the only part, without bounds."""
    return tuple(kind for kind, _ in _bounded(hint))


def _bounded(hint: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """Return the parts of a union, each with its bounds."""
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    parts = typing.get_args(hint) if union else (hint,)
    split = [
        typing.get_args(part) if typing.get_origin(part) is Annotated else (part,)
        for part in parts
    ]
    return [(kind, tuple(found)) for kind, *found in split]


def element(kind: Any) -> Any:
    """Return `x` of `tuple[x, ...]`, None of all others."""
    args = typing.get_args(kind)
    listed = typing.get_origin(kind) is tuple and args[1:] == (...,)
    return args[0] if listed else None


def words(hint: Any, a_list: str = "a tuple of {}") -> str:
    """Return an annotation in words, such as "a number or none".

    Args:
      hint: one of those that `check_types` checks.
      a_list: what tuples are called, around the name of what is in them.
    """
    found: list[str] = []
    for kind in kinds(hint):
        if typing.get_origin(kind) is typing.Literal:
            found += map(str, typing.get_args(kind))
        elif inner := element(kind):
            found.append(a_list.format(f"{_noun(inner)}s"))
        elif kind is bool:
            found += ["true", "false"]
        elif kind is types.NoneType:
            found.append("none")
        elif kind is not int or float not in kinds(hint):
            found.append(f"a {_noun(kind)}")
    return " or ".join(filter(None, [", ".join(found[:-1]), found[-1]]))


def bounds(hint: Any) -> str:
    """Return the bounds of an annotation in words, such as "odd and at least 1"."""
    found = []
    for kind, limits in _bounded(hint):
        if inner := element(kind):
            found.append((inner, bounds(inner)))
        elif limits:
            found.append((kind, " and ".join(map(_limit, limits))))
    if len(found) == 1:
        return found[0][1]
    return " or ".join(f"a {_noun(kind)} of {limit}" for kind, limit in found)


def _limit(limit: Any) -> str:
    if isinstance(limit, Predicate):
        return limit.func.__name__
    (value,) = dataclasses.astuple(limit)
    return "finite" if value == math.inf else f"{BOUNDS[type(limit)][1]} {value}"


def _beyond(value: Any, hint: Any) -> list[Any]:
    """Return the numbers in a value that are out of the bounds of each of their kinds.

    The value is of the type of its annotation.
    """
    beyond: list[Any] = []
    for kind, limits in _bounded(hint):
        if not _fits_kind(value, kind):
            continue
        if inner := element(kind):
            beyond += [number for x in value for number in _beyond(x, inner)]
        elif all(_keeps(value, limit) for limit in limits):
            return []
        else:
            beyond = [value]
    return beyond


def _keeps(value: Any, limit: Any) -> bool:
    if isinstance(limit, Predicate):
        return limit.func(value)
    (bound,) = dataclasses.astuple(limit)
    return bool(BOUNDS[type(limit)][0](value, bound))


def _noun(kind: Any) -> str:
    kind = kinds(kind)[0]
    known = {int: "whole number", float: "number", bool: "truth value", str: "text"}
    return known.get(kind) or str(getattr(kind, "__name__", kind))


def _fits(value: Any, hint: Any) -> bool:
    return any(_fits_kind(value, kind) for kind in kinds(hint))


def _fits_kind(value: Any, kind: Any) -> bool:
    truth = isinstance(value, bool | np.bool_)
    if kind is bool:
        return truth
    if kind is int:
        return isinstance(value, int | np.integer) and not truth
    if kind is float:
        fraction = isinstance(value, float | np.floating)
        return bool(value == value) if fraction else _fits_kind(value, int)
    if kind is str:
        return isinstance(value, str)
    if kind is types.NoneType:
        return value is None
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        return any(type(x) is type(value) and x == value for x in choices)
    if inner := element(kind):
        return isinstance(value, tuple) and all(_fits(x, inner) for x in value)
    return True


def _numbers(value: Any, hint: Any) -> list[int]:
    """Return the whole numbers in a value, where its annotation speaks of numbers."""
    if isinstance(value, tuple):
        inner = next(filter(None, map(element, kinds(hint))), None)
        return [number for x in value for number in _numbers(x, inner)]
    number = any(kind in (int, float) for kind in kinds(hint))
    return [int(value)] if number and isinstance(value, int | np.integer) else []
