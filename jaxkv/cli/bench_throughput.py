"""`jaxkv bench throughput`: tokens per second of whole generations, by batch size."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import rich.box
import typer
from rich.table import Column, Table

from jaxkv import registry
from jaxkv.bench import clock
from jaxkv.bench import throughput_plan as plan
from jaxkv.bench import throughput_report as report
from jaxkv.bench.throughput import Work, sampling
from jaxkv.cli import bench_flags, flags
from jaxkv.cli.bench_flags import Output, Source
from jaxkv.cli.groups import grouped
from jaxkv.cli.terminal import right_aligned
from jaxkv.options import Options

AUTO = "auto"


@grouped
def throughput(
    *,
    source: Source,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    new: Annotated[int, typer.Option(min=2, help="Tokens of each output.")] = 16_000,
    budget: Annotated[
        int, typer.Option(min=1, help="Slots of the methods that evict.")
    ] = 3200,
    batches: Annotated[
        str,
        typer.Option(
            help="Rows, with commas; auto: 1, 8, 32, doubled up to the most that fit."
        ),
    ] = AUTO,
    names: Annotated[
        str,
        typer.Option(
            "--methods",
            help="Decode policies, with commas; options as in longflow:n_sink=4.",
        ),
    ] = "full,longflow",
    ranges: Annotated[
        int, typer.Option(min=1, help="Parts of a growing cache that are sampled.")
    ] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of a range.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of a range.")] = 3,
    prefill_rows: Annotated[
        int, typer.Option(min=1, help="Most rows that prefill is timed on.")
    ] = 8,
    dtype: bench_flags.Dtype = None,
    decode_implementation: flags.DecodeImplementation = None,
    mesh: flags.Mesh = None,
    copy_gib: bench_flags.CopyGib = None,
    seconds: Annotated[
        float | None, typer.Option(help="Start nothing new after so long.")
    ] = None,
    transformers: Annotated[
        Path | None,
        typer.Option(help="Result of benchmarks/throughput_transformers.py to add."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw it: a .png, .svg or .pdf file.")
    ] = None,
    output: Output,
) -> None:
    """Sample whole generations at every batch size that fits; tokens/s and memory.

    Only some steps of each range of lengths are timed; the JSON says which. On a GPU,
    XLA_PYTHON_CLIENT_MEM_FRACTION says how much memory there is to fill.
    """
    begin = time.perf_counter()
    work = Work(
        **dict(prompt=prompt, new=new, ranges=ranges, steps=steps, repeats=repeats),
        prefill_rows=prefill_rows,
    )
    console = output.console
    options = options_of(names, work, budget, decode_implementation)
    wanted = wanted_batches(batches)
    if picture is not None:
        report.check_picture(picture)
    theirs = None if transformers is None else report.read_transformers(transformers)
    # Before the weights, which may leave no room for it.
    bandwidth = clock.copy_bandwidth(bench_flags.copy_bytes(copy_gib))
    with console.status("weights"):
        name, network, params = source.load(dtype, mesh=mesh)
    result = _header(name, params, work, budget, options, bandwidth)
    if theirs is not None:
        report.add_transformers(result, theirs)
    with console.status("timing"):
        plan.run_cells(
            plan.Timer(network, params, work, bandwidth),
            plan.plan_cells(network.config, params, work, options, wanted),
            options,
            result,
            save=output.save,
            until=None if seconds is None else begin + seconds,
            retry=wanted is None,
        )
    if picture is not None:
        report.draw_picture(picture, result)
    output.finish(result, _table(result), "\n".join(report.sentences(result)))


def wanted_batches(text: str) -> list[int] | None:
    """Return the batch sizes of the flag, or None for auto; or raise ValueError."""
    if text != AUTO:
        return bench_flags.batches_of(text, "--batches")
    if clock.device_memory("bytes_limit") is None:
        raise ValueError(
            f"--batches {AUTO} needs a device that tells how much memory it has; name "
            "the batches, as in --batches 1,8."
        )
    return None


def options_of(names: str, work: Work, budget: int, kernel: Any) -> dict[str, Options]:
    """Return the options of each method, or raise ValueError."""
    if work.new <= work.steps:
        raise ValueError(f"--new {work.new} must exceed --steps {work.steps}.")
    found = {}
    for name in registry.split_methods(names):
        policy = registry.parse(name, registry.DECODE, flag="--methods")
        options = bench_flags.options_of(
            budget if policy.evicts else None, name, kernel
        )
        found[name] = options
        if not policy.evicts:
            continue
        if budget >= work.prompt + work.new:
            raise ValueError(
                f"--budget {budget} keeps all {work.prompt + work.new} tokens of "
                "--prompt and --new, so that it equals the full cache; make it less."
            )
        left = budget - policy.spare
        if left < work.prompt:
            raise ValueError(
                f"--prompt {work.prompt} does not fit --budget {budget}, of which "
                f"{name} leaves {left} to it; shorten the prompt."
            )
        if policy.spare and work.steps % policy.spare:
            raise ValueError(
                f"{name} evicts every {policy.spare} steps, so --steps must be a "
                f"multiple of that, got {work.steps}."
            )
    if not found:
        raise ValueError(
            f"--methods names no method; choose among {', '.join(registry.DECODE)}."
        )
    return found


def _header(
    name: str,
    params: Any,
    work: Work,
    budget: int,
    options: Mapping[str, Options],
    bandwidth: float,
) -> dict[str, Any]:
    """Return what the result begins with."""
    dtype = params["embedding"].dtype
    header = bench_flags.header_of("throughput", name, Options(), dtype)
    for key in ("decode", "decode_implementation"):
        del header[key]  # each method has its own
    return header | {
        **dataclasses.asdict(work),
        "budget": budget,
        "sampling": sampling(work),
        "methods": {
            method: bench_flags.decoding_of(option)
            | {"slots": option.num_slots(work.prompt, work.new)}
            for method, option in options.items()
        },
        "mesh": bench_flags.mesh_sizes(params),
        "copy_bytes_per_second": bandwidth,
        "memory_limit_bytes": clock.device_memory("bytes_limit"),
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "not_started": [],
        "rows": [],
        "ratios": [],
    }


def _table(result: dict[str, Any]) -> Table:
    """Return one line per method and batch."""
    found = Table(
        Column("method", justify="right", overflow="fold"),
        *right_aligned(
            "batch", "tokens/s", "seconds", "x floor", "cache GB", "peak GB"
        ),
        title=f"{result['model']}, {result['dtype']}, {result['prompt']} + "
        f"{result['new']} tokens, budget {result['budget']}, on {result['device']}",
        caption=result["sampling"],
        box=rich.box.SIMPLE,
        collapse_padding=True,
    )
    for row in sorted(result["rows"], key=lambda row: (row["method"], row["batch"])):
        begin = row["method"], str(row["batch"])
        if not row["fits"]:
            found.add_row(*begin, "does not fit")
            continue
        peak = row.get("peak_bytes") or row.get("program_bytes")
        ratio = row.get("ratio_to_floor")
        found.add_row(
            *begin,
            f"{row['tokens_per_second']:.1f}",
            f"{row['seconds']:.1f}",
            "-" if ratio is None else f"{ratio:.2f}",
            f"{row['state_bytes'] / 1e9:.2f}",
            "-" if peak is None else f"{peak / 1e9:.2f}",
        )
    return found
