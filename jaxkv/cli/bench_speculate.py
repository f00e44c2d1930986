"""`jaxkv bench speculate`: what a step with a tree costs, and what its parts cost."""

import dataclasses
from typing import Annotated, Any

import typer
from rich.table import Table

from jaxkv.bench.tree_step import TreeWork, full_tree, time_batch, time_prefill
from jaxkv.cli import flags, parsing
from jaxkv.cli.bench_flags import (
    Decoding,
    Output,
    Source,
    batches_of,
    header_of,
    mesh_sizes,
)
from jaxkv.cli.groups import grouped
from jaxkv.speculation.drafters import MOST_NODES


@grouped
def speculate(
    *,
    source: Source,
    batch: Annotated[str, typer.Option(help="Rows; several with commas.")] = "1",
    nodes: Annotated[
        str, typer.Option(help="Nodes of the trees with their root, with commas.")
    ] = "16,64",
    context: Annotated[
        int, typer.Option(min=2, help="Tokens so far, the new ones included.")
    ] = 3200,
    prompt: Annotated[
        int, typer.Option(min=16, help="Tokens for matching and prefill.")
    ] = 8192,
    steps: Annotated[int, typer.Option(min=1, help="Steps of one timed call.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls.")] = 5,
    decoding: Decoding,
    mesh: flags.Mesh = None,
    output: Output,
) -> None:
    """Time a step with a full tree against a plain one, matching, and prefill.

    All ratios are of one run. A step with a tree pays where more drafted tokens are
    accepted, on average, than its break-even: its price in plain steps, less one. By
    default `jaxkv.generate` measures that itself; as a drafter's `break_even` it makes
    the outputs of a lossy rule repeatable.
    Where drafts are given up, a step costs a plain one and a draft.
    """
    sizes = _nodes(nodes)
    batches = batches_of(batch)
    if context <= steps:
        raise ValueError(f"--context {context} must exceed --steps {steps}.")
    options, console = decoding.options, output.console
    for size in sizes:
        dataclasses.replace(options, speculate=full_tree(size)).check()
    with console.status("weights"):
        name, network, params = source.load(decoding.dtype, mesh=mesh)
    work = TreeWork(
        nodes=tuple(sizes),
        **dict(context=context, prompt=prompt, steps=steps, repeats=repeats),
    )
    rows = []
    for number in batches:
        with console.status(f"batch {number}"):
            rows.append(
                time_batch(network, params, work, batch=number, options=options)
            )
    with console.status("prefill"):
        prefill = time_prefill(network, params, prompt=prompt, repeats=repeats)
    result = header_of("speculate", name, options, params["embedding"].dtype) | {
        "context": context,
        "mesh": mesh_sizes(params),
        "steps": steps,
        "prompt": prompt,
        "rows": rows,
        "prefill": prefill,
    }
    output.finish(result, _table(result))


def _nodes(text: str) -> list[int]:
    most = 1 + MOST_NODES
    return parsing.numbers(
        text,
        "--nodes takes numbers such as 16,64;",
        outside=f"--nodes: a tree has 2 to {most} nodes,",
        least=2,
        most=most,
    )


def _table(result: dict[str, Any]) -> Table:
    prefill = result["prefill"]
    table = Table(
        *("batch", "what", "ms", "in plain steps", "pays from"),
        title=f"{result['model']}, {result['dtype']}, {result['decode']}, "
        f"on {result['device']}",
        caption=f"prefill of {result['prompt']} tokens: {prefill['plain_ms']:.1f} ms, "
        f"with the likeliest tokens {prefill['ratio']:.3f} times that; a tree pays "
        "from so many drafted tokens accepted per step (break_even)",
    )
    for row in result["rows"]:
        plain = row["plain_step_ms"]
        lines = [
            ("plain step", plain, ""),
            ("no draft", row["no_draft"]["step_ms"], ""),
        ]
        lines += [
            (f"{t['nodes']} nodes", t["step_ms"], f"{t['break_even']:.2f}")
            for t in row["trees"]
        ]
        lines += [
            (f"draft of {name}", m["draft_ms"], "")
            for name, m in row["matchers"].items()
        ]
        for what, ms, pays in lines:
            cells = (what, f"{ms:.3f}", f"{ms / plain:.3f}", pays)
            table.add_row(str(row["batch"]), *cells)
    return table
