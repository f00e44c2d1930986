"""The process of `jaxkv` and of `python -m jaxkv`, from its first moment.

Imports take seconds, and may be interrupted or fail: JAX reads its settings then.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator


def main() -> int:
    """Run the command line and return its exit code."""
    _open_standard_streams()
    try:
        with _interrupts_that_end():
            from jaxkv.cli.main import main as command
    except KeyboardInterrupt:
        return 130
    except ValueError as error:  # of a variable such as JAX_ENABLE_X64
        print(f"jaxkv: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return command()


@contextlib.contextmanager
def _interrupts_that_end() -> Iterator[None]:
    """Let Ctrl-C end the process at once, and not by an exception.

    Modules in C that are interrupted while they are imported raise another one.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield  # somebody ignores it, as shells do for what runs in the background
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _open_standard_streams() -> None:
    """Keep what is opened later from taking the place of a stream that is closed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


if __name__ == "__main__":
    sys.exit(main())
