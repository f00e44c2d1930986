"""What kernels a call launches on a GPU, and how long each of them takes."""

import collections
import dataclasses
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """All launches of one kernel.

    Attributes:
      us: microseconds on the device, all launches together, gaps left out.
      launches: how many.
    """

    us: float
    launches: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """What the first GPU did during a call.

    Attributes:
      span_us: from the first kernel's begin to the last one's end.
      idle_us: of them, while no kernel ran and nothing was copied.
      kernels: by name and grid, the longest first.
    """

    span_us: float
    idle_us: float
    kernels: dict[str, Kernel]


def trace_kernels(
    call: Callable[[], Result], per_call: float = 1
) -> tuple[dict[str, Kernel], Result]:
    """Return what JAX's profiler sees of one call on a GPU.

    XLA launches kernels one by one while it is profiled, also those that it records as
    CUDA graphs otherwise. So the gaps between them say nothing and are left out.

    Args:
      call: warmed up; its result is waited for.
      per_call: what times and launches are divided by.

    Returns:
      Kernels and copies by name, the longest first, none without a GPU; and the result.
    """
    planes, result = _traced(call)
    events = (event for _, event in _launches(planes))
    return _by_name(((event.name, event) for event in events), per_call), result


def trace_timeline(
    call: Callable[[], Result], per_call: float = 1
) -> tuple[Timeline, Result]:
    """Return what one call takes on the first GPU, and what it leaves idle.

    That XLA goes on recording CUDA graphs while it is profiled, a program must be told
    when it is compiled (`xla_enable_command_buffers_during_profiling`).

    Args:
      call: warmed up; its result is waited for.
      per_call: what times and launches are divided by.

    Returns:
      The timeline, all zero without a GPU; and the result.
    """
    planes, result = _traced(call)
    events = [event for plane, event in _launches(planes) if plane.endswith("GPU:0")]
    spans = [(event.start_ns, event.start_ns + event.duration_ns) for event in events]
    first = min((begin for begin, _ in spans), default=0)
    last = max((end for _, end in spans), default=0)
    span = (last - first) / 1e3
    named = ((f"{event.name}{_grid_of(event)}", event) for event in events)
    line = Timeline(
        span_us=span / per_call,
        idle_us=(span - busy_ns(spans) / 1e3) / per_call,
        kernels=_by_name(named, per_call),
    )
    return line, result


def busy_ns(spans: Iterable[tuple[float, float]]) -> float:
    """Return how long at least one of some spans of time lasted."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0, end - max(begin, until))
        until = max(until, end)
    return total


def _grid_of(event: Any) -> str:
    """Return how many programs a kernel has, as the profiler says it, if it does."""
    details = dict(event.stats).get("kernel_details", "")
    return "".join(f" {word}" for word in details.split() if word.startswith("grid:"))


def _traced(call: Callable[[], Result]) -> tuple[list[Any], Result]:
    """Return the planes of a profile of a call, and its result."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            result = jax.block_until_ready(call())
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        return list(jax.profiler.ProfileData.from_file(str(file)).planes), result


def _launches(planes: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yield what ran on GPUs: the name of each one's plane, and the event."""
    for plane in planes:
        for line in plane.lines if plane.name.startswith("/device:GPU") else ():
            if line.name.startswith("Stream"):
                for event in line.events:
                    yield plane.name, event


def _by_name(events: Iterable[tuple[str, Any]], per_call: float) -> dict[str, Kernel]:
    """Return kernels by name, the longest first."""
    us: dict[str, float] = collections.defaultdict(float)
    launches: dict[str, int] = collections.defaultdict(int)
    for name, event in events:
        us[name] += event.duration_ns / 1e3
        launches[name] += 1
    return {
        name: Kernel(us=time / per_call, launches=launches[name] / per_call)
        for name, time in sorted(us.items(), key=lambda item: -item[1])
    }


def kernel_times(
    function: Callable[[Any], Any], state: Any, per_call: int
) -> tuple[dict[str, float], Any]:
    """Return what the profiler sees of one call on a GPU.

    Args:
      function: from a state to the next.
      state: its buffers are taken.
      per_call: what the times are divided by.

    Returns:
      Microseconds of the four longest kernels by name, none without a GPU, and the
      state.
    """
    compiled = jax.jit(function, donate_argnums=0).lower(state).compile()
    state = jax.block_until_ready(compiled(state))
    kernels, state = trace_kernels(lambda: compiled(state), per_call)
    longest = itertools.islice(kernels.items(), 4)
    return {name: round(kernel.us, 2) for name, kernel in longest}, state
