"""Policies that are not ours, by the module and the name of their class."""

import hashlib
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any


def find(module: str, name: str, *, flag: str) -> type:
    """Import a class, from the current folder or from what is installed.

    Args:
      module: such as `my_module`, or `package.module`.
      name: of the class.
      flag: what it was asked for by, for the messages.

    Raises:
      ValueError: there is no such module or class, or the module cannot be imported.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last, so that nothing here hides what is installed
        importlib.invalidate_caches()
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{flag}: no module {error.name!r}, neither in {here} nor installed."
            ) from error
        raise ValueError(_failed(flag, module, error)) from error
    except (Exception, SystemExit) as error:  # whatever a module does
        raise ValueError(_failed(flag, module, error)) from error
    if not isinstance(found, type):
        what = "is no class" if found is not None else "is not there"
        raise ValueError(f"{flag}: {name} of {module} {what}; name the policy's class.")
    return found


def _failed(flag: str, module: str, error: BaseException) -> str:
    reason = " ".join(str(error).split())
    return f"{flag}: importing {module} raises {type(error).__name__}: {reason}"


def make(method: Any, values: dict[str, Any], *, name: str, flag: str) -> Any:
    """Call a class or a named setting that is not ours.

    Raises:
      ValueError: it raises.
    """
    try:
        return method(**values)
    except Exception as error:
        reason = " ".join(str(error).split())
        kind = type(error).__name__
        raise ValueError(f"{flag}: making {name} raises {kind}: {reason}") from error


def source_digest(policy: Any) -> str | None:
    """Return a digest of the file that a policy's class is written in, None of ours.

    What it does may change while its name and its options stay.
    """
    kind = type(policy)
    if kind.__module__.partition(".")[0] == "jaxkv":
        return None
    try:
        source = Path(inspect.getfile(kind)).read_bytes()
    except (OSError, TypeError):
        try:
            source = inspect.getsource(kind).encode()  # of a notebook's cell
        except (OSError, TypeError):
            source = b""
    return hashlib.sha256(source).hexdigest()[:32]
