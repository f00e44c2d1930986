"""What a whole generation takes, from a sample of its decode steps.

A step of the full cache grows with every token, so 16,000 of them are cut into ranges
and a few are timed in the middle of each, on a cache with as many slots as the whole
generation needs and as many of them occupied as there would be. A policy that evicts
needs ranges only until its slots are full; from there on all steps are alike.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxkv import generation, sharding
from jaxkv import state as kv
from jaxkv.attention import Network
from jaxkv.bench import clock, compiling, decode_step
from jaxkv.models.config import Config
from jaxkv.options import Options
from jaxkv.runtime.meshes import mesh_of
from jaxkv.runtime.seeds import row_keys
from jaxkv.text.planning import bucket

# Of the device's memory, that a plan may use: allocators lose some between arrays.
USABLE = 0.97


@dataclasses.dataclass(frozen=True, kw_only=True)
class Range:
    """Decode steps of which a few are timed.

    Attributes:
      start: steps before it.
      stop: steps before its end.
      filled: occupied slots before the first timed step.
      position: of the first timed step's token.
    """

    start: int
    stop: int
    filled: int
    position: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What is generated, and how much of it is timed.

    Attributes:
      prompt: tokens of each prompt.
      new: tokens of each output, the first of which prefill gives.
      ranges: that a cache which grows until the end is cut into.
      steps: timed in each range, in one call.
      repeats: timed calls.
      prefill_rows: prompts that are prefilled at once when prefill is timed.
    """

    prompt: int
    new: int
    ranges: int = 8
    steps: int = 16
    repeats: int = 3
    prefill_rows: int = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Throughput:
    """One method at one batch size; memory in bytes.

    Attributes:
      batch: rows.
      slots: of each layer.
      tokens_per_second: new tokens of all rows over `seconds`.
      seconds: of the whole generation: `prefill_seconds + decode_seconds`.
      prefill_seconds: until the first token, from a part of the rows.
      decode_seconds: of all other tokens, from the ranges; see `whole_seconds`.
      ratio_to_floor: `decode_seconds` over what reading the weights and the occupied
        slots takes at the copy bandwidth.
      ranges: each with its fields, `step_ms` (the median of `calls_ms`, milliseconds
        per step) and `floor_ms`.
      state_bytes: of the whole cache, bookkeeping included.
      program_bytes: weights, cache and temporaries of the decode loop, from the
        compiler.
      temp_bytes: the temporaries alone.
      peak_bytes: highest use of the device's memory in this process, if it was reached
        while this was timed; else None, as where the device does not tell.
      trace_seconds: see `compiling.Seconds`.
      compile_seconds: likewise.
    """

    batch: int
    slots: int
    tokens_per_second: float
    seconds: float
    prefill_seconds: float
    decode_seconds: float
    ratio_to_floor: float
    ranges: tuple[dict[str, Any], ...]
    state_bytes: int
    program_bytes: int | None
    temp_bytes: int | None
    peak_bytes: int | None
    trace_seconds: float
    compile_seconds: float


def split(work: Work, slots: int) -> tuple[Range, ...]:
    """Cut a generation's decode steps into ranges.

    While slots are free, ranges are equally long but for one step, and in proportion
    as many as `work.ranges`; all steps with full slots are one range.

    Args:
      work: what is generated.
      slots: of each layer.
    """
    total = work.new - 1  # prefill gives the first token
    growing = max(0, min(total, slots - work.prompt))
    number = min(growing, math.ceil(work.ranges * growing / total))
    edges = [growing * i // number for i in range(number + 1)] if number else [0]
    if growing < total:
        edges.append(total)
    found = []
    for start, stop in itertools.pairwise(edges):
        first = min(max(0, (start + stop - work.steps) // 2), total - work.steps)
        if start >= growing:
            first = max(first, start)  # all slots are full
        position = work.prompt + first
        filled = min(position, slots)
        found.append(Range(start=start, stop=stop, filled=filled, position=position))
    return tuple(found)


def whole_seconds(ranges: Sequence[Range], step_ms: Sequence[float]) -> float:
    """Return the seconds of all steps, if each costs what its range's sample does.

    For a cost that is linear in the number of tokens this is exact, because samples
    lie in the middle.
    """
    return sum(
        (part.stop - part.start) * ms / 1e3
        for part, ms in zip(ranges, step_ms, strict=True)
    )


def sampling(work: Work) -> str:
    """Return one paragraph that says how a result came about."""
    return (
        f"Each method generates {work.new} tokens after prompts of {work.prompt}, stop "
        "ids ignored. The cache has all slots of the whole generation from the start. "
        f"The {work.new - 1} decode steps, until its slots are full, are cut into "
        f"equal ranges ({work.ranges} if they never are, else in proportion); the rest "
        "is one range more. In the middle of each range, with as many "
        f"slots occupied as at that step, {work.steps} steps are timed in one call of "
        f"the loop that generate runs, launch included, {work.repeats} times after one "
        "that warms up; the median stands for every step of the range. Prefill is "
        f"timed on at most {work.prefill_rows} rows at once and counted in proportion. "
        f"Tokens per second are batch x {work.new} over prefill and decode together; "
        "compilation is left out."
    )


def bytes_needed(
    config: Config, work: Work, options: Options, dtype: Any, *, batch: int
) -> int:
    """Estimate from shapes alone what a generation needs beside the weights.

    That is the cache, two more copies of its positions, which are made anew for each
    range, and the larger of what prefill of all rows at once and the logits of one step
    take.
    """
    state = _state_shapes(config, work, options, dtype, batch=batch)
    positions = sum(2 * layer.positions.size * 4 for layer in state.cache)
    width = jnp.dtype(dtype).itemsize
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    inner = config.intermediate_size
    if config.experts is not None:  # each token has a row for each of its experts
        inner = config.experts.per_token * (config.experts.size + config.hidden_size)
    token = 3 * inner + 2 * config.hidden_size + heads
    prefill = batch * bucket(work.prompt) * token * width
    logits = batch * config.vocab_size * (4 + width)
    return kv.num_bytes(state.cache) + positions + max(prefill, logits)


def largest_batch(
    config: Config, work: Work, options: Options, dtype: Any, *, room: int
) -> int:
    """Return the most rows whose `bytes_needed` are at most `room`; 0 if none."""
    one, two = (
        bytes_needed(config, work, options, dtype, batch=batch) for batch in (1, 2)
    )
    # What does not depend on the batch is next to nothing, but counts.
    return max(0, 1 + (room - one) // (two - one))


def automatic_batches(largest: int) -> list[int]:
    """Return 1, 8, powers of two from 32 on, and the largest, a multiple of four."""
    largest -= largest % 4 if largest > 4 else 0
    powers = [1, 8, *(2**i for i in range(5, 31))]
    return [batch for batch in powers if batch < largest] + [largest]


def time_generation(
    network: Network,
    params: Any,
    *,
    batch: int,
    work: Work,
    options: Options,
    bandwidth: float,
    prefill_seconds: float,
) -> Throughput:
    """Time one method at one batch size, by one compiled program for all ranges.

    Args:
      network: static.
      params: its parameters.
      batch: rows.
      work: what is generated.
      options: static.
      bandwidth: of a copy, bytes per second.
      prefill_seconds: of all rows.
    """
    config, dtype, mesh = network.config, params["embedding"].dtype, mesh_of(params)
    slots = options.num_slots(work.prompt, work.new)
    before = clock.device_memory("peak_bytes_in_use")
    shapes = _state_shapes(config, work, options, dtype, batch=batch)
    if mesh is not None:
        shapes = _laid_out(shapes, mesh)
    # Before the cache is made, because compiling tries out kernels and needs memory.
    program, seconds = decode_step.compile_steps(
        network, params, shapes, options=options
    )
    cache = decode_step.full_cache(
        config,
        batch=batch,
        slots=slots,
        dtype=dtype,
        key=jax.random.key(1),
        mesh=mesh,
    )
    state_bytes = kv.num_bytes(shapes.cache)
    weights = decode_step.weight_bytes(params, config, batch=batch)
    per_slot = decode_step.key_value_bytes(cache) / slots
    shares = decode_step.shares_of(mesh)
    ranges, records = split(work, slots), []
    for part in ranges:
        calls, cache = decode_step.time_calls(
            program,
            params,
            cache,
            repeats=work.repeats,
            steps=work.steps,
            context=part.position,
            policy=options.decode,
            filled=part.filled,
        )
        occupied = min(part.filled + work.steps / 2, slots)
        read = weights / shares[0] + per_slot * occupied / shares[1]
        floor = decode_step.floor_ms(read, bandwidth)
        record = dataclasses.asdict(part) | {"step_ms": statistics.median(calls)}
        records.append(record | {"calls_ms": calls, "floor_ms": floor})
    decode = whole_seconds(ranges, [record["step_ms"] for record in records])
    floor = whole_seconds(ranges, [record["floor_ms"] for record in records])
    peak = clock.device_memory("peak_bytes_in_use")
    return Throughput(
        batch=batch,
        slots=slots,
        tokens_per_second=batch * work.new / (prefill_seconds + decode),
        seconds=prefill_seconds + decode,
        prefill_seconds=prefill_seconds,
        decode_seconds=decode,
        ratio_to_floor=decode / floor,
        ranges=tuple(records),
        state_bytes=state_bytes,
        **clock.program_memory(program),
        peak_bytes=None if peak == before else peak,
        trace_seconds=seconds.trace,
        compile_seconds=seconds.compile,
    )


def time_prefill(
    network: Network, params: Any, *, rows: int, work: Work, options: Options
) -> float:
    """Return the median seconds until the first token of some rows.

    Args:
      network: static.
      params: its parameters.
      rows: that are prefilled together.
      work: what is generated.
      options: static.
    """
    shape = (rows, bucket(work.prompt))
    tokens = jax.random.randint(
        jax.random.key(2), shape, 0, network.config.vocab_size, jnp.int32
    )
    arguments = (
        tokens,
        jnp.full(rows, work.prompt, jnp.int32),
        row_keys(0, rows),
        jnp.array([-1], jnp.int32),
    )
    program, _ = compiling.compile_stage(
        lambda: generation.start_jit.lower(
            network,
            params,
            *arguments,
            options=options,
            slots=options.num_slots(work.prompt, work.new),
            max_out=work.new,
        )
    )
    return clock.median_seconds(lambda: program(params, *arguments), work.repeats)


def _state_shapes(config, work, options, dtype, *, batch):
    """Return the shapes of the state that the loop is compiled for."""

    def make():
        cache = decode_step.full_cache(
            config,
            batch=batch,
            slots=options.num_slots(work.prompt, work.new),
            dtype=dtype,
            key=jax.random.key(0),
        )
        return decode_step.rewind(
            cache, steps=work.steps, context=work.prompt, policy=options.decode
        )

    return jax.eval_shape(make)


def _laid_out(shapes, mesh):
    """Return the shapes of a state with where each lies, as `rewind` leaves it."""

    def at(shape, where):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    cache = tuple(
        jax.tree.map(at, layer, sharding.state_shardings(layer, mesh))
        for layer in shapes.cache
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    rest = dataclasses.replace(shapes, cache=())
    rest = jax.tree.map(lambda shape: at(shape, everywhere), rest)
    return dataclasses.replace(rest, cache=cache)
