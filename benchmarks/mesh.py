"""What several devices of one host gain: decode steps, prefill, and rows shared out.

    python benchmarks/mesh.py speed --out mesh.json         # 1, 2 and 4 devices
    python benchmarks/mesh.py large --out mesh-large.json   # what one cannot hold

`speed` measures one device and meshes of `--model` devices of the same host in the same
run, Qwen3-8B with random weights: a decode step at each `--batch` with the full cache
and with LongFlow, both of `--slots` slots, and a prefill of 8 x 3,000 tokens; and rows
shared out over all devices (`data=4` at batch 128) against one device at a quarter of
them. All devices come first, then rows, then fewer devices; each number of one device
is measured just before the first that is compared with it, and the ratio is on the disk
with the row. `large` measures Qwen3-32B at batch 32 and Llama-3.3-70B at batch 16 after
8,192 tokens of context with a budget of 3,200. Of both, `--seconds` is when to stop.

`floor_ms` is what one device reads, over its copy bandwidth; `sums_ms` is the measured
time of the two sums of each layer alone, in a loop; `bound_ms` is both together. A row
is on the disk as soon as it is measured; what does not fit says so. `--profile` adds
the kernels of a step, by name. Try it anywhere with simulated devices:

    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 \\
        python benchmarks/mesh.py speed --tiny --out mesh.json
"""

import dataclasses
import functools
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from jaxkv import LongFlow, Options, generation, sharding
from jaxkv.bench import clock, decode_step
from jaxkv.kernels.per_shard import COLUMNS
from jaxkv.laws.network import CONFIG as TINY
from jaxkv.models.config import Config
from jaxkv.models.decoder import Decoder, random_parameters
from jaxkv.models.public_shapes import SHAPES
from jaxkv.provenance import provenance, write_json
from jaxkv.runtime.seeds import key_of, row_keys

app = typer.Typer(help=__doc__)
LARGE = {"qwen3-32b": 32, "llama-3.3-70b": 16}  # batch of each
CONTEXT, BUDGET = 8192, 3200
SMALL = dataclasses.replace(
    TINY, vocab_size=64, num_heads=8, num_kv_heads=4, intermediate_size=64
)

Out = Annotated[Path, typer.Option(help="File for the result.")]
Profile = Annotated[bool, typer.Option("--profile", help="Add each kernel's time.")]
Seconds = Annotated[float, typer.Option(help="Begin no row after these.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="A smoke test of the script.")]


class Report:
    """Rows of a result, on the disk as soon as they are there."""

    def __init__(self, out: Path, *, seconds: float = math.inf, **header: Any):
        self._out, self._begin, self._seconds = out, time.perf_counter(), seconds
        self.rows: list[dict[str, Any]] = []
        self._header = (
            provenance()
            | header
            | dict(
                devices=[str(device) for device in jax.devices()],
                xla_flags=os.environ.get("XLA_FLAGS", ""),
            )
        )

    @property
    def late(self) -> bool:
        """Whether nothing more may begin."""
        return time.perf_counter() - self._begin > self._seconds

    def add(self, measure: Callable[[], dict[str, Any]], **named: Any) -> None:
        """Measure a row; where memory is short, or it fails, say so and go on."""
        if self.late:
            print("left out after --seconds:", named, flush=True)
            return
        try:
            row = named | measure()
        except Exception as error:  # one row must not cost the others
            row = named | {"error": " ".join(str(error).split())[:400]}
        row |= self._ratio(row)
        self.rows.append(row | {"at_seconds": time.perf_counter() - self._begin})
        shown = {k: v for k, v in row.items() if not isinstance(v, dict | list | tuple)}
        print(shown, flush=True)
        write_json(self._out, self._header | {"rows": self.rows})
        gc.collect()

    def _ratio(self, row: dict[str, Any]) -> dict[str, float]:
        """Return the ratio to one device's first: of times, or of tokens/s."""
        of_rows = row.get("what") == "rows"
        same = ("what", "method") if of_rows else ("what", "method", "batch")
        for one in (*self.rows, row):
            alone = one.get("data") == one.get("model") == 1 and "error" not in one
            fits = alone and all(one.get(key) == row.get(key) for key in same)
            if fits and "error" not in row:
                key = "seconds" if "seconds" in row else "step_ms"
                key = "tokens_per_second" if of_rows else key
                return {"ratio_to_one_device": row[key] / one[key]}
        return {}


def weights(
    config: Config, *, data: int = 1, model: int = 1, dtype: str
) -> tuple[Decoder, Any]:
    """Return a network with random weights on one device, or over a mesh."""
    if data == model == 1:
        return Decoder(config), jax.block_until_ready(
            random_parameters(config, key_of(0), jnp.dtype(dtype))
        )
    mesh = sharding.make_mesh(
        data=data, model=model, devices=jax.devices()[: data * model]
    )
    return jax.block_until_ready(
        sharding.random_parameters(config, key_of(0), jnp.dtype(dtype), mesh)
    )


def peaks() -> list[int | None]:
    """Return the most bytes that each device has used so far."""
    return [
        (device.memory_stats() or {}).get("peak_bytes_in_use")
        for device in jax.local_devices()
    ]


def sums_ms(config: Config, mesh: Any, batch: int, dtype: str) -> float:
    """Return the milliseconds of the two sums of every layer, alone in a loop."""
    if mesh is None or sharding.devices_of_a_row(mesh) == 1:
        return 0.0
    rows = max(1, batch // mesh.shape["data"])
    everywhere = jax.sharding.PartitionSpec()

    def add(x):
        # Halved, so that no number grows; each sum waits for the one before.
        return jax.lax.psum(x, COLUMNS) / sharding.devices_of_a_row(mesh)

    def step(x):
        return jax.shard_map(
            add, in_specs=everywhere, out_specs=everywhere, check_vma=False
        )(x)

    with jax.set_mesh(mesh):
        x = jax.device_put(
            jnp.ones((rows, 1, config.hidden_size), jnp.dtype(dtype)),
            jax.sharding.NamedSharding(mesh, everywhere),
        )
        seconds, _, _ = clock.time_loop(step, x, 2 * config.num_layers * 20)
    return 1e3 * statistics.median(seconds) * 2 * config.num_layers


def step_row(
    network: Decoder,
    params: Any,
    *,
    batch: int,
    options: Options,
    context: int,
    bandwidth: float,
    profile: bool,
    steps: int = 64,
) -> dict[str, Any]:
    """Return the row of a decode step."""
    timing = decode_step.time_decode(
        network,
        params,
        batch=batch,
        context=context,
        steps=min(steps, context // 2),
        repeats=5,
        options=options,
        bandwidth=bandwidth,
        profile=profile,
    )
    mesh = decode_step.mesh_of(params)
    dtype = params["embedding"].dtype.name
    sums = sums_ms(network.config, mesh, batch, dtype)
    bound = timing.floor_ms + sums
    return dataclasses.asdict(timing) | dict(
        sums_ms=sums,
        bound_ms=bound,
        ratio_to_bound=timing.step_ms / bound,
        peak_bytes_of_devices=peaks(),
    )


def prefill_row(
    network: Decoder, params: Any, *, rows: int, length: int, slots: int
) -> dict[str, Any]:
    """Return the row of a prefill until the first token, the full cache kept."""
    tokens = np.ones((rows, -(-length // 64) * 64), np.int32)
    lengths = np.full(rows, length, np.int32)

    def call():
        return generation.start_jit(
            *(network, params, tokens, lengths, row_keys(0, rows), np.array([-1])),
            options=Options(),
            slots=max(slots, tokens.shape[1]),
            max_out=64,
        )

    call()
    seconds = [clock.median_seconds(call, 3) for _ in range(3)]
    return dict(seconds=statistics.median(seconds), calls=seconds)


def methods(budget: int) -> dict[str, Options]:
    """Return what is timed: the full cache, and LongFlow of as many slots."""
    return {"full": Options(), "longflow": Options(budget=budget, decode=LongFlow())}


def meshes(most: int) -> Iterator[int]:
    """Yield 1, 2, 4, ... devices, as many as there are."""
    count = 1
    while count <= min(most, jax.device_count()):
        yield count
        count *= 2


@app.command()
def speed(
    out: Out,
    shape: str = "qwen3-8b",
    batch: Annotated[str, typer.Option(help="With commas.")] = "8,64",
    slots: int = 3200,
    model: Annotated[int, typer.Option(help="The most devices of a row.")] = 4,
    rows: Annotated[int, typer.Option(help="Batch that data= shares out.")] = 128,
    prefill: Annotated[str, typer.Option(help="Rows x tokens.")] = "8x3000",
    dtype: str = "bfloat16",
    seconds: Seconds = math.inf,
    profile: Profile = False,
    tiny: Tiny = False,
) -> None:
    """Measure 4 devices against one, rows shared out over them, then 2."""
    config = SHAPES[shape]
    if tiny:
        config, batch, slots, rows = SMALL, "2", 32, 8
        prefill, dtype = "2x24", "float32"
    bandwidth = clock.copy_bandwidth(2**20 if tiny else 2**31)
    report = Report(
        out,
        seconds=seconds,
        benchmark="mesh speed",
        shape="tiny" if tiny else shape,
        slots=slots,
        dtype=dtype,
        copy_bytes_per_second=bandwidth,
    )
    options = methods(slots)
    read, length = map(int, prefill.split("x"))
    timing: dict[str, Any] = dict(context=slots, bandwidth=bandwidth, profile=profile)

    def measure(held, what, size, method, **where):
        if what == "prefill":
            row = functools.partial(prefill_row, *held, rows=size, slots=slots)
            report.add(
                functools.partial(row, length=length), what=what, batch=size, **where
            )
        else:
            row = functools.partial(step_row, *held, batch=size, **timing)
            row = functools.partial(row, options=options[method])
            report.add(row, what=what, method=method, batch=size, **where)

    *fewer, most = meshes(model)
    if not fewer:
        raise SystemExit("mesh speed: expected two devices or more, found one")
    split = [("step", int(size), name) for size in batch.split(",") for name in options]
    split.append(("prefill", read, ""))
    alone, seen = weights(config, dtype=dtype), set()
    for data, count in ((1, most), (most, 1), *((1, n) for n in fewer[:0:-1])):
        if report.late:
            break
        many = weights(config, data=data, model=count, dtype=dtype)
        cases = split if data == 1 else [("rows", rows, name) for name in options]
        for what, size, method in cases:
            if (what, size, method) not in seen:
                seen.add((what, size, method))
                measure(alone, what, size // data, method, data=1, model=1)
            measure(many, what, size, method, data=data, model=count)
        del many
        gc.collect()


@app.command()
def large(
    out: Out,
    shapes: Annotated[str, typer.Option(help="With commas.")] = ",".join(LARGE),
    model: Annotated[int, typer.Option(help="Devices of a row.")] = 4,
    dtype: str = "bfloat16",
    seconds: Seconds = math.inf,
    profile: Profile = False,
    tiny: Tiny = False,
) -> None:
    """Measure what one device cannot hold, with LongFlow."""
    bandwidth = clock.copy_bandwidth(2**20 if tiny else 2**31)
    header = dict(benchmark="mesh large", dtype=dtype, copy_bytes_per_second=bandwidth)
    report = Report(out, seconds=seconds, **header)
    for shape in shapes.split(","):
        config, batch, context, budget = SHAPES[shape], LARGE[shape], CONTEXT, BUDGET
        if tiny:
            config, batch, context, budget = SMALL, 2, 64, 32
        if report.late:
            continue
        network, params = weights(config, model=model, dtype=dtype)
        row = functools.partial(
            step_row,
            network,
            params,
            batch=batch,
            context=context,
            options=Options(budget=budget, decode=LongFlow()),
            bandwidth=bandwidth,
            profile=profile,
        )
        report.add(
            row,
            **dict(what="step", shape=shape, method="longflow"),
            **dict(data=1, model=model, batch=batch, context=context, budget=budget),
        )
        del network, params, row
        gc.collect()


if __name__ == "__main__":
    app()
