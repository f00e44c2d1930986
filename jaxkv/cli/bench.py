"""`jaxkv bench`: what a decode step costs, and how long compiling takes."""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import rich.box
import typer
from rich.table import Column, Table
from rich.text import Text

from jaxkv.bench import clock, compiling, decode_step
from jaxkv.cli import flags
from jaxkv.cli.bench_flags import (
    CopyGib,
    Decoding,
    Output,
    Source,
    batches_of,
    copy_bytes,
    header_of,
    mesh_sizes,
)
from jaxkv.cli.groups import grouped
from jaxkv.cli.terminal import right_aligned
from jaxkv.models.decoder import Decoder
from jaxkv.text.planning import bucket


@grouped
def decode(
    *,
    source: Source,
    batch: Annotated[str, typer.Option(help="Rows; several with commas.")] = "1",
    context: Annotated[
        int, typer.Option(min=2, help="Tokens so far, the new ones included.")
    ] = 3200,
    steps: Annotated[int, typer.Option(min=1, help="Tokens of one timed call.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls.")] = 5,
    decoding: Decoding,
    profile: Annotated[
        bool, typer.Option("--profile", help="Add each kernel's time (GPUs).")
    ] = False,
    copy_gib: CopyGib = None,
    mesh: flags.Mesh = None,
    output: Output,
) -> None:
    """Time decode steps on a full cache, against the memory they must read."""
    batches = batches_of(batch)
    if context <= steps:
        raise ValueError(f"--context {context} must exceed --steps {steps}.")
    options, console = decoding.options, output.console
    # Before the weights, which may leave no room for it.
    bandwidth = clock.copy_bandwidth(copy_bytes(copy_gib))
    with console.status("weights"):
        name, network, params = source.load(decoding.dtype, mesh=mesh)
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
        "mesh": mesh_sizes(params),
        "copy_bytes_per_second": bandwidth,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    kernels = map(_kernel_table, rows if profile else ())
    output.finish(result, _decode_table(result, rows), *kernels)


@grouped
def compile_(
    *,
    source: Source,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    new: Annotated[int, typer.Option(min=1, help="Tokens of the output.")] = 64,
    decoding: Decoding,
    compilation_cache: Annotated[
        Path | None,
        typer.Option(help="JAX's compilation cache; a second run is then warm."),
    ] = None,
    output: Output,
) -> None:
    """Time the compilation of generate: prefill, first token and decode loop.

    No weights are made, so a shape may be larger than the device. Run it twice with
    one --compilation-cache to see what a second process pays.
    """
    if compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    events: dict[str, int] = {}
    jax.monitoring.register_event_listener(
        lambda event, **_: events.update({event: events.get(event, 0) + 1})
    )
    begin = time.perf_counter()
    options = decoding.options
    name, config, dtype = source.sizes(decoding.dtype)
    with output.console.status("compiling"):
        halves = compiling.compile_generate(
            Decoder(config),
            dtype=dtype,
            batch=batch,
            prompt=bucket(prompt),
            max_out=bucket(new),
            options=options,
        )
    result = header_of("compile", name, options, dtype) | {
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
    table = Table("program", "trace s", "compile s", title=_title(result))
    for half, seconds in halves.items():
        table.add_row(half, f"{seconds.trace:.2f}", f"{seconds.compile:.2f}")
    below = (
        f"{result['total_seconds']:.2f} s in all; compilation cache: "
        f"{result['cache_hits']} hits, {result['cache_misses']} misses"
    )
    output.finish(result, table, below)


def _title(result: dict[str, Any]) -> str:
    return (
        f"{result['model']}, {result['dtype']}, {result['decode']}, "
        f"{result['decode_implementation']}, on {result['device']}"
    )


def _decode_table(
    result: dict[str, Any], rows: Sequence[decode_step.DecodeTiming]
) -> Table:
    table = Table(
        *right_aligned("batch", "ms/step", "floor ms", "ratio", "tokens/s"),
        *right_aligned("cache GB", "peak GB", "compile s"),
        title=f"{_title(result)}, {rows[0].slots} slots",
        caption=f"floor: weights, keys and values at the copy bandwidth of "
        f"{result['copy_bytes_per_second'] / 1e9:.1f} GB/s",
        box=rich.box.SIMPLE,
        collapse_padding=True,  # for all of it to fit 80 columns
    )
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
        Column("kernel", overflow="ellipsis", no_wrap=True),
        *right_aligned("µs", "launches"),
        title=f"batch {row.batch}: kernels of one step",
        caption=f"all {len(row.kernels)} of them: {busy:.0f} of "
        f"{1e3 * row.step_ms:.0f} µs"
        if row.kernels
        else "the profiler saw no GPU",
        box=rich.box.SIMPLE,
    )
    for name, kernel in itertools.islice(row.kernels.items(), 12):
        # Text, because brackets in a name are no markup.
        table.add_row(Text(name), f"{kernel.us:.1f}", f"{kernel.launches:.4g}")
    return table
