"""Long-context and long-reasoning inference with a key/value cache of fixed size.

`load` a checkpoint, `generate` text; `prefill`, `decode_step` and `generate_tokens` are
the pure functions underneath. Policies say what the cache keeps.

A name is imported when it is first asked for: JAX and the networks take seconds, and
the command line is interrupted, or asked for its version, before they are needed.
"""

import ast
import importlib
from pathlib import Path
from typing import Any

import jaxkv._clone  # noqa: F401


def _places() -> dict[str, str]:
    """Return where each public name is defined, as the stub beside this file says."""
    stub = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    return {
        alias.name: node.module
        for node in ast.parse(stub).body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


_PLACES = _places()
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package."""
    found: Any
    if name in _PLACES:
        found = getattr(importlib.import_module(_PLACES[name]), name)
    elif name.startswith("_"):
        raise AttributeError(f"module 'jaxkv' has no attribute {name!r}")
    else:
        module = f"jaxkv.{name}"
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise AttributeError(f"module 'jaxkv' has no attribute {name!r}") from None
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
