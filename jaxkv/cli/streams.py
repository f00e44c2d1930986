"""Standard output and standard error as a process finds them.

They may be closed, a pipe whose reader has gone, a full disk, or a terminal that has no
letters for what a model writes. None of that may lose what was computed, or show a
traceback.
"""

import codecs
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

_ESCAPED = "jaxkv.escaped"  # how this module's handler of errors is named


@contextlib.contextmanager
def escaped_output() -> Iterator[Callable[[], bool]]:
    r"""Let stdout write escapes, as in `\xe9`, for what its encoding does not hold.

    Yields:
      A function that says whether it has come to that.
    """
    happened: list[bool] = []

    def escape(error: UnicodeError) -> tuple[str | bytes, int]:
        happened.append(True)
        return codecs.backslashreplace_errors(error)

    codecs.register_error(_ESCAPED, escape)
    stream: Any = sys.stdout
    before = getattr(stream, "errors", None)
    # Whoever has chosen another way, as PYTHONIOENCODING can, has it.
    ours = before in ("strict", "surrogateescape") and hasattr(stream, "reconfigure")
    if ours:
        stream.reconfigure(errors=_ESCAPED)
    try:
        yield lambda: bool(happened)
    finally:
        if ours:
            with contextlib.suppress(OSError, ValueError):  # it flushes
                stream.reconfigure(errors=before)


@contextlib.contextmanager
def flushed_output() -> Iterator[None]:
    """Flush both streams at the end, and close the way to one that takes nothing more.

    The interpreter would flush again at its own end, and complain.
    """
    streams = sys.stdout, sys.stderr
    try:
        yield
    finally:
        for stream in streams:
            try:
                stream.flush()
            except (OSError, ValueError):
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.stdout, sys.stderr = streams  # typer wraps those of a reader that has gone


def complain(message: str) -> None:
    """Print an error in one line on stderr, if anybody is there."""
    with contextlib.suppress(OSError):
        print(f"jaxkv: error: {' '.join(message.split())}", file=sys.stderr)
