"""`jaxkv plan`: what fits on which devices, and the fastest that a step can be."""

import dataclasses
import json
from typing import Annotated, Any

import rich.box
import typer
from rich.console import Console
from rich.table import Table

from jaxkv import registry
from jaxkv.cli import flags
from jaxkv.cli.groups import grouped
from jaxkv.cli.terminal import right_aligned
from jaxkv.language_model import locate, read_config
from jaxkv.models.hf.weights import check_dtype
from jaxkv.models.public_shapes import SHAPES
from jaxkv.options import Options


@grouped
def plan(
    *,
    model: Annotated[
        str,
        typer.Argument(
            help=f"A shape ({', '.join(SHAPES)}), or a checkpoint, whose weights are "
            "not read."
        ),
    ],
    devices: Annotated[
        str,
        typer.Option(help="Such as h100x4, h200 or v5e:4x4; you need not have them."),
    ],
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 8,
    context: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of a row, its output included; default: what fits the model, "
            "up to 8192.",
        ),
    ] = None,
    new: Annotated[int, typer.Option(min=1, help="Tokens of an output.")] = 1024,
    budget: flags.Budget = None,
    decode: flags.Decode = "longflow",
    mesh: Annotated[
        str, typer.Option(help="As in jaxkv generate; auto cuts rows last.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="Of weights and cache.")] = "bfloat16",
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Ask the TPU's compiler for temporaries: minutes; needs libtpu.",
        ),
    ] = False,
    as_json: flags.Json = False,
) -> None:
    """Say what fits on devices that you need not have, and how fast a step can be."""
    # It computes, and is needed by nobody else.
    from jaxkv.bench import ahead, fit

    policy = registry.parse(decode, registry.DECODE, flag="--decode")
    check_dtype(dtype)
    config = SHAPES.get(model) or read_config(locate(model))
    if context is None:
        context = min(8192, config.max_positions)
    if new >= context:
        raise ValueError(f"--new {new} must be less than --context {context}.")
    if context > config.max_positions:
        raise ValueError(
            f"--context {context}: {model} was made for {config.max_positions} "
            "positions; give that many at most."
        )
    kind, count = fit.parse_devices(devices)
    laid = fit.mesh_for(config, mesh, count)
    methods = {"full cache": Options()}
    if budget is not None:
        methods[f"budget {budget}"] = Options(budget=budget, decode=policy)
    sizes: dict[str, Any] = dict(
        batch=batch, prompt=context - new, new=new, dtype=dtype
    )
    found = {}
    for name, options in methods.items():
        options.check()
        temp = None
        if compiled:
            temp = ahead.temporaries(config, devices, laid, options, **sizes)
        found[name] = fit.fit(
            config, fit.KINDS[kind], laid, options, temp_bytes=temp, **sizes
        )
    result: dict[str, Any] = {
        "model": model,
        "devices": devices,
        "mesh": dict(laid.shape),
        "dtype": dtype,
        "context": context,
        "new": new,
        "decode": decode,
        "temporaries_are_compiled": compiled,
        "bandwidth_is_measured": fit.KINDS[kind].measured,
        "methods": {
            name: dataclasses.asdict(one) | {"fits": one.fits}
            for name, one in found.items()
        },
    }
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        Console(soft_wrap=False).print(_table(result))


def _table(result: dict[str, Any]) -> Table:
    """Return one column per method, bytes of one device."""
    methods, compiled = result["methods"], result["temporaries_are_compiled"]
    shape = ", ".join(f"{axis}={size}" for axis, size in result["mesh"].items())
    source = "measured" if result["bandwidth_is_measured"] else "its maker's"
    table = Table(
        "of one device",
        *right_aligned(*methods),
        title=f"{result['model']}, {result['dtype']}, {result['context']} tokens, on "
        f"{result['devices']} ({shape})",
        caption=f"floor: what a device reads, at {source} bandwidth, without the time "
        f"of exchanges; temporaries are {'compiled' * compiled or 'a formula'}",
        box=rich.box.SIMPLE,
    )
    rows = {
        "batch": lambda one: f"{one['batch']}",
        "slots of a layer": lambda one: f"{one['slots']}",
        "weights, GB": lambda one: f"{one['weight_bytes'] / 1e9:.2f}",
        "cache, GB": lambda one: f"{one['cache_bytes'] / 1e9:.2f}",
        "temporaries, GB": lambda one: f"{one['temp_bytes'] / 1e9:.2f}",
        "together, GB": lambda one: f"{one['total_bytes'] / 1e9:.2f}",
        "usable, GB": lambda one: f"{one['memory_bytes'] / 1e9:.2f}",
        "fits": lambda one: "yes" if one["fits"] else "no",
        "largest batch": lambda one: f"{one['largest_batch']}",
        "step, floor ms": lambda one: f"{one['floor_ms']:.2f}",
        "tokens/s at most": lambda one: f"{one['tokens_per_second']:.0f}",
        "sums of a step, MB": lambda one: f"{one['exchanged_bytes'] / 1e6:.2f}",
    }
    for name, shown in rows.items():
        table.add_row(name, *map(shown, methods.values()))
    return table
