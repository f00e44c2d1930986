"""Let processes that share a GPU compile side by side and be timed in turns."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from jaxkv.text import pricing

Lock = Annotated[Path | None, typer.Option(help="A file that processes wait for.")]


@contextlib.contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Wait until no other process is timed; `flock LOCK COMMAND` waits likewise."""
    with open(lock, "w") if lock else contextlib.nullcontext() as file:
        if file is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def forget_prices() -> None:
    """Let the coming generations time their steps again.

    What others on the GPU did in between must not decide whether drafts are fed.
    """
    for prices in pricing.LEDGER.known():
        prices.timed.clear()
