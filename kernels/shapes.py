"""The annotations of operations, read: they are checked, and say how a mesh cuts.

`Float[Array, "B N H"]` says of an argument what its docstring need not: dtype, axes,
and which sizes agree. A tuple of such arrays, as in `cache`, is read field by field.
"""

import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from beartype.door import is_bearable
from jaxtyping import AbstractArray, jaxtyped

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def checked(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Check the arrays of an operation against its annotations, whenever it is traced.

    Raises:
      ValueError: a dtype, a rank or a size does not fit. The message, of one line,
        names the argument, what was expected and what came.
    """
    hints = typing.get_type_hints(function)
    signature = inspect.signature(function)
    where = function.__name__

    @functools.wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        given = signature.bind(*args, **kwargs).arguments
        sizes: dict[str, int] = {}
        with jaxtyped("context"):
            for name, value in given.items():
                for path, hint, leaf in _leaves(where, name, hints[name], value):
                    if not is_bearable(leaf, hint):
                        raise ValueError(_message(where, path, hint, leaf, sizes))
                    if leaf is not None:
                        axes = array_hint(hint).dim_str.split()
                        sizes |= zip(axes, leaf.shape, strict=True)
        return function(*args, **kwargs)

    return run


def array_hint(hint: Any) -> Any:
    """Return the annotation of an array, also where None is allowed; else None."""
    for option in (hint, *typing.get_args(hint)):
        if isinstance(option, type) and issubclass(option, AbstractArray):
            return option
    return None


def is_record(hint: Any) -> bool:
    """Return whether an annotation is a tuple of named, annotated fields."""
    return isinstance(hint, type) and hasattr(hint, "_fields")


def _leaves(where: str, name: str, hint: Any, value: Any) -> Iterator[tuple]:
    """Yield name, annotation and value of the arrays of one argument."""
    if is_record(hint):
        if not isinstance(value, hint):
            raise ValueError(
                f"{where}: {name} must be {hint.__name__}, got {type(value).__name__}."
            )
        for field, inner in typing.get_type_hints(hint).items():
            yield f"{name}.{field}", inner, getattr(value, field)
    elif array_hint(hint):
        yield name, hint, value


def _message(where: str, name: str, hint: Any, value: Any, sizes: dict) -> str:
    hint = array_hint(hint)
    axes = dict.fromkeys(re.findall(r"\w+", hint.dim_str))
    known = [f"{axis}={sizes[axis]}" for axis in axes if axis in sizes]
    came = type(value).__name__
    if hasattr(value, "shape"):
        came = f"{value.dtype}[{' '.join(map(str, value.shape))}]"
    return (
        f"{where}: {name} must be {hint.dtype.__name__}[{hint.dim_str}]"
        f"{' with ' * bool(known)}{', '.join(known)}, got {came}."
    )


def check_groups(where: str, num_heads: int, num_kv_heads: int) -> int:
    """Return query heads per key/value head, or raise ValueError."""
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{where}: {num_heads} query heads must be a multiple of "
            f"{num_kv_heads} key/value heads."
        )
    return num_heads // num_kv_heads
