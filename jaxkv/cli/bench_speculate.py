"""`jaxkv bench speculate`: what a step with a tree costs, and what its parts cost."""

import dataclasses
import math
import statistics
import time
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.table import Table

from jaxkv import generation
from jaxkv.arguments import row_keys
from jaxkv.bench import compiling, measure
from jaxkv.bench.matcher import time_matcher
from jaxkv.cli import bench, flags, parsing
from jaxkv.forward import Network
from jaxkv.inference import bucket
from jaxkv.options import Options
from jaxkv.speculation import loop as speculation
from jaxkv.speculation.drafters import MOST, Aligned, Drafter, PromptLookup, Tree
from jaxkv.speculation.matching import Context
from jaxkv.trees import DraftTree

app = bench.app  # with one command more
_NO_STOP = (-1,)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullTree:
    """A drafter whose trees are always full, and wrong: the price of a step.

    Attributes:
      num_draft_tokens: nodes, the root not counted.
      depth: of the deepest node.
    """

    num_draft_tokens: int
    depth: int = 10
    break_even = 0.0
    likeliest = False

    def check(self) -> None:
        """Accept what the command has checked."""

    def draft(self, context: Context) -> DraftTree:
        """Return chains of `depth` nodes, side by side below the root."""
        node = np.arange(1 + self.num_draft_tokens)
        depths = np.where(node == 0, 0, (node - 1) % self.depth + 1)
        parents = np.where(depths <= 1, 0, node - 1)
        shape = (context.position.shape[0], len(node))

        def rows(x):
            return jnp.broadcast_to(jnp.asarray(x, jnp.int32), shape)

        newest = jnp.take_along_axis(context.text, context.position[:, None], axis=1)
        return DraftTree(
            # Whatever the network says, a chance hit costs one step in thousands.
            tokens=jnp.where(node == 0, newest, rows(node % 7)),
            parents=rows(parents),
            depths=rows(depths),
            valid=jnp.ones(shape, bool),
            kinds=rows(0 * node),
        )


@app.command()
def speculate(
    model: bench.Model = None,
    shape: bench.Shape = None,
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
    budget: bench.Budget = None,
    decode: flags.Decode = "full",
    dtype: bench.Dtype = None,
    decode_implementation: bench.Kernel = None,
    json_: bench.Json = False,
    out: bench.Out = None,
) -> None:
    """Time a step with a full tree against a plain one, matching, and prefill.

    All ratios are of one run. A step with a tree pays where more drafted tokens are
    accepted, on average, than its break-even: its price in plain steps, less one. That
    is what a drafter's `break_even` should be for trees of this size on this device.
    Where drafts are given up, a step costs a plain one and a draft.
    """
    console = bench.console_of(json_)
    sizes = _nodes(nodes)
    batches = bench.batches_of(batch)
    if context <= steps:
        raise ValueError(f"--context {context} must exceed --steps {steps}.")
    options = bench.options_of(budget, decode, decode_implementation)
    for size in sizes:
        with_tree = dataclasses.replace(options, speculate=_tree(size))
        with_tree.check()
    with console.status("weights"):
        name, network, params = bench.network_of(model, shape, dtype)
    rows = []
    for number in batches:
        with console.status(f"batch {number}"):
            rows.append(
                time_batch(
                    *(network, params, sizes),
                    batch=number,
                    context=context,
                    prompt=prompt,
                    steps=steps,
                    repeats=repeats,
                    options=options,
                )
            )
    with console.status("prefill"):
        prefill = time_prefill(network, params, prompt=prompt, repeats=repeats)
    result = bench.header_of("speculate", name, options, params["embedding"].dtype) | {
        "context": context,
        "steps": steps,
        "prompt": prompt,
        "rows": rows,
        "prefill": prefill,
    }
    if not json_:
        console.print(_table(result))
    bench.finish(result, json_, out)


def time_batch(
    network: Network,
    params: Any,
    sizes: list[int],
    *,
    batch: int,
    context: int,
    prompt: int,
    steps: int,
    repeats: int,
    options: Options,
) -> dict[str, Any]:
    """Return the times of one batch size, ready for JSON.

    Args:
      network: static.
      params: its parameters.
      sizes: nodes of the trees, roots included.
      batch: rows.
      context: tokens so far, the new ones included.
      prompt: tokens that are matched in.
      steps: of one timed call.
      repeats: timed calls.
      options: of the plain step.
    """

    def step_of(drafter):
        return time_steps(
            *(network, params, drafter),
            batch=batch,
            context=context,
            steps=steps,
            repeats=repeats,
            options=options,
        )

    plain = step_of(None)
    found = []
    for size in sizes:
        step = step_of(_tree(size))
        ratio = step / plain
        found.append(
            {"nodes": size, "step_ms": step, "ratio": ratio, "break_even": ratio - 1}
        )
    idle = step_of(Tree(break_even=math.inf))
    matchers = {}
    for drafter in (PromptLookup(), Tree(), Aligned()):
        ms = time_matcher(drafter, batch=batch, width=prompt + 64, repeats=repeats)
        name = type(drafter).__name__
        matchers[name] = {"draft_ms": ms, "share_of_plain_step": ms / plain}
    return {
        "batch": batch,
        "plain_step_ms": plain,
        "trees": found,
        # Of `Tree`, whose drafts are given up before they cost a step.
        "no_draft": {"step_ms": idle, "ratio": idle / plain},
        "matchers": matchers,
    }


def time_steps(
    network: Network,
    params: Any,
    drafter: Drafter | None,
    *,
    batch: int,
    context: int,
    steps: int,
    repeats: int,
    options: Options,
) -> float:
    """Return the median milliseconds of a decode step of `generation.advance`.

    Arguments are those of `time_batch`; `drafter` None times plain steps.
    """
    cache = measure.full_cache(
        network.config,
        batch=batch,
        slots=options.num_slots(context - steps, steps),
        dtype=params["embedding"].dtype,
        key=jax.random.key(1),
    )
    options = dataclasses.replace(options, speculate=drafter)
    lengths = jnp.full(batch, context, jnp.int32)
    until, stop_ids = jnp.int32(steps), jnp.array(_NO_STOP, jnp.int32)

    def rewound(cache):
        state = measure.rewind(
            cache, steps=steps, context=context, policy=options.decode
        )
        if drafter is None:
            return state
        tokens = jnp.zeros((batch, context), jnp.int32)
        begun = speculation.begin(drafter, tokens, lengths, state.last, max_out=steps)
        # One buffer in two places cannot be donated.
        begun = jax.tree.map(lambda x: jnp.array(x, copy=True), begun)
        return dataclasses.replace(state, speculation=begun)

    state = rewound(cache)
    program, _ = compiling.compile_stage(
        lambda: generation.advance_jit.lower(
            network, params, state, until, stop_ids, options=options
        )
    )
    calls = []
    for _ in range(repeats + 1):
        state = jax.block_until_ready(rewound(cache))
        begin = time.perf_counter()
        state = jax.block_until_ready(program(params, state, until, stop_ids))
        ms = 1e3 * (time.perf_counter() - begin)
        done = steps
        if drafter is not None:  # fewer, where a draft was right by chance
            done = int(state.speculation.counts.steps.max())
        calls.append(ms / done)
        cache = state.cache
    return statistics.median(calls[1:])


def time_prefill(
    network: Network, params: Any, *, prompt: int, repeats: int
) -> dict[str, Any]:
    """Return the times of a prefill, without and with the likeliest tokens kept.

    Args:
      network: static.
      params: its parameters.
      prompt: tokens of the one prompt.
      repeats: timed calls.
    """
    padded = bucket(prompt)
    shape = (1, padded)
    tokens = jax.random.randint(
        jax.random.key(2), shape, 0, network.config.vocab_size, jnp.int32
    )
    found = {}
    for name, drafter in (("plain_ms", Tree()), ("likeliest_ms", Aligned())):
        options = Options(speculate=drafter)

        def run(options=options):
            return generation.start_jit(
                network,
                params,
                tokens,
                jnp.asarray([prompt], jnp.int32),
                row_keys(0, 1),
                jnp.array(_NO_STOP, jnp.int32),
                options=options,
                slots=options.num_slots(padded, 64),
                max_out=64,
            ).last

        found[name] = 1e3 * measure.median_seconds(run, repeats)
    return found | {"ratio": found["likeliest_ms"] / found["plain_ms"]}


def _tree(size: int) -> FullTree:
    return FullTree(num_draft_tokens=size - 1, depth=min(10, size - 1))


def _nodes(text: str) -> list[int]:
    most = 1 + MOST["num_draft_tokens"]
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
