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
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv import generation, sharding
from jaxkv import state as kv
from jaxkv.attention import Network
from jaxkv.bench import clock
from jaxkv.bench.compiling import Seconds, compile_stage
from jaxkv.bench.kernel_trace import Kernel, trace_kernels
from jaxkv.models.config import Config
from jaxkv.options import Options
from jaxkv.policies.base import DecodePolicy
from jaxkv.ring import of_layer
from jaxkv.runtime.meshes import everywhere, mesh_of
from jaxkv.runtime.seeds import row_keys
from jaxkv.sequences import Generation
from jaxkv.state import Cache


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
      floor_ms: weights, keys and values over the copy bandwidth; over a mesh, one
        device's share of them, without the time of exchanges.
      ratio_to_floor: `step_ms / floor_ms`.
      trace_seconds: see `compiling.Seconds`.
      compile_seconds: see `compiling.Seconds`.
      program_bytes: arguments, results that share no memory with them, and
        temporaries of the compiled loop; exact, from the compiler.
      temp_bytes: the temporaries alone. A copied cache would show here.
      peak_bytes: highest use of the device's memory so far in this process, making the
        random weights included; None where the device does not tell.
      kernels: of one step, by name, the longest first, the mean of all devices; empty
        if not asked for, or where there is no GPU.
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
    kernels: dict[str, Kernel]


def weight_bytes(params: Any, config: Config, *, batch: int = 1) -> int:
    """Return the bytes of weights that one decode step has to read.

    An embedding that is looked up costs one row per token, which is left out; a tied
    one is the output layer as well, and is read whole. Of experts, those count that a
    batch uses where each token's choice is random.

    Args:
      params: of the network, or their shapes.
      config: of the network.
      batch: tokens of the step.
    """
    used = 1.0
    if config.experts is not None:
        used -= (1 - config.experts.per_token / config.experts.count) ** batch
    total = 0.0
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name != "embedding" or config.tied:
            share = used if name.startswith("experts_") else 1
            total += share * x.size * x.dtype.itemsize
    return round(total)


def key_value_bytes(cache: Cache) -> int:
    """Return the bytes of all keys and values, without the bookkeeping."""
    return sum(state.keys.nbytes + state.values.nbytes for state in cache)


def floor_ms(num_bytes: float, bandwidth: float) -> float:
    """Return the milliseconds that moving `num_bytes` takes at bytes per second."""
    return 1e3 * num_bytes / bandwidth


def shares_of(mesh: jax.sharding.Mesh | None) -> tuple[int, int]:
    """Return over how many devices weights lie, and keys and values."""
    if mesh is None:
        return 1, 1
    return sharding.devices_of_a_row(mesh), mesh.shape["model"] * mesh.shape["data"]


def full_cache(
    config: Config,
    *,
    batch: int,
    slots: int,
    dtype: jax.typing.DTypeLike,
    key: Any,
    mesh: jax.sharding.Mesh | None = None,
) -> Cache:
    """Return states whose slots are all occupied, slot `s` by position `s`.

    All rows hold the same random numbers, so that making them needs little memory
    beside the cache itself, which may fill the device. Over a mesh, each device makes
    its own part. A layer with a window has that many slots.
    """

    def layer(key, window):
        shape = (batch, config.num_kv_heads, window or slots, config.head_dim)
        row = (1, *shape[1:])
        keys, values = jax.random.split(key)
        order = jnp.arange(shape[2], dtype=jnp.int32)
        return kv.KVState(
            keys=jnp.broadcast_to(jax.random.normal(keys, row, dtype), shape),
            values=jnp.broadcast_to(jax.random.normal(values, row, dtype), shape),
            positions=jnp.broadcast_to(order, shape[:3]),
            target=jnp.zeros(shape[:2], jnp.int32),
            window=window,
        )

    made = {}
    for window in dict.fromkeys(config.windows):
        run, where = functools.partial(layer, window=window), None
        if mesh is not None:
            where = sharding.state_shardings(jax.eval_shape(run, key), mesh)
        made[window] = jax.jit(run, out_shardings=where)
    keys = jax.random.split(key, config.num_layers)
    return tuple(made[w](k) for w, k in zip(config.windows, keys, strict=True))


def rewind(
    cache: Cache,
    *,
    steps: int,
    context: int,
    policy: DecodePolicy,
    filled: int | None = None,
) -> Generation[None]:
    """Return a generation that is about to produce `steps` tokens from `context` on.

    Args:
      cache: its buffers move into the result.
      steps: size of the output buffer.
      context: position of the next token.
      policy: what decodes; it begins anew, its memory included.
      filled: how many slots are occupied, the first ones; new tokens go behind them.
        None occupies all. Without eviction the new tokens then go to the last `steps`
        slots, where random tokens lie already, so that the first step reads as many
        slots as the last.
    """
    batch, kv_heads, slots, _ = kv.global_layers(cache)[0].keys.shape
    order = jnp.arange(slots, dtype=jnp.int32)
    if filled is None:
        filled = slots
        first = 0 if policy.evicts else slots - steps
    else:
        first = filled % slots
        order = jnp.where(order < filled, order, kv.FREE)

    def begin(state):
        held = order
        if state.window is not None:  # the last tokens, whatever is in the others
            held = jnp.arange(state.slots, dtype=jnp.int32)
            held = jnp.where(held < context, held, kv.FREE)
        fresh = dataclasses.replace(
            state,
            positions=jnp.broadcast_to(held, state.positions.shape),
            target=jnp.full((batch, kv_heads), first, jnp.int32),
            memory=(),
        )
        lengths = jnp.full(batch, min(context, slots), jnp.int32)
        return of_layer(policy, state).begin(fresh, lengths)

    cache = tuple(map(begin, cache))
    begun: Generation[None] = Generation(
        tokens=jnp.full((batch, steps), -1, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        finite=jnp.ones(batch, bool),
        last=jnp.zeros(batch, jnp.int32),
        position=jnp.full(batch, context, jnp.int32),
        cache=cache,
        rngs=row_keys(0, batch),
        seen=None,
        speculation=None,
    )
    mesh = mesh_of(cache[0].keys)
    if mesh is None:
        return begun
    # Where the loop leaves it, so that no call moves it.
    states = tuple(
        jax.device_put(x, sharding.state_shardings(x, mesh)) for x in begun.cache
    )
    rest = everywhere(dataclasses.replace(begun, cache=()), mesh)
    return dataclasses.replace(rest, cache=states)


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
    profile: bool = False,
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
      profile: see `DecodeTiming.kernels`.

    Returns:
      Times and bytes.

    Raises:
      RuntimeError: see `time_calls`.
    """
    config, mesh = network.config, mesh_of(params)
    cache = full_cache(
        config,
        batch=batch,
        slots=options.num_slots(context - steps, steps),
        dtype=params["embedding"].dtype,
        key=jax.random.key(1),
        mesh=mesh,
    )
    where: dict[str, Any] = dict(steps=steps, context=context, policy=options.decode)
    state = rewind(cache, **where)
    program, seconds = compile_steps(network, params, state, options=options)
    calls, cache = time_calls(program, params, state.cache, repeats=repeats, **where)
    kernels: dict[str, Any] = {}
    if profile:
        state = jax.block_until_ready(rewind(cache, **where))
        # Made and waited for before, so that their kernels are not among the step's.
        ends = jax.block_until_ready(loop_ends(state))
        shared = steps * (1 if mesh is None else mesh.size)
        kernels, state = trace_kernels(lambda: program(params, state, *ends), shared)
        cache = state.cache
    median = statistics.median(calls)
    weights = weight_bytes(params, config, batch=batch)
    kv_bytes = key_value_bytes(cache)
    shares = shares_of(mesh)
    floor = floor_ms(weights / shares[0] + kv_bytes / shares[1], bandwidth)
    return DecodeTiming(
        batch=batch,
        slots=kv.global_layers(cache)[0].slots,
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
        **clock.program_memory(program),
        peak_bytes=clock.device_memory("peak_bytes_in_use"),
        kernels=kernels,
    )


def compile_steps(
    network: Network, params: Any, state: Generation[None], *, options: Options
) -> tuple[Any, Seconds]:
    """Compile `generation.advance_jit`.

    Args:
      network: static.
      params: its parameters, or their shapes.
      state: what it goes on from, or its shapes.
      options: static.
    """
    return compile_stage(
        lambda: generation.advance_jit.lower(
            network, params, state, *loop_ends(state), options=options
        )
    )


def time_calls(
    program: Any, params: Any, cache: Cache, *, repeats: int, steps: int, **where: Any
) -> tuple[tuple[float, ...], Cache]:
    """Time calls of a program of `compile_steps`, each from the same state on.

    Args:
      program: compiled.
      params: its parameters.
      cache: its buffers are taken.
      repeats: timed calls, after one that warms up.
      steps: of one call.
      **where: the other arguments of `rewind`.

    Returns:
      Milliseconds per step of each call, and the cache.

    Raises:
      RuntimeError: the loop did not produce `steps` tokens per row.
    """
    state = jax.block_until_ready(rewind(cache, steps=steps, **where))
    ends = jax.block_until_ready(loop_ends(state))
    seconds, state = clock.timed(
        lambda state: program(params, state, *ends),
        state,
        repeats,
        prepare=lambda state: rewind(state.cache, steps=steps, **where),
        units=lambda state: steps,
    )
    if not ((state.tokens >= 0).all() and (state.lengths == steps).all()):
        raise RuntimeError("time_calls: the loop did not produce its tokens.")
    return tuple(1e3 * second for second in seconds), state.cache


def loop_ends(state: Generation[None]) -> tuple[jax.Array, jax.Array]:
    """Return `until`, the whole output buffer, and the id of no stop."""
    return jnp.int32(state.tokens.shape[1]), jnp.array([-1], jnp.int32)
