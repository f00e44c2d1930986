"""Time to first token and memory of prefill: full cache, DapQ and SnapKV, side by side.

    python benchmarks/prefill_device.py prefill.json

Random weights in the shape of a public network. Methods take turns, so that a drift of
the clock hits all of them; each number is a median over the turns, with quartiles. The
time is that of `generation.start_jit`, compiled before: prompt in, first token out. One
compiled program per method and length; what the compiler says about its memory stands
beside the time, and so does the device's highest use where the device tells.
"""

import dataclasses
import gc
import pathlib
import statistics
import time
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from jaxkv import DapQ, Full, Options, SnapKV, generation
from jaxkv import state as kv
from jaxkv.models.decoder import Decoder, random_parameters
from jaxkv.models.public_shapes import SHAPES
from jaxkv.provenance import provenance, write_json
from jaxkv.runtime.seeds import row_keys
from jaxkv.text.planning import bucket

METHODS = {
    "full": Full(),
    "dapq": DapQ(),
    "dapq:tables": DapQ.tables(),
    "snapkv": SnapKV(),
}


def options_of(method, budget, scores):
    """Return the options of a method; the full cache has no budget."""
    return Options(
        budget=None if method == "full" else budget,
        prefill=METHODS[method],
        scores_implementation=None if scores == "auto" else scores,
    )


def compile_start(network, arguments, options, length, new):
    """Return the program, and what the compiler says about its memory, in bytes."""
    slots = options.layer_slots(bucket(length), new, network.config.windows)
    program = generation.start_jit.lower(
        network, *arguments, options=options, slots=slots, max_out=new
    ).compile()
    analysis: Any = program.memory_analysis()
    return program, dict(
        argument_bytes=analysis.argument_size_in_bytes,
        output_bytes=analysis.output_size_in_bytes,
        temp_bytes=analysis.temp_size_in_bytes,
        peak_bytes=getattr(analysis, "peak_memory_in_bytes", None),
    )


def time_length(network, params, length, batch, budget, repeats, new, scores, methods):
    """Return one record per method for prompts of `length` tokens."""
    rng = np.random.default_rng(length)
    tokens = rng.integers(0, network.config.vocab_size, (batch, bucket(length)))
    arguments = (
        params,
        jnp.asarray(tokens, jnp.int32),
        jnp.full(batch, length, jnp.int32),
        row_keys(0, batch),
        jnp.array([-1], jnp.int32),
    )
    programs, records = {}, {}
    for method in methods:
        options = options_of(method, budget, scores)
        options.check()
        programs[method], memory = compile_start(
            network, arguments, options, length, new
        )
        out = jax.block_until_ready(programs[method](*arguments))
        records[method] = dict(
            method=repr(METHODS[method]),
            length=length,
            batch=batch,
            budget=options.budget,
            cache_bytes=kv.num_bytes(out.cache),
            seconds=[],
            **memory,
        )
        del out
    for turn in range(repeats):
        # Forwards, then backwards, so that nobody always comes first.
        order = methods if turn % 2 == 0 else methods[::-1]
        for method in order:
            begin = time.perf_counter()
            out = jax.block_until_ready(programs[method](*arguments))
            records[method]["seconds"].append(time.perf_counter() - begin)
            del out
    for record in records.values():
        record |= summary(record, records["full"])
    return list(records.values())


def summary(record, full):
    """Return the numbers that a record of calls and of memory comes to."""
    seconds = record["seconds"]
    quartiles = statistics.quantiles(seconds, n=4)
    ratios = [a / b for a, b in zip(seconds, full["seconds"], strict=True)]

    def used(one):
        return one["output_bytes"] + one["temp_bytes"]

    return dict(
        median_s=statistics.median(seconds),
        first_quartile_s=quartiles[0],
        third_quartile_s=quartiles[2],
        ratio_to_full=statistics.median(ratios),
        program_bytes=record["argument_bytes"] + used(record),
        bytes_below_full=used(full) - used(record),
        evicted_bytes=full["cache_bytes"] - record["cache_bytes"],
    )


def main(
    out: pathlib.Path,
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "llama-3.1-8b",
    lengths: str = "8192,32768,131072",
    batch: int = 1,
    budget: int = 1024,
    repeats: int = 9,
    new: int = 64,
    dtype: str = "bfloat16",
    layers: Annotated[int, typer.Option(help="0: all of the shape")] = 0,
    scores: Annotated[str, typer.Option(help="window_scores, or auto")] = "auto",
    methods: Annotated[str, typer.Option(help="full among them")] = ",".join(METHODS),
) -> None:
    """Time all methods at all lengths, and write the file after each length."""
    if repeats < 2:
        raise typer.BadParameter("needs at least 2 repeats for quartiles.")
    chosen = methods.split(",")
    if "full" not in chosen or not set(chosen) <= set(METHODS):
        raise typer.BadParameter(f"full and some of {', '.join(METHODS)}.")
    config = SHAPES[shape]
    if layers:
        config = dataclasses.replace(config, num_layers=layers)
    network = Decoder(config)
    params = jax.block_until_ready(
        random_parameters(config, jax.random.key(0), jnp.dtype(dtype))
    )
    report = provenance() | dict(shape=shape, layers=config.num_layers, dtype=dtype)
    report |= dict(new=new, scores=scores, timings=[])
    for length in map(int, lengths.split(",")):
        for record in time_length(
            network, params, length, batch, budget, repeats, new, scores, chosen
        ):
            report["timings"].append(record)
            print(
                "{length:7} {median_s:9.4f} s [{first_quartile_s:.4f}, "
                "{third_quartile_s:.4f}] x {ratio_to_full:.4f}  temporaries "
                "{temp_bytes:,} B, cache {cache_bytes:,} B  {method}".format(**record),
                flush=True,
            )
        report["device_peak_bytes"] = (jax.devices()[0].memory_stats() or {}).get(
            "peak_bytes_in_use"
        )
        write_json(out, report)
        jax.clear_caches()
        gc.collect()


if __name__ == "__main__":
    typer.run(main)
