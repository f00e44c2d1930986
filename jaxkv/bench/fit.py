"""What fits on which devices, before one pays for them: shapes alone, nothing is run.

Weights and cache are counted array by array, as the mesh cuts them. Temporaries are a
formula: of a prefill three rows of feed-forward and two of the residual stream a token,
of a step four bytes for each logit. For one H200 both together come within a hundredth
of what XLA:GPU needed (`tests/bench/test_fit.py` holds them to its reports).

Axis letters: `B` batch, `V` vocabulary, `D` hidden, `F` feed-forward.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from jaxkv import sharding
from jaxkv import state as kv
from jaxkv.bench import decode_step
from jaxkv.kernels.per_shard import AXES, COLUMNS, DATA, MODEL
from jaxkv.models.config import Config
from jaxkv.models.decoder import parameter_shapes
from jaxkv.options import Options

_MOST = 2**16  # devices; those of the largest pods are fewer
USABLE = 0.95  # of the memory; XLA_PYTHON_CLIENT_MEM_FRACTION=.95 hands JAX as much


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of device.

    Attributes:
      memory: bytes.
      bandwidth: of the memory, bytes per second.
      measured: whether the bandwidth is that of a copy on such a device, and not what
        its maker says.
    """

    memory: float
    bandwidth: float
    measured: bool = False


KINDS: Mapping[str, Kind] = {
    "h100": Kind(78 * 2**30, 2.95e12, True),
    "h200": Kind(139 * 2**30, 4.22e12, True),
    "a100": Kind(79 * 2**30, 2.04e12),
    "l4": Kind(22 * 2**30, 0.30e12),
    "t4": Kind(15 * 2**30, 0.32e12),
    "v4": Kind(32e9, 1.23e12),
    "v5e": Kind(16e9, 0.82e12),
    "v5p": Kind(95e9, 2.77e12),
    "v6e": Kind(32e9, 1.64e12),
    "tpu7x": Kind(96e9, 3.69e12),  # half a chip, which is a device
}


def parse_devices(text: str) -> tuple[str, int]:
    """Return kind and number of devices such as "h100x4", "v5e:4x4" or "h200".

    Raises:
      ValueError: there is no such kind, or no such number.
    """
    found = re.fullmatch(r"(\w+?)(?:x(\d+)|:(\d+(?:x\d+)*))?", text.lower(), re.A)
    kind, count, grid = found.groups() if found else ("", None, None)
    sizes = [int(size) for size in (count or grid or "1").split("x")]
    if kind not in KINDS or not 0 < math.prod(sizes) <= _MOST:
        raise ValueError(
            f"plan: expected devices such as h100x4 or v5e:4x4, of {', '.join(KINDS)}, "
            f"and at most {_MOST} of them, got {text!r}."
        )
    return kind, math.prod(sizes) * (2 if kind == "tpu7x" and grid else 1)


def mesh_for(config: Config, words: str, devices: int) -> AbstractMesh:
    """Return the mesh that `words` name, of so many devices, for a network.

    Args:
      config: the network.
      words: as `sharding.resolve` takes them.
      devices: how many there are.

    Raises:
      ValueError: as `sharding.resolve` does.
    """
    sizes = sharding.sizes_of(words, config, devices)
    data, model = sizes[DATA], sizes[MODEL]
    sharding.check(config, AbstractMesh((data, model, 1), AXES))
    heads = min(model, config.num_kv_heads)
    return AbstractMesh((data, heads, model // heads), AXES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """What one device holds and reads, in bytes; the batch is that of all devices.

    Attributes:
      batch: rows.
      slots: of the layer that has most.
      weight_bytes: its part of the weights.
      cache_bytes: its part of the cache, bookkeeping included.
      temp_bytes: temporaries, the larger of prefill's and a step's.
      total_bytes: of the three.
      memory_bytes: what JAX can use; `USABLE` of the device's.
      largest_batch: the most rows that fit; 0 if none does.
      floor_ms: of a step at this batch: what the device reads, over the bandwidth.
      tokens_per_second: of all rows at that floor.
      exchanged_bytes: what a device adds up with others in a step, two sums a layer;
        the time of that is not in the floor.
    """

    batch: int
    slots: int
    weight_bytes: int
    cache_bytes: int
    temp_bytes: int
    total_bytes: int
    memory_bytes: int
    largest_batch: int
    floor_ms: float
    tokens_per_second: float
    exchanged_bytes: int

    @property
    def fits(self) -> bool:
        """Whether this batch does."""
        return self.total_bytes <= self.memory_bytes


def fit(
    config: Config,
    kind: Kind,
    mesh: AbstractMesh,
    options: Options,
    *,
    batch: int,
    prompt: int,
    new: int,
    dtype: str = "bfloat16",
    temp_bytes: int | None = None,
) -> Fit:
    """Count what generating takes.

    Args:
      config: the network.
      kind: of the devices.
      mesh: from `mesh_for`.
      options: the policies, and the budget.
      batch: rows; what does not divide over the devices is filled up.
      prompt: tokens of each row.
      new: tokens of each output.
      dtype: of weights and cache.
      temp_bytes: temporaries of this batch, from a compiler (`ahead`); None takes the
        formula.
    """
    slots = options.layer_slots(prompt, new, config.windows)
    weights = weight_bytes(config, mesh, dtype)
    count = functools.partial(
        _row_bytes, config, mesh, options, slots, prompt=prompt, dtype=dtype
    )
    memory = int(USABLE * kind.memory)
    row = _share(batch, mesh)
    cache, temp = count(row)
    scale = 1.0 if temp_bytes is None else temp_bytes / temp
    temp = round(scale * temp)
    # What a row adds is the same for each.
    one, two = (held + scale * made for held, made in (count(1), count(2)))
    room = memory - weights - one
    most = max(0, 1 + math.floor(room / (two - one))) * mesh.shape[DATA]
    read = _read_bytes(config, mesh, slots, row=row, dtype=dtype)
    floor = decode_step.floor_ms(read, kind.bandwidth)
    width = jnp.dtype(dtype).itemsize
    sums = 2 * config.num_layers * row * config.hidden_size * width
    return Fit(
        batch=batch,
        slots=max(slots),
        weight_bytes=weights,
        cache_bytes=cache,
        temp_bytes=temp,
        total_bytes=weights + cache + temp,
        memory_bytes=memory,
        largest_batch=most,
        floor_ms=floor,
        tokens_per_second=1e3 * batch / floor,
        exchanged_bytes=sums if sharding.devices_of_a_row(mesh) > 1 else 0,
    )


def _share(batch: int, mesh: AbstractMesh) -> int:
    """Return the rows of one device."""
    return -(-batch // mesh.shape[DATA])


def weight_bytes(config: Config, mesh: AbstractMesh, dtype: str) -> int:
    """Return the bytes of one device's part of the weights."""
    shapes = _shapes(config)

    def part(shape: Any, spec: Any) -> int:
        axes = [axis for cut in spec if cut for axis in _tuple(cut)]
        return shape.size // math.prod(mesh.shape[axis] for axis in axes)

    parts = jax.tree.map(part, shapes, sharding.parameter_specs(shapes))
    return sum(jax.tree.leaves(parts)) * jnp.dtype(dtype).itemsize


@functools.cache
def _shapes(config: Config) -> Any:
    """Return the shapes of the parameters, once: it traces the network."""
    return parameter_shapes(config)


def _tuple(cut: Any) -> tuple[str, ...]:
    return cut if isinstance(cut, tuple) else (cut,)


def _row_bytes(config, mesh, options, slots, rows, *, prompt, dtype) -> tuple[int, int]:
    """Return one device's bytes of the cache, and of temporaries, for so many rows."""

    def states():
        lengths = jnp.zeros(rows, jnp.int32)
        return tuple(
            options.decode.begin(
                kv.init(
                    batch=rows,
                    kv_heads=config.num_kv_heads // mesh.shape[MODEL],
                    slots=size,
                    head_dim=config.head_dim,
                    dtype=dtype,
                ),
                lengths,
            )
            for size in slots
        )

    width, row = jnp.dtype(dtype).itemsize, sharding.devices_of_a_row(mesh)
    inner = config.intermediate_size
    if config.experts is not None:  # each token has a row for each of its experts
        inner = config.experts.per_token * (config.experts.size + config.hidden_size)
    token = 3 * inner // row + 2 * config.hidden_size
    prefill = rows * -(-prompt // 64) * 64 * token * width
    logits = 4 * rows * config.vocab_size // row
    return kv.num_bytes(jax.eval_shape(states)), max(prefill, logits)


def _read_bytes(config, mesh, slots, *, row, dtype) -> float:
    """Return what one device reads in a step: its weights, keys and values."""
    weights = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype), _shapes(config)
    )
    whole = decode_step.weight_bytes(weights, config, batch=row)
    heads = config.num_kv_heads // mesh.shape[MODEL]
    width = jnp.dtype(dtype).itemsize
    cache = 2 * row * heads * sum(slots) * config.head_dim * width
    return whole / math.prod(mesh.shape[axis] for axis in COLUMNS) + cache
