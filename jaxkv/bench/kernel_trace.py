"""What kernels a call launches on a GPU, and how long each of them takes."""

import collections
import dataclasses
import itertools
import pathlib
import tempfile
from collections.abc import Callable
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
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            result = jax.block_until_ready(call())
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        us: dict[str, float] = collections.defaultdict(float)
        launches: dict[str, int] = collections.defaultdict(int)
        for plane in planes:
            for line in plane.lines if plane.name.startswith("/device:GPU") else ():
                if line.name.startswith("Stream"):
                    for event in line.events:
                        us[event.name] += event.duration_ns / 1e3
                        launches[event.name] += 1
    kernels = {
        name: Kernel(us=time / per_call, launches=launches[name] / per_call)
        for name, time in sorted(us.items(), key=lambda item: -item[1])
    }
    return kernels, result


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
