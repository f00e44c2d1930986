"""Times one layer's decode attention on the device, by itself.

What is timed is a compiled loop over as many layers' caches as leave the second-level
cache behind, so that keys and values come from memory as they do between the layers of
a network; one layer's output is the next one's query, so that no two can overlap.

Axis letters: `B` batch, `N` query heads, `K` key/value heads, `S` slots, `H` head size.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.bench import clock
from jaxkv.bench.kernel_trace import kernel_times
from jaxkv.kernels import decode, longflow
from jaxkv.kernels.cache import Slots, Token
from jaxkv.kernels.scores import value_norms

# cuDNN neither writes nor scores; `attention` writes; `longflow` does everything.
VERSIONS = ("cudnn", "attention", "longflow")

CACHE_BYTES = 2e8  # far more than the second-level cache of any device
MOST_LAYERS = 36  # so that loops over short caches compile in seconds
LOOP_SECONDS = 0.03
LEAST_STEP = 2e-5  # of a step, in seconds: two launches, however short the cache


class Inputs(NamedTuple):
    """What `kernels.decode.decode_attention` takes."""

    query: jax.Array
    token: Token
    slots: Slots


Step = Callable[[jax.Array, Token, Slots], tuple[jax.Array, Slots]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one layer's decode attention.

    Attributes:
      batch: rows.
      slots: of the cache.
      heads: query heads.
      kv_heads: key/value heads.
      head_dim: of each.
      dtype: of everything but positions, by name.
    """

    batch: int
    slots: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        numbers = self.batch * self.kv_heads * self.slots * self.head_dim
        return 2 * numbers * jnp.dtype(self.dtype).itemsize

    @property
    def scale(self) -> float:
        """Factor on the logits."""
        return self.head_dim**-0.5


class Timing(NamedTuple):
    """What one version of a step costs.

    Attributes:
      seconds: per layer, of each call of the loop.
      temporaries: bytes that the compiled loop needs beside its arguments.
      kernels_us: microseconds per layer of the longest kernels, by name, as the
        profiler saw one pass over the layers, without the gaps between launches; empty
        if not asked for, or where there is no GPU.
    """

    seconds: tuple[float, ...]
    temporaries: int
    kernels_us: dict[str, float]


def make_inputs(shape: Shape, share: float = 1.0, seed: int = 0) -> Inputs:
    """Return random arguments, free slots full of NaN.

    Args:
      shape: sizes.
      share: of occupied slots. Below 1, rows and heads hold more or less of them, as
        in a cache that is filling up.
      seed: of all numbers.
    """
    rng = np.random.default_rng(seed)
    draws = jax.random.split(jax.random.key(seed), 5)
    cache = (shape.kv_heads, shape.slots)
    leading = [(shape.heads,), (shape.kv_heads,), (shape.kv_heads,), cache, cache]
    query, key, value, keys, values = (
        jax.random.normal(
            draw, (shape.batch, *axes, shape.head_dim), jnp.dtype(shape.dtype)
        )
        for draw, axes in zip(draws, leading, strict=True)
    )
    spread = min(share, 1 - share)
    rows = (shape.batch, shape.kv_heads)
    filled = shape.slots * (share + spread * rng.uniform(-1, 1, (*rows, 1)))
    slot = np.arange(shape.slots, dtype=np.int32)
    occupied = np.broadcast_to(slot, (*rows, shape.slots)) < filled
    positions = jnp.asarray(np.where(occupied, slot, -1).astype(np.int32))
    if not occupied.all():
        free = positions[..., None] < 0
        keys, values = (jnp.where(free, jnp.nan, x) for x in (keys, values))
    target = jnp.asarray(rng.integers(0, shape.slots, rows), jnp.int32)
    position = jnp.full((shape.batch,), shape.slots, jnp.int32)
    token = Token(key, value, position)
    return Inputs(query, token, Slots(keys, values, positions, target))


def attention(query, token, slots, *, scale, implementation=None):
    """Write and attend, without a score: a `Step`."""
    return decode.decode_attention(
        query, token, slots, scale=scale, implementation=implementation
    )


def attend_and_choose(query, token, slots, *, scale, implementation=None):
    """Write, attend, score and choose, as LongFlow does: a `Step`."""
    oldest = jnp.zeros_like(token.position)
    return longflow.longflow_attention(
        *(query, token, slots, oldest, token.position),
        scale=scale,
        implementation=implementation,
    )


def cudnn(query, token, slots, *, scale):
    """Attend by cuDNN, neither writing nor scoring: a `Step` on caches `[B, S, K, H]`.

    That is the order of axes that it takes; the bytes are the same.
    """
    del token
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    out = attend(query[:, None], slots.keys, slots.values, scale=scale)
    return out[:, 0], slots


def cudnn_unavailable(dtype: str) -> str:
    """Return why `cudnn` cannot run here, or an empty string."""
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU, but JAX runs on {jax.default_backend()}."
    if dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 or float16, got {dtype}."
    return ""


class Layers:
    """The caches of one shape, as many as leave the second-level cache.

    Attributes:
      shape: sizes.
      floor: seconds that reading the occupied slots of one layer takes.
      occupied: share of the slots.
      number: of layers.
    """

    def __init__(
        self,
        shape: Shape,
        bandwidth: float,
        *,
        share: float = 1.0,
        number: int | None = None,
    ):
        """Make them.

        Args:
          shape: sizes.
          bandwidth: of a copy, bytes per second.
          share: of occupied slots; see `make_inputs`.
          number: of layers; None is as many as leave the second-level cache.
        """
        enough = math.ceil(CACHE_BYTES / shape.num_bytes)
        self.shape = shape
        self.number = number or max(1, min(MOST_LAYERS, enough))
        inputs = [make_inputs(shape, share, seed) for seed in range(self.number)]
        held = [np.mean(np.asarray(x.slots.positions) >= 0) for x in inputs]
        self.occupied = float(np.mean(held))
        self.floor = self.occupied * shape.num_bytes / bandwidth
        self._query, self._token = inputs[0].query, inputs[0].token
        # LongFlow gives up one slot for all heads, so that these write to one.
        self._caches = tuple(
            slots._replace(
                norms=value_norms(slots.values, "l1"),
                target=jnp.copy(
                    jnp.broadcast_to(slots.target[:, :1], slots.target.shape)
                ),
            )
            for _, _, slots in inputs
        )
        per_pass = self.number * max(self.floor, LEAST_STEP)
        self._passes = max(2, math.ceil(LOOP_SECONDS / per_pass))

    def time(
        self,
        step: Step,
        *,
        repeats: int = 5,
        slots_first: bool = False,
        profile: bool = False,
    ) -> Timing:
        """Time one version, and keep what it leaves in the caches for the next.

        Args:
          step: does one layer.
          repeats: timed calls of the loop, after one that warms up.
          slots_first: hand it caches `[B, S, K, H]`.
          profile: see `Timing.kernels_us`.
        """

        def through(state):
            query, caches = state
            new = []
            for slots in caches:
                query, slots = step(query, self._token, slots)
                new.append(slots)
            return query, tuple(new)

        shape = self.shape
        if slots_first:
            self._reshape((shape.batch, shape.slots, shape.kv_heads, shape.head_dim))
        state = self._query, self._caches
        del self._caches  # the loop takes its buffers
        seconds, state, temporaries = clock.time_loop(
            through, state, self._passes, repeats
        )
        kernels: dict[str, float] = {}
        if profile:
            kernels, state = kernel_times(through, state, self.number)
        self._query, self._caches = state
        if slots_first:
            self._reshape((shape.batch, shape.kv_heads, shape.slots, shape.head_dim))
        each = tuple(second / self.number for second in seconds)
        return Timing(each, temporaries, kernels)

    def _reshape(self, axes: tuple[int, ...]) -> None:
        # The numbers are random, so it does not matter which slot they end up in.
        self._caches = tuple(
            slots._replace(
                keys=slots.keys.reshape(axes), values=slots.values.reshape(axes)
            )
            for slots in self._caches
        )


def time_shape(
    shape: Shape,
    names: list[str],
    implementation: decode.Implementation | None,
    *,
    bandwidth: float,
    layers: int | None,
    repeats: int,
    profile: bool,
) -> dict[str, Any]:
    """Return what each version takes, and their ratios, ready for JSON.

    Args:
      shape: sizes.
      names: of `VERSIONS`.
      implementation: of our own versions; None is the best.
      bandwidth: of a copy, bytes per second.
      layers: whose caches are gone through; None is enough.
      repeats: timed calls.
      profile: add the time of each kernel.
    """
    caches = Layers(shape, bandwidth, number=layers)
    row: dict[str, Any] = {
        "batch": shape.batch,
        "slots": shape.slots,
        "layers": caches.number,
    }
    versions = {
        name: _time_version(
            caches, name, implementation, repeats=repeats, profile=profile
        )
        for name in names
    }
    row |= {"layers": caches.number, "floor_ms": 1e3 * caches.floor}
    row["versions"] = versions
    return row | _compare(versions)


def _time_version(
    caches: Layers,
    name: str,
    implementation: decode.Implementation | None,
    *,
    repeats: int,
    profile: bool,
) -> dict[str, Any]:
    if name == "cudnn":
        step = functools.partial(cudnn, scale=caches.shape.scale)
    else:
        step = functools.partial(
            attention if name == "attention" else attend_and_choose,
            scale=caches.shape.scale,
            implementation=implementation,
        )
    timing = caches.time(
        step, repeats=repeats, slots_first=name == "cudnn", profile=profile
    )
    calls = [1e3 * second for second in timing.seconds]
    ms = statistics.median(calls)
    found = {
        "ms": ms,
        "quartiles_ms": np.percentile(calls, [25, 75]).tolist(),
        "calls_ms": calls,
        "ratio_to_floor": ms / (1e3 * caches.floor),
        "temporary_bytes": timing.temporaries,
    }
    return found | ({"kernels_us": timing.kernels_us} if profile else {})


def _compare(versions: dict[str, Any]) -> dict[str, float]:
    """Add ratios to cuDNN; return the cost of scoring and choosing, in per cent."""
    if "cudnn" in versions:
        for version in versions.values():
            version["ratio_to_cudnn"] = version["ms"] / versions["cudnn"]["ms"]
    if not {"attention", "longflow"} <= versions.keys():
        return {}
    alone, scored = (versions[name]["ms"] for name in ("attention", "longflow"))
    return {"score_percent": 100 * (scored / alone - 1)}
