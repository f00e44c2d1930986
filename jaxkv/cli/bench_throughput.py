"""`jaxkv bench throughput`: tokens per second of whole generations, by batch size."""

import collections
import dataclasses
import gc
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import typer

from jaxkv import registry
from jaxkv.bench import measure, throughput, throughput_picture
from jaxkv.bench import throughput_report as report
from jaxkv.bench.throughput import Work
from jaxkv.cli import bench
from jaxkv.forward import Network
from jaxkv.models.decoder import Config
from jaxkv.options import Options
from jaxkv.provenance import write_json

app = bench.app  # with one command more

AUTO = "auto"


@app.command("throughput")
def command(
    model: bench.Model = None,
    shape: bench.Shape = None,
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
    dtype: bench.Dtype = None,
    decode_implementation: bench.Kernel = None,
    copy_gib: bench.CopyGib = None,
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
    json_: bench.Json = False,
    out: bench.Out = None,
) -> None:
    """Sample whole generations at every batch size that fits; tokens/s and memory.

    Only some steps of each range of lengths are timed; the JSON says which. On a GPU,
    XLA_PYTHON_CLIENT_MEM_FRACTION says how much memory there is to fill.
    """
    begin = time.perf_counter()
    console = bench.console_of(json_)
    work = Work(
        **dict(prompt=prompt, new=new, ranges=ranges, steps=steps, repeats=repeats),
        prefill_rows=prefill_rows,
    )
    options = options_of(names, work, budget, decode_implementation)
    wanted = wanted_batches(batches)
    if picture is not None:
        throughput_picture.check(picture)
    theirs = transformers and report.read_transformers(transformers)
    # Before the weights, which may leave no room for it.
    bandwidth = measure.copy_bandwidth(bench.copy_bytes(copy_gib))
    with console.status("weights"):
        name, network, params = bench.network_of(model, shape, dtype)
    result = _header(name, params, work, budget, options, bandwidth)
    if theirs is not None:
        report.add_transformers(result, theirs)
    with console.status("timing"):
        run_cells(
            Timer(network, params, work, bandwidth),
            plan_cells(network.config, params, work, options, wanted),
            options,
            result,
            out=out,
            until=None if seconds is None else begin + seconds,
            retry=wanted is None,
        )
    if picture is not None:
        throughput_picture.draw(picture, result)
    if not json_:
        console.print(report.table(result))
        console.print("\n".join(report.sentences(result)))
    bench.finish(result, json_, out)


def wanted_batches(text: str) -> list[int] | None:
    """Return the batch sizes of the flag, or None for auto; or raise ValueError."""
    if text != AUTO:
        return bench.batches_of(text, "--batches")
    if measure.device_memory("bytes_limit") is None:
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
        options = bench.options_of(budget if policy.evicts else None, name, kernel)
        found[name] = options
        if not policy.evicts:
            continue
        if budget >= work.prompt + work.new:
            raise ValueError(
                f"--budget {budget} keeps all {work.prompt + work.new} tokens of "
                "--prompt and --new, so that it equals the full cache; make it less."
            )
        if options.prompt_budget < work.prompt:
            raise ValueError(
                f"--prompt {work.prompt} does not fit --budget {budget}, of which "
                f"{name} leaves {options.prompt_budget} to it; shorten the prompt."
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


def plan_cells(
    config: Config,
    params: Any,
    work: Work,
    options: Mapping[str, Options],
    wanted: Sequence[int] | None,
) -> list[tuple[str, int, str | None]]:
    """Return methods and batches in order, and why one does not fit.

    The largest come first, method by method in turn, so that a run which is cut short
    has them.

    Args:
      config: of the network.
      params: its parameters.
      work: what is generated.
      options: of each method.
      wanted: batch sizes; None, where the device tells its memory, for those of
        `throughput.automatic_batches`.
    """
    limit = measure.device_memory("bytes_limit")
    dtype = params["embedding"].dtype
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    columns = []
    for method, option in options.items():
        largest = None
        if limit is not None:
            room = int(throughput.USABLE * limit) - weights
            largest = throughput.largest_batch(config, work, option, dtype, room=room)
        batches = throughput.automatic_batches(largest) if wanted is None else wanted
        column = []
        for batch in sorted(set(batches), reverse=True):
            why = None
            if largest is not None and not 0 < batch <= largest:
                why = f"by its shapes at most {largest} rows fit {limit} bytes"
            column.append((method, batch, why))
        columns.append(column)
    turns = itertools.zip_longest(*columns)
    return [cell for turn in turns for cell in turn if cell is not None]


class Timer:
    """Times one method and batch after another, on one set of weights."""

    def __init__(self, network: Network, params: Any, work: Work, bandwidth: float):
        """Take what all have in common; see `throughput.time_generation`."""
        self._network, self._params = network, params
        self._work, self._bandwidth = work, bandwidth
        self._prefill: dict[tuple[str, int], float] = {}

    def time(
        self, method: str, options: Options, batch: int, why: str | None
    ) -> dict[str, Any]:
        """Return a record, ready for JSON.

        Args:
          method: name of the options.
          options: static.
          batch: rows.
          why: a reason not to try; see `plan_cells`.
        """
        row = {"method": method, "batch": batch}
        if why is not None:
            return row | {"fits": False, "why": why}
        try:
            found = throughput.time_generation(
                self._network,
                self._params,
                batch=batch,
                work=self._work,
                options=options,
                bandwidth=self._bandwidth,
                prefill_seconds=self._prefill_seconds(method, options, batch),
            )
            return row | {"fits": True} | dataclasses.asdict(found)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return row | {"fits": False, "why": str(error).splitlines()[0][:200]}
        finally:
            gc.collect()  # a cache that is not freed leaves no room for the next

    def _prefill_seconds(self, method: str, options: Options, batch: int) -> float:
        rows = min(batch, self._work.prefill_rows)
        if (method, rows) not in self._prefill:
            self._prefill[method, rows] = throughput.time_prefill(
                self._network, self._params, rows=rows, work=self._work, options=options
            )
        return self._prefill[method, rows] * batch / rows


def run_cells(
    timer: Timer,
    cells: Sequence[tuple[str, int, str | None]],
    options: Mapping[str, Options],
    result: dict[str, Any],
    *,
    out: Path | None,
    until: float | None,
    retry: bool,
) -> None:
    """Time one cell after another, and save what there is after each.

    Args:
      timer: that times them.
      cells: of `plan_cells`.
      options: of each method.
      result: gets records and what follows from them.
      out: file of it.
      until: `time.perf_counter()` from which on nothing is started.
      retry: try 15/16 of a batch for which memory did not suffice.
    """
    left = collections.deque(cells)
    while left:
        method, batch, why = left.popleft()
        if until is not None and time.perf_counter() > until:
            result["not_started"].append({"method": method, "batch": batch})
            continue
        row = timer.time(method, options[method], batch, why)
        if retry and why is None and not row["fits"] and batch > 8:
            left.appendleft((method, batch * 15 // 16, None))
        result["rows"].append(row)
        result["ratios"] = report.ratios(result["rows"])
        if out is not None:  # a crash must not lose what was timed before it
            write_json(out, result)


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
    header = bench.header_of("throughput", name, Options(), dtype)
    for key in ("decode", "decode_implementation"):
        del header[key]  # each method has its own
    return header | {
        **dataclasses.asdict(work),
        "budget": budget,
        "sampling": throughput.sampling(work),
        "methods": {
            method: {
                "decode": repr(option.decode),
                "decode_implementation": option.decode_implementation
                or option.decode.default_implementation(jax.default_backend()),
                "slots": option.num_slots(work.prompt, work.new),
            }
            for method, option in options.items()
        },
        "copy_bytes_per_second": bandwidth,
        "memory_limit_bytes": measure.device_memory("bytes_limit"),
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "not_started": [],
        "rows": [],
        "ratios": [],
    }
