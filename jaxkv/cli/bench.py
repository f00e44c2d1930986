"""`jaxkv bench`: what a decode step costs, and how long compiling takes."""

import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import rich.box
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxkv import registry
from jaxkv.bench import clock, compiling, decode_step
from jaxkv.cli import flags, parsing
from jaxkv.kernels import decode as decode_kernels
from jaxkv.language_model import NEEDLE, load
from jaxkv.models.decoder import Config, Decoder, random_parameters
from jaxkv.models.public_shapes import SHAPES
from jaxkv.options import Options
from jaxkv.planning import bucket
from jaxkv.provenance import provenance, write_json

ShapeName = Literal[tuple(SHAPES)]
DtypeName = Literal["float32", "bfloat16", "float16"]

Model = Annotated[
    str | None, typer.Option(help="Checkpoint: needle, a folder, or a hub id.")
]
Shape = Annotated[
    ShapeName | None,
    typer.Option(help="Random weights of this shape instead; downloads nothing."),
]
Dtype = Annotated[
    DtypeName | None,
    typer.Option(help="Default: the checkpoint's; float32 on CPU, else bfloat16."),
]
Out = Annotated[Path | None, typer.Option(help="Write the same JSON to this file.")]
CopyGib = Annotated[
    float | None,
    typer.Option(help="Size of the copied array; default 4, on CPU 0.25."),
]


def decode(
    model: Model = None,
    shape: Shape = None,
    batch: Annotated[str, typer.Option(help="Rows; several with commas.")] = "1",
    context: Annotated[
        int, typer.Option(min=2, help="Tokens so far, the new ones included.")
    ] = 3200,
    steps: Annotated[int, typer.Option(min=1, help="Tokens of one timed call.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls.")] = 5,
    budget: flags.Budget = None,
    decode: flags.Decode = "full",
    dtype: Dtype = None,
    decode_implementation: flags.DecodeImplementation = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Add each kernel's time (GPUs).")
    ] = False,
    copy_gib: CopyGib = None,
    json_: flags.Json = False,
    out: Out = None,
) -> None:
    """Time decode steps on a full cache, against the memory they must read."""
    console = console_of(json_)
    batches = batches_of(batch)
    if context <= steps:
        raise ValueError(f"--context {context} must exceed --steps {steps}.")
    options = options_of(budget, decode, decode_implementation)
    # Before the weights, which may leave no room for it.
    bandwidth = clock.copy_bandwidth(copy_bytes(copy_gib))
    with console.status("weights"):
        name, network, params = network_of(model, shape, dtype)
    rows = []
    for rows_of_batch in batches:
        with console.status(f"batch {rows_of_batch}"):
            rows.append(
                decode_step.time_decode(
                    network,
                    params,
                    batch=rows_of_batch,
                    context=context,
                    steps=steps,
                    repeats=repeats,
                    options=options,
                    bandwidth=bandwidth,
                    profile=profile,
                )
            )
    result = header_of("decode", name, options, params["embedding"].dtype) | {
        "context": context,
        "copy_bytes_per_second": bandwidth,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    if not json_:
        console.print(_decode_table(result, rows))
        for row in rows if profile else ():
            console.print(_kernel_table(row))
    finish(result, json_, out)


def compile_(
    model: Model = None,
    shape: Shape = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    new: Annotated[int, typer.Option(min=1, help="Tokens of the output.")] = 64,
    budget: flags.Budget = None,
    decode: flags.Decode = "full",
    dtype: Dtype = None,
    decode_implementation: flags.DecodeImplementation = None,
    compilation_cache: Annotated[
        Path | None,
        typer.Option(help="JAX's compilation cache; a second run is then warm."),
    ] = None,
    json_: flags.Json = False,
    out: Out = None,
) -> None:
    """Time the compilation of generate: prefill, first token and decode loop.

    No weights are made, so a shape may be larger than the device. Run it twice with
    one --compilation-cache to see what a second process pays.
    """
    console = console_of(json_)
    if compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    events: dict[str, int] = {}
    jax.monitoring.register_event_listener(
        lambda event, **_: events.update({event: events.get(event, 0) + 1})
    )
    begin = time.perf_counter()
    options = options_of(budget, decode, decode_implementation)
    name, config, dtype_ = _shape(model, shape, dtype)
    with console.status("compiling"):
        halves = compiling.compile_generate(
            Decoder(config),
            dtype=dtype_,
            batch=batch,
            prompt=bucket(prompt),
            max_out=bucket(new),
            options=options,
        )
    result = header_of("compile", name, options, dtype_) | {
        "batch": batch,
        "prompt": bucket(prompt),
        "max_out": bucket(new),
        "wall_seconds": time.perf_counter() - begin,
        "total_seconds": sum(half.total for half in halves.values()),
        "cache": None if compilation_cache is None else str(compilation_cache),
        "cache_hits": events.get("/jax/compilation_cache/cache_hits", 0),
        "cache_misses": events.get("/jax/compilation_cache/cache_misses", 0),
        "seconds": {half: seconds._asdict() for half, seconds in halves.items()},
    }
    if not json_:
        table = Table("program", "trace s", "compile s", title=_title(result))
        for half, seconds in halves.items():
            table.add_row(half, f"{seconds.trace:.2f}", f"{seconds.compile:.2f}")
        console.print(table)
        console.print(
            f"{result['total_seconds']:.2f} s in all; compilation cache: "
            f"{result['cache_hits']} hits, {result['cache_misses']} misses"
        )
    finish(result, json_, out)


def console_of(json_: bool) -> Console:
    """Return where progress goes: not to the output that a machine reads."""
    return Console(stderr=json_)


def batches_of(text: str, flag: str = "--batch") -> list[int]:
    """Return the batch sizes of a flag, or raise ValueError."""
    return parsing.numbers(
        text,
        f"{flag} takes numbers such as 1,8,32;",
        outside=f"{flag} must be at least 1,",
    )


def options_of(
    budget: int | None, policy: str, kernel: decode_kernels.Implementation | None
) -> Options:
    """Return the options of the flags, or raise ValueError."""
    decode = registry.parse(policy, registry.DECODE, flag="--decode")
    if budget is None and decode.evicts:
        raise ValueError(f"--decode {policy} evicts and needs --budget.")
    options = Options(budget=budget, decode=decode, decode_implementation=kernel)
    options.check()
    return options


def copy_bytes(gib: float | None) -> int:
    """Return the bytes of the array that is copied for the floor."""
    if gib is None:
        gib = 0.25 if jax.default_backend() == "cpu" else 4
    if not 2**-10 <= gib <= 2**10:
        raise ValueError(
            f"--copy-gib must lie between {2**-10:.4f} (a MiB) and {2**10}, got {gib}."
        )
    return int(gib * 2**30)


def random_dtype(dtype: str | None) -> jnp.dtype:
    """Return the dtype of random numbers: the flag's, or what suits the device."""
    on_cpu = jax.default_backend() == "cpu"
    return jnp.dtype(dtype or ("float32" if on_cpu else "bfloat16"))


def network_of(
    model: str | None, shape: str | None, dtype: str | None
) -> tuple[str, Decoder, Any]:
    """Return a name, a network and its parameters: a checkpoint's, or random ones."""
    if shape is None:
        lm = load(model or NEEDLE, dtype=dtype)
        return lm.name, lm.network, lm.params
    name, config, dtype_ = _shape(model, shape, dtype)
    params = random_parameters(config, jax.random.key(0), dtype_)
    return name, Decoder(config), params


def _shape(
    model: str | None, shape: str | None, dtype: str | None
) -> tuple[str, Config, jnp.dtype]:
    """Return a name, the sizes and the dtype of parameters."""
    if shape is None:
        lm = load(model or NEEDLE, dtype=dtype)
        return lm.name, lm.config, lm.dtype
    if model is not None:
        raise ValueError("--model and --shape exclude each other; pass one of them.")
    return shape, SHAPES[shape], random_dtype(dtype)


def header_of(
    what: str, name: str, options: Options, dtype: jax.typing.DTypeLike
) -> dict[str, Any]:
    """Return what every result begins with."""
    kernel = options.decode_implementation
    return {
        "benchmark": what,
        "model": name,
        "dtype": jnp.dtype(dtype).name,
        "budget": options.budget,
        "decode": repr(options.decode),
        "decode_implementation": kernel
        or options.decode.default_implementation(jax.default_backend()),
    } | provenance()


def _title(result: dict[str, Any]) -> str:
    return (
        f"{result['model']}, {result['dtype']}, {result['decode']}, "
        f"{result['decode_implementation']}, on {result['device']}"
    )


def _decode_table(
    result: dict[str, Any], rows: Sequence[decode_step.DecodeTiming]
) -> Table:
    table = Table(
        title=f"{_title(result)}, {rows[0].slots} slots",
        caption=f"floor: weights, keys and values at the copy bandwidth of "
        f"{result['copy_bytes_per_second'] / 1e9:.1f} GB/s",
        box=rich.box.SIMPLE,
        collapse_padding=True,  # for all of it to fit 80 columns
    )
    for column in (
        "batch",
        "ms/step",
        "floor ms",
        "ratio",
        "tokens/s",
        "cache GB",
        "peak GB",
        "compile s",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        peak = row.peak_bytes or row.program_bytes
        table.add_row(
            str(row.batch),
            f"{row.step_ms:.3f}",
            f"{row.floor_ms:.3f}",
            f"{row.ratio_to_floor:.2f}",
            f"{row.tokens_per_second:.0f}",
            f"{row.state_bytes / 1e9:.3f}",
            "-" if peak is None else f"{peak / 1e9:.3f}",
            f"{row.trace_seconds + row.compile_seconds:.1f}",
        )
    return table


def _kernel_table(row: decode_step.DecodeTiming) -> Table:
    busy = sum(kernel.us for kernel in row.kernels.values())
    table = Table(
        title=f"batch {row.batch}: kernels of one step",
        caption=f"all {len(row.kernels)} of them: {busy:.0f} of "
        f"{1e3 * row.step_ms:.0f} µs"
        if row.kernels
        else "the profiler saw no GPU",
        box=rich.box.SIMPLE,
    )
    table.add_column("kernel", overflow="ellipsis", no_wrap=True)
    for column in ("µs", "launches"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, kernel in itertools.islice(row.kernels.items(), 12):
        # Text, because brackets in a name are no markup.
        table.add_row(Text(name), f"{kernel.us:.1f}", f"{kernel.launches:.4g}")
    return table


def finish(result: dict[str, Any], json_: bool, out: Path | None) -> None:
    """Print the result as JSON, write it to a file, or both."""
    if json_:
        print(json.dumps(result, indent=2))
    if out is not None:
        write_json(out, result)
