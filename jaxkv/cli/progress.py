"""What long commands show of their progress: a bar, or a line a minute in a log."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from jaxkv.cli.terminal import progress

Show = Callable[[str, int, int], None]  # what is done, how much of it, of how much

MINUTE = 60.0  # seconds


@contextlib.contextmanager
def shown(what: str, *, every: float = MINUTE) -> Iterator[Show]:
    """Show what is done on stderr while the block runs.

    Args:
      what: is done at first, of an unknown size.
      every: seconds between lines where stderr is no terminal.

    Yields:
      A function that is told what is done, how much of it, and of how much.
    """
    with progress() as bar:
        task = bar.add_task(what)
        if not bar.disable:
            yield lambda text, done, total: bar.update(
                task, description=text, completed=done, total=total
            )
            return
        with _lines(what, every) as show:
            yield show


@contextlib.contextmanager
def _lines(what: str, every: float) -> Iterator[Show]:
    begin, ended = time.monotonic(), threading.Event()
    state = [what]  # a line; replaced whole, so that no half of it is ever read

    def show(text: str, done: int, total: int) -> None:
        state[0] = f"{text}, {done} of {total}"

    def write() -> None:
        while not ended.wait(every):
            minutes = (time.monotonic() - begin) / 60
            with contextlib.suppress(OSError, ValueError):  # stderr has been closed
                print(f"jaxkv: {minutes:.0f} min: {state[0]}", file=sys.stderr)
                sys.stderr.flush()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield show
    finally:
        ended.set()
        writer.join()
