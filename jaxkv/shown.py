"""What values look like where a notebook or a debugger shows them: a line or two."""

import dataclasses
import reprlib
from typing import Any


def brief(value: Any) -> str:
    """Return a dataclass as text, with arrays as dtype and shape, and long parts cut.

    It is meant to be the `__repr__` of classes that hold results or arrays.
    """
    fields = (field.name for field in dataclasses.fields(value) if field.repr)
    parts = (f"{name}={_BRIEF.repr(getattr(value, name))}" for name in fields)
    return f"{type(value).__name__}({', '.join(parts)})"


class _Brief(reprlib.Repr):
    def repr1(self, x: Any, level: int) -> str:
        """Return one value as text; the base class calls it for inner ones."""
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            return f"{x.dtype}[{','.join(map(str, x.shape))}]"
        if dataclasses.is_dataclass(x):
            return repr(x)
        return super().repr1(x, level)


_BRIEF = _Brief()
_BRIEF.maxtuple = _BRIEF.maxlist = 4
_BRIEF.maxstring = 60
