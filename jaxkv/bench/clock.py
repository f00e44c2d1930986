"""Seconds of calls, bandwidth of a copy, and bytes of memory."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

State = TypeVar("State")


def timed(
    call: Callable[[State], State],
    state: State,
    repeats: int,
    *,
    prepare: Callable[[State], State] = lambda state: state,
    units: Callable[[State], float] = lambda state: 1,
) -> tuple[tuple[float, ...], State]:
    """Time calls that go on from one another, after one that warms up.

    Args:
      call: from a state to the next; it may take the state's buffers.
      state: of the first call.
      repeats: timed calls.
      prepare: makes the next call's state of the last one's, while no clock runs.
      units: of work in a call, by which its time is divided, from the state after it.

    Returns:
      Seconds per unit of each timed call, in their order, and the last state.
    """
    state = jax.block_until_ready(call(state))
    seconds = []
    for _ in range(repeats):
        state = jax.block_until_ready(prepare(state))
        begin = time.perf_counter()
        state = jax.block_until_ready(call(state))
        seconds.append((time.perf_counter() - begin) / units(state))
    return tuple(seconds), state


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Return the median seconds of a call, after one that compiles or warms up."""

    def run(_: None) -> None:
        jax.block_until_ready(call())  # and let go, to leave room for the next result

    seconds, _ = timed(run, None, repeats)
    return statistics.median(seconds)


def time_loop(
    function: Callable[[State], State], state: State, iterations: int, repeats: int = 5
) -> tuple[tuple[float, ...], State, int]:
    """Time a function of a state in a compiled loop.

    Args:
      function: from a state to the next.
      state: its buffers are taken.
      iterations: of the loop.
      repeats: timed calls of the loop, after one that warms up.

    Returns:
      Seconds per iteration of each call, the last state, and the bytes of temporaries.
    """

    def loop(state):
        return jax.lax.fori_loop(0, iterations, lambda _, s: function(s), state)

    compiled = jax.jit(loop, donate_argnums=0).lower(state).compile()
    seconds, state = timed(compiled, state, repeats, units=lambda _: iterations)
    return seconds, state, program_memory(compiled)["temp_bytes"] or 0


def copy_bandwidth(num_bytes: int, repeats: int = 5, passes: int = 10) -> float:
    """Measure a pass over the device's memory, counting bytes read plus written.

    Args:
      num_bytes: size of the array, which each pass reads and writes whole; far more
        than any cache of the chip.
      repeats: the median of this many calls is returned.
      passes: of one call, so that its launch, some 5 % of one pass, does not count.

    Returns:
      Bytes per second.
    """
    # Random, because some chips move zeros faster.
    array = jax.random.bits(jax.random.key(0), (num_bytes // 4,), jnp.uint32)

    @functools.partial(jax.jit, donate_argnums=0)
    def call(array):
        return jax.lax.fori_loop(
            0, passes, lambda i, x: x ^ i.astype(jnp.uint32), array
        )

    seconds, array = timed(call, array, repeats)
    return 2 * array.nbytes * passes / statistics.median(seconds)


def device_memory(key: str) -> int | None:
    """Return an entry of the device's memory statistics; None if it has no such.

    Args:
      key: `bytes_in_use`, `peak_bytes_in_use` or `bytes_limit`, all in bytes.
    """
    return (jax.devices()[0].memory_stats() or {}).get(key)


def program_memory(program: Any) -> dict[str, int | None]:
    """Return what the compiler says about a program's memory; None if nothing.

    Args:
      program: compiled.

    Returns:
      Bytes of `program_bytes` (arguments, results that share no memory with them, and
      temporaries) and of `temp_bytes` (the temporaries alone).
    """
    analysis = program.memory_analysis()
    if analysis is None:
        return {"program_bytes": None, "temp_bytes": None}
    temp = analysis.temp_size_in_bytes
    return {
        "program_bytes": analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + temp,
        "temp_bytes": temp,
    }
