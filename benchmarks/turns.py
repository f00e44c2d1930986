"""Let processes that share a GPU compile side by side and be timed in turns."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

Lock = Annotated[Path | None, typer.Option(help="A file that processes wait for.")]


@contextlib.contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Wait until no other process is timed; `flock LOCK COMMAND` waits likewise."""
    with open(lock, "w") if lock else contextlib.nullcontext() as file:
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
