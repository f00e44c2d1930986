"""Folders that Orbax fills, whole or absent: written beside, then renamed.

A marker, a file of JSON, tells whose folder it is.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxkv.models.checkpoint import CheckpointError


def checkpointer() -> Any:
    """Return what writes and reads a tree of arrays; a context manager."""
    # Imported here: it takes a second, which those who keep no copy need not wait.
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer()


def check_target(folder: Path, marker: str, what: str, *, overwrite: bool) -> None:
    """Raise CheckpointError where a folder holds anything that must not be replaced.

    Args:
      folder: absolute.
      marker: the name of the file that tells our folders from others.
      what: the folder is, for the message.
      overwrite: whether an older one of the kind is replaced.
    """
    if not folder.parent.is_dir():
        raise CheckpointError(f"{folder.parent} is not a folder; make it first.")
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise CheckpointError(f"{folder} exists and is not a folder; name another.")
    if not any(folder.iterdir()):
        return
    if not (folder / marker).is_file():
        raise CheckpointError(f"{folder} is not empty and not {what}; name another.")
    if not overwrite:
        raise CheckpointError(
            f"{folder} already holds {what}; pass overwrite=True to replace it."
        )


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, and give it its name once it is filled without an error.

    Args:
      folder: absolute. What it holds goes aside, then away.
    """
    # The process id keeps two writers apart; what a dead process left is replaced.
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _replace(folder, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(folder: Path, partial: Path) -> None:
    """Give the finished `partial` its name; an older folder goes aside, then away."""
    if not folder.exists():
        partial.rename(folder)
        return
    old = partial.with_suffix(".old")
    folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old)
