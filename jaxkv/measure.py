"""What one decode step costs, against the fewest bytes that it could move.

A step at small batch is bound by memory: it reads every weight and every key and value
once. The floor is these bytes over the bandwidth of a plain copy, measured in the same
process; the ratio to it says how much is left to gain.

The cache is filled with random numbers instead of a prompt's, because time depends on
the number of slots, not on what lies in them. All slots are occupied, so each step
reads them all; the loop that is timed is the one that `jaxkv.generate` runs.
"""

import dataclasses
import functools
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkv import generation
from jaxkv import state as kv
from jaxkv.arguments import row_keys
from jaxkv.generation import Cache, Generation, Network, Options
from jaxkv.models.decoder import Config, parameter_shapes
from jaxkv.policies import DecodePolicy


class Seconds(NamedTuple):
    """How long a program took to become runnable.

    Attributes:
      trace: Python to jaxpr to StableHLO.
      compile: StableHLO to machine code, or out of the compilation cache.
    """

    trace: float
    compile: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.trace + self.compile


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTiming:
    """One batch size; times in milliseconds, memory in bytes.

    Attributes:
      batch: rows.
      slots: of each layer, all occupied; each step reads them all.
      steps: of one timed call.
      calls_ms: time per step of each timed call, in the order they were made.
      step_ms: their median.
      tokens_per_second: over all rows, from the median.
      state_bytes: of the whole cache, bookkeeping included.
      weight_bytes: that a step must read; see `weight_bytes`.
      kv_bytes: of all keys and values, which a step must read.
      floor_ms: weights, keys and values over the copy bandwidth.
      ratio_to_floor: `step_ms / floor_ms`.
      trace_seconds: see `Seconds`.
      compile_seconds: see `Seconds`.
      program_bytes: arguments, results that share no memory with them, and
        temporaries of the compiled loop; exact, from the compiler.
      temp_bytes: the temporaries alone. A copied cache would show here.
      peak_bytes: highest use of the device's memory so far in this process, making the
        random weights included; None where the device does not tell.
    """

    batch: int
    slots: int
    steps: int
    calls_ms: tuple[float, ...]
    step_ms: float
    tokens_per_second: float
    state_bytes: int
    weight_bytes: int
    kv_bytes: int
    floor_ms: float
    ratio_to_floor: float
    trace_seconds: float
    compile_seconds: float
    program_bytes: int | None
    temp_bytes: int | None
    peak_bytes: int | None


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

    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        array = jax.block_until_ready(call(array))
        seconds.append(time.perf_counter() - begin)
    return 2 * array.nbytes * passes / statistics.median(seconds[1:])


def weight_bytes(params: Any, config: Config) -> int:
    """Return the bytes of weights that one decode step has to read.

    An embedding that is looked up costs one row per token, which is left out; a tied
    one is the output layer as well, and is read whole.
    """
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    if config.tied:
        return total
    embedding = params["embedding"]
    return total - embedding.size * embedding.dtype.itemsize


def key_value_bytes(cache: Cache) -> int:
    """Return the bytes of all keys and values, without the bookkeeping."""
    return sum(state.keys.nbytes + state.values.nbytes for state in cache)


def floor_ms(num_bytes: int, bandwidth: float) -> float:
    """Return the milliseconds that moving `num_bytes` takes at bytes per second."""
    return 1e3 * num_bytes / bandwidth


def full_cache(
    config: Config, *, batch: int, slots: int, dtype: jax.typing.DTypeLike, key: Any
) -> Cache:
    """Return states whose slots are all occupied, slot `s` by position `s`."""

    @jax.jit
    def layer(key):
        shape = (batch, config.num_kv_heads, slots, config.head_dim)
        keys, values = jax.random.split(key)
        order = jnp.arange(slots, dtype=jnp.int32)
        return kv.KVState(
            keys=jax.random.normal(keys, shape, dtype),
            values=jax.random.normal(values, shape, dtype),
            positions=jnp.broadcast_to(order, shape[:3]),
            target=jnp.zeros(shape[:2], jnp.int32),
        )

    return tuple(layer(k) for k in jax.random.split(key, config.num_layers))


def rewind(
    cache: Cache, *, steps: int, context: int, policy: DecodePolicy
) -> Generation:
    """Return a generation that is about to produce `steps` tokens from `context` on.

    Without eviction the new tokens go to the last `steps` slots. Random tokens lie
    there already, so that the first step reads as many slots as the last.

    Args:
      cache: its buffers move into the result, all slots occupied again.
      steps: size of the output buffer.
      context: position of the next token.
      policy: what decodes; it begins anew, its memory included.
    """
    batch, kv_heads, slots, _ = cache[0].keys.shape
    first = 0 if policy.evicts else slots - steps
    order = jnp.arange(slots, dtype=jnp.int32)
    cache = tuple(
        policy.begin(
            dataclasses.replace(
                state,
                positions=jnp.broadcast_to(order, state.positions.shape),
                target=jnp.full((batch, kv_heads), first, jnp.int32),
                memory=(),
            ),
            jnp.full(batch, min(context, slots), jnp.int32),
        )
        for state in cache
    )
    return Generation(
        tokens=jnp.full((batch, steps), -1, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        last=jnp.zeros(batch, jnp.int32),
        position=jnp.full(batch, context, jnp.int32),
        cache=cache,
        keys=row_keys(0, batch),
        seen=None,
    )


def compile_stage(stage: Any) -> tuple[Any, Seconds]:
    """Compile what `jit(f).lower` of a thunk returns, and time both halves.

    Args:
      stage: a function of no arguments that lowers.
    """
    begin = time.perf_counter()
    lowered = stage()
    traced = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    return compiled, Seconds(traced - begin, end - traced)


def time_decode(
    network: Network,
    params: Any,
    *,
    batch: int,
    context: int,
    steps: int,
    repeats: int,
    options: Options,
    bandwidth: float,
) -> DecodeTiming:
    """Time calls of `generation.advance_jit`, each of `steps` tokens per row.

    Args:
      network: static.
      params: its parameters.
      batch: rows.
      context: tokens so far, the new ones included if nothing is evicted.
      steps: of one call.
      repeats: timed calls, after one that warms up.
      options: static.
      bandwidth: of a copy, bytes per second.

    Returns:
      Times and bytes.

    Raises:
      RuntimeError: the loop did not produce `steps` valid tokens per row.
    """
    config = network.config
    cache = full_cache(
        config,
        batch=batch,
        slots=options.num_slots(context - steps, steps),
        dtype=params["embedding"].dtype,
        key=jax.random.key(1),
    )
    where = dict(steps=steps, context=context, policy=options.decode)
    state = rewind(cache, **where)
    until, stop_ids = jnp.int32(steps), jnp.array([-1], jnp.int32)
    program, seconds = compile_stage(
        lambda: generation.advance_jit.lower(
            network, params, state, until, stop_ids, options=options
        )
    )
    calls = []
    for _ in range(repeats + 1):
        state = jax.block_until_ready(rewind(cache, **where))
        begin = time.perf_counter()
        state = jax.block_until_ready(program(params, state, until, stop_ids))
        calls.append(1e3 * (time.perf_counter() - begin) / steps)
        cache = state.cache
    if not ((state.tokens >= 0) & (state.tokens < config.vocab_size)).all():
        raise RuntimeError("time_decode: the loop produced invalid tokens.")
    calls = tuple(calls[1:])
    median = statistics.median(calls)
    weights, kv_bytes = weight_bytes(params, config), key_value_bytes(cache)
    floor = floor_ms(weights + kv_bytes, bandwidth)
    return DecodeTiming(
        batch=batch,
        slots=cache[0].slots,
        steps=steps,
        calls_ms=calls,
        step_ms=median,
        tokens_per_second=1e3 * batch / median,
        state_bytes=kv.num_bytes(cache),
        weight_bytes=weights,
        kv_bytes=kv_bytes,
        floor_ms=floor,
        ratio_to_floor=median / floor,
        trace_seconds=seconds.trace,
        compile_seconds=seconds.compile,
        **_memory(program),
        peak_bytes=(jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    )


def compile_generate(
    network: Network,
    *,
    dtype: jax.typing.DTypeLike,
    batch: int,
    prompt: int,
    max_out: int,
    options: Options,
) -> dict[str, Seconds]:
    """Compile both halves of `jaxkv.generate` without making a single weight.

    Args:
      network: static.
      dtype: of parameters and cache.
      batch: rows.
      prompt: padded tokens.
      max_out: size of the output buffer.
      options: static.

    Returns:
      Seconds of "start" (prefill and the first token) and "advance" (the loop).
    """
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype),
        parameter_shapes(network.config),
    )
    tokens, lengths, stop_ids, until = (
        jax.ShapeDtypeStruct(shape, jnp.int32)
        for shape in ((batch, prompt), (batch,), (1,), ())
    )
    keys = jax.eval_shape(lambda: row_keys(0, batch))
    start = functools.partial(
        generation.start_jit,
        network,
        options=options,
        slots=options.num_slots(prompt, max_out),
        max_out=max_out,
    )
    arguments = (params, tokens, lengths, keys, stop_ids)
    _, first = compile_stage(
        lambda: generation.start_jit.lower(network, *arguments, **start.keywords)
    )
    state = jax.eval_shape(start, *arguments)
    _, loop = compile_stage(
        lambda: generation.advance_jit.lower(
            network, params, state, until, stop_ids, options=options
        )
    )
    return {"start": first, "advance": loop}


def _memory(program: Any) -> dict[str, int | None]:
    """Return what the compiler says about a program's memory; None if nothing."""
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
