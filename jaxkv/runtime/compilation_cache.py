"""Compiled programs on disk, for later processes."""

import errno
import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

MOST_BYTES = 2**30


def enable_compilation_cache(
    folder: str | os.PathLike[str] | None = None, *, most_bytes: int = MOST_BYTES
) -> Path | None:
    """Keep compiled programs on disk; later processes load them instead of compiling.

    The command line does so by itself. In Python nothing is written before this is
    called; call it first, because what is compiled already is not kept. A folder that
    JAX has been given (`JAX_COMPILATION_CACHE_DIR`) stays, with its limits.

    Args:
      folder: where; it may be new. Programs run as they are found there, so let nobody
        write into it whom you would not let run code. None is `jaxkv/programs` in
        `$XDG_CACHE_HOME` or `~/.cache`.
      most_bytes: size of the folder; what was used longest ago goes first.

    Returns:
      The folder in use; None where there is no home that can be written.

    Raises:
      ValueError: `most_bytes` is no positive number, or `folder` no path.
      OSError: a folder was named and cannot be written.
    """
    if (
        isinstance(most_bytes, bool)
        or not isinstance(most_bytes, int)
        or most_bytes < 1
    ):
        raise ValueError(
            "enable_compilation_cache: most_bytes is the size of the folder, a whole "
            f"number of at least 1, got {most_bytes!r}."
        )
    if not isinstance(folder, str | os.PathLike | None):
        raise ValueError(
            "enable_compilation_cache: folder is a path, as text or a pathlib.Path, or "
            f"None for that of the user, got {folder!r}."
        )
    given: Any = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if folder is None and given is not None:
        return Path(given)
    try:
        found = _writable(_at_home() if folder is None else Path(folder))
    except (OSError, RuntimeError):
        if folder is not None:
            raise
        return None  # no home, or a read-only one: compile each time
    _drop_unfinished(found)
    jax.config.update("jax_compilation_cache_dir", str(found))
    jax.config.update("jax_compilation_cache_max_size", most_bytes)
    # By default only slow and large programs are kept; all of ours together are small.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # JAX looks once, when it first compiles
    return found


def _at_home() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "jaxkv" / "programs"


def _writable(folder: Path) -> Path:
    """Return a folder that exists by now, or raise OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    return folder


def _drop_unfinished(folder: Path) -> None:
    """Delete programs that a process did not finish writing before it died.

    JAX writes a second file behind each; where it is missing, it can never make room.
    """
    for program in folder.glob("*-cache"):
        used = program.with_name(program.name.removesuffix("cache") + "atime")
        if not used.exists():
            program.unlink(missing_ok=True)
