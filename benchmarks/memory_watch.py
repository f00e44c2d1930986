"""The most of a device's memory that was in use while something ran."""

import contextlib
import threading
from collections.abc import Iterator

from jaxkv.bench.clock import device_memory


class Memory:
    """The most of the device's memory that was in use; None where it does not tell."""

    peak: int | None = None


@contextlib.contextmanager
def watched(memory: Memory, every: float = 1e-3) -> Iterator[None]:
    """Note the device's use of memory in the context, sampled `every` so many seconds.

    The allocator's own peak never falls, so that one variant would hide the next.
    """
    stop = threading.Event()

    def watch():
        while (used := device_memory("bytes_in_use")) is not None:
            memory.peak = max(memory.peak or 0, used)
            if stop.wait(every):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
