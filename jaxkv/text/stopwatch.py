"""Seconds of a call by what they were spent on: compiling, or all else."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Lap(NamedTuple):
    """Seconds of a phase; what is not `compiling` is `computing`."""

    compiling: float
    computing: float


@contextlib.contextmanager
def stopwatch() -> Iterator[Callable[[], Lap]]:
    """Yield a function that returns the seconds since its last call, or the start.

    Tracing, lowering and compiling are told apart by JAX's own events.
    """
    seconds: list[float] = []
    thread = threading.get_ident()
    begin = time.perf_counter()

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        # Another thread may compile for a call of its own.
        if event in _COMPILING and threading.get_ident() == thread:
            seconds.append(duration_secs)

    def lap() -> Lap:
        nonlocal begin
        now = time.perf_counter()
        compiling, elapsed = sum(seconds), now - begin
        begin = now
        seconds.clear()
        return Lap(compiling, max(elapsed - compiling, 0.0))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lap
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
