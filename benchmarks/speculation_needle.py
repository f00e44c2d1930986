"""Speculation end to end, on needle's own tasks: speed, acceptance and score.

    python benchmarks/speculation_needle.py --out speculation_needle.json
    python benchmarks/speculation_needle.py --dev --out speculation_needle_dev.json
    python benchmarks/speculation_needle.py --table --out speculation_table.json

The first compares ways of drafting and of accepting on the report seed: on the quoting
tasks (quote, go on, edit), on `complete-code`, which is `continue` with code alone, and
on `niah_multiquery`, whose answer gathers what stands scattered. That is as near to a
summary as needle comes: it was not trained to write any. With `--dev` it looks at the
development seed and at all forms of conditional verification instead: what is chosen,
is chosen there. With `--table` it crosses batch sizes with speculation and with
`--evictions`:

* `longflow`: `--prefill` cuts the prompt, `LongFlow.recommended()` the output;
* `longflow-paper`: the same, with `LongFlow()`;
* `streaming-llm`: `StreamingLLM` cuts both.

By default the table is of `quote`, where drafts are right and an evicted prompt is
missed, and of `machine` (a short prompt, an answer of `--length` tokens), which is what
LongFlow is for; there draft from the output as well (`--include-output`).

Every variant gets the same prompts in the same order, and its first batch twice, since
the first call compiles. Speed is that of decoding alone; prefill is given beside it.
Outputs are compared with those of the same eviction without drafts. A variant is on the
disk as soon as it is measured; after `--seconds` no other one begins, and what was left
out is listed in the file and at the end.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from memory_watch import Memory, watched

import jaxkv
from jaxkv import registry
from jaxkv import tasks as jaxkv_tasks
from jaxkv.bench.clock import device_memory
from jaxkv.bench.matcher import time_matcher
from jaxkv.evaluation.questions import (
    DEVELOPMENT_SEED,
    QUOTING,
    REASONING,
    REPORT_SEED,
    Cell,
    draw_sample,
    judge,
)
from jaxkv.options import described
from jaxkv.provenance import provenance, write_json
from jaxkv.text.planning import bucket

FORMS: tuple[Literal["F1", "F2", "F3", "F4"], ...] = ("F1", "F2", "F3", "F4")
TASKS = (*QUOTING, "complete-code", "niah_multiquery")
TABLE_TASKS = ("quote", "machine")
CODE = (("stdlib", 0.6), ("code", 0.4))


def variants(nodes: int, *, dev: bool) -> dict[str, dict[str, Any]]:
    """Return the arguments of `jaxkv.generate` by the name of the variant."""
    drafts = nodes - 1
    trees: dict[str, Any] = dict(num_draft_tokens=drafts, break_even=0.35)
    aligned = jaxkv.Aligned(**trees)
    shown: dict[str, dict[str, Any]] = {
        "plain": {},
        "prompt lookup": {"speculate": jaxkv.PromptLookup(break_even=0.2)},
        "tree": {"speculate": jaxkv.Tree(**trees)},
        "aligned": {"speculate": aligned},
    }
    if not dev:
        return shown | {
            "aligned, conditional": {
                "speculate": aligned,
                "accept": jaxkv.Conditional(),
            }
        }
    rules: dict[str, Any] = {
        f"conditional {form}": jaxkv.Conditional(form=form) for form in FORMS
    }
    rules |= {
        "fixed threshold": jaxkv.FixedThreshold(),
        "top-k": jaxkv.TopK(),
        "typical": jaxkv.Typical(),
    }
    tail = dataclasses.replace(aligned, tail=True)
    return (
        shown
        | {"aligned, tail": {"speculate": tail}}
        | {
            f"aligned, {name}": {"speculate": aligned, "accept": rule}
            for name, rule in rules.items()
        }
    )


def table_variants(
    tree: jaxkv.Tree, budget: int, evictions: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return plain decoding, speculation, and each eviction without and with it."""
    draft = {"speculate": tree}
    table = {"plain": {}, "speculation": draft}
    for name, policies in evictions.items():
        evict = {"budget": budget} | policies
        table |= {f"eviction {name}": evict, f"both {name}": evict | draft}
    return table


def chosen_evictions(names: str, prefill: str) -> dict[str, dict[str, Any]]:
    """Return the policies of the evictions that were asked for, by name."""
    try:
        cut = registry.parse(prefill, registry.PREFILL, flag="--prefill")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    stream = jaxkv.StreamingLLM()
    known = {
        "longflow": {"prefill": cut, "decode": jaxkv.LongFlow.recommended()},
        "longflow-paper": {"prefill": cut, "decode": jaxkv.LongFlow()},
        "streaming-llm": {"prefill": stream, "decode": stream},
    }
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        if name not in known:
            raise typer.BadParameter(
                f"unknown {name!r}; choose of {', '.join(known)}.",
                param_hint="--evictions",
            )
    return {name: known[name] for name in asked}


def measure(
    lm: jaxkv.LanguageModel,
    samples: list[Any],
    *,
    batch: int,
    plain: list[tuple[int, ...]] | None,
    **arguments: Any,
) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """Generate for all samples, and return what it came to, and the tokens.

    Args:
      lm: the model.
      samples: of one task.
      batch: rows of one call.
      plain: tokens of plain decoding, to compare with.
      **arguments: of `jaxkv.generate`.
    """
    new = max(sample.max_new_tokens for sample in samples)
    groups = [samples[i : i + batch] for i in range(0, len(samples), batch)]
    tokens: list[tuple[int, ...]] = []
    right, scores, stats, wall = [], [], [], 0.0
    memory = Memory()
    for number, group in enumerate(groups):
        prompts = [sample.prompt for sample in group]
        if number == 0:
            jaxkv.generate(lm, prompts, max_new_tokens=new, **arguments)
        begin = time.perf_counter()
        with watched(memory):
            out = jaxkv.generate(lm, prompts, max_new_tokens=new, **arguments)
        wall += time.perf_counter() - begin - out.stats.compile_seconds
        stats.append(out.stats)
        tokens += out.tokens
        for sample, text in zip(group, out.text, strict=True):
            by_lines = sample.task in REASONING
            whole, part = judge(sample, text, by_lines=by_lines)
            right.append(whole)
            scores.append(part)
    decoded = sum(len(row) for row in tokens) - len(tokens)
    decode = sum(s.decode_seconds for s in stats)
    result = {
        "samples": len(samples),
        "accuracy": float(np.mean(right)),
        "score": float(np.mean(scores)),
        "output_tokens": decoded + len(tokens),
        "decode_seconds": decode,
        "prefill_seconds": sum(s.prefill_seconds for s in stats),
        "wall_seconds": wall,
        "tokens_per_second": decoded / decode if decode else 0.0,
        "cache_bytes": max(s.cache_bytes for s in stats),
        # Weights, cache and temporaries of the timed calls, sampled each millisecond;
        # then the allocator's own peak so far, of all variants until here.
        "peak_bytes": memory.peak,
        "peak_bytes_so_far": device_memory("peak_bytes_in_use"),
    }
    if stats[0].drafts:
        result |= drafts_of([s.drafts for s in stats if s.drafts], decoded)
        width = max(bucket(max(s.prompt_tokens)) for s in stats) + bucket(new)
        result["matcher_ms"] = time_matcher(
            arguments["speculate"], batch=batch, width=width, repeats=3
        )
    if plain is not None:
        result |= differences(plain, tokens)
    return result, tokens


def drafts_of(drafts: list[jaxkv.DraftStats], decoded: int) -> dict[str, Any]:
    """Sum up what the batches' drafts came to."""

    def total(field):
        return np.sum([getattr(d, field) for d in drafts], axis=0).tolist()

    def by_kind(field):
        return {
            kind: sum(getattr(d, field)[kind] for d in drafts)
            for kind in getattr(drafts[0], field)
        }

    steps, accepted = total("steps"), total("accepted")
    given, taken = by_kind("drafted_by_kind"), by_kind("accepted_by_kind")
    shares = [d.unexpected for d in drafts if d.unexpected is not None]
    return {
        "steps": steps,
        "steps_with_draft": total("steps_with_draft"),
        "drafted": total("drafted"),
        "accepted": accepted,
        "mal_with_bonus": decoded / steps,
        "mal_without_bonus": accepted / steps,
        "drafted_by_depth": total("drafted_by_depth"),
        "accepted_by_depth": total("accepted_by_depth"),
        "drafted_by_kind": given,
        "accepted_by_kind": taken,
        "acceptance_by_kind": {k: taken[k] / given[k] for k in given if given[k]},
        "unexpected_share_of_prompt": float(np.mean(shares)) if shares else None,
    }


def differences(
    plain: list[tuple[int, ...]], tokens: list[tuple[int, ...]]
) -> dict[str, Any]:
    """Return how many outputs differ from plain decoding's, and from where on."""
    first = []
    for a, b in zip(plain, tokens, strict=True):
        if a != b:
            unlike = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
            first.append(next(unlike, min(len(a), len(b))))
    return {
        "differing_outputs": len(first) / len(plain),
        "first_difference": min(first) if first else None,
        "median_first_difference": float(np.median(first)) if first else None,
    }


def draw(lm, task, length, samples, seed):
    """Return samples of one cell of the evaluation, or of `complete-code`."""

    def count_tokens(text):
        return len(lm.tokenizer(text, add_special_tokens=False)["input_ids"])

    if task == "complete-code":
        return [
            jaxkv_tasks.make(
                "continue",
                np.random.default_rng([seed, length, i]),
                length=length,
                count_tokens=count_tokens,
                sources=CODE,
            )
            for i in range(samples)
        ]
    cell = Cell(task=task, length=length)
    return [draw_sample(cell, count_tokens, seed=seed, index=i) for i in range(samples)]


def measured(
    lm: jaxkv.LanguageModel,
    task: str,
    drawn: list[Any],
    batch: int,
    chosen: dict[str, dict[str, Any]],
    late: Callable[[], bool],
) -> Iterator[dict[str, Any]]:
    """Give a row per variant, plain decoding's first; of one left out, its name alone.

    Args:
      lm: the model.
      task: for the rows.
      drawn: its samples.
      batch: rows of one call.
      chosen: arguments of `jaxkv.generate` by name.
      late: whether no other variant may begin.
    """
    tokens: dict[str, list[tuple[int, ...]]] = {}
    plain = None
    for name, arguments in chosen.items():
        row = {"task": task, "batch": batch, "variant": name}
        if late():
            yield row
            continue
        same = tokens.get(name.replace("both", "eviction"), tokens.get("plain"))
        cost, tokens[name] = measure(lm, drawn, batch=batch, plain=same, **arguments)
        plain = plain or cost
        drafter = arguments.get("speculate")
        row |= {
            "most_drafted_per_step": drafter and drafter.num_draft_tokens,
            "speedup_of_decoding": cost["tokens_per_second"]
            / plain["tokens_per_second"],
            "speedup_with_prefill": plain["wall_seconds"] / cost["wall_seconds"],
        }
        yield row | cost


def line(row: dict[str, Any]) -> str:
    """Return what is printed of a variant."""
    peak = row["peak_bytes"]
    memory = f"cache {row['cache_bytes'] / 1e6:.1f} MB"
    memory += "" if peak is None else f", peak {peak / 1e6:.0f} MB"
    return (
        f"{row['task']:9} batch {row['batch']:2} {row['variant']:24} "
        f"{row['speedup_of_decoding']:5.2f} x, "
        f"{row['tokens_per_second']:8.1f} tokens/s, "
        f"MAL {row.get('mal_with_bonus', 1):.2f} with bonus, "
        f"accuracy {row['accuracy']:.2f}, {memory}"
    )


def main(
    out: Annotated[Path, typer.Option(help="File for the result.")],
    length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 2048,
    samples: Annotated[int, typer.Option(help="Per task, at least a batch.")] = 32,
    batch: Annotated[str, typer.Option(help="Rows, with commas.")] = "",
    nodes: Annotated[int, typer.Option(help="Of the trees at batch 1.")] = 64,
    budget: Annotated[int, typer.Option(help="Of the evicting variants.")] = 1024,
    evictions: Annotated[
        str, typer.Option(help="Of --table, with commas: see above.")
    ] = "longflow,streaming-llm",
    prefill: Annotated[str, typer.Option(help="Cuts LongFlow's prompts.")] = "dapq",
    include_output: Annotated[
        bool, typer.Option("--include-output", help="Draft from it too, in --table.")
    ] = False,
    tasks: Annotated[str, typer.Option(help="With commas; default: see above.")] = "",
    dtype: Annotated[str | None, typer.Option(help="Default: the device's.")] = None,
    dev: Annotated[bool, typer.Option("--dev", help="Development seed.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Batch sizes.")] = False,
    seconds: Annotated[
        float | None, typer.Option(help="Begin no variant after these; default: all.")
    ] = None,
) -> None:
    """Measure, print a line per variant, and write JSON."""
    begin = time.perf_counter()
    evict = chosen_evictions(evictions, prefill)
    lm = jaxkv.load(dtype=dtype)
    report = provenance() | {
        "benchmark": "speculation on needle",
        "seed": "development" if dev else "report",
        "length": length,
        "dtype": lm.dtype.name,
    }
    if table:
        settings = {name: described(policies) for name, policies in evict.items()}
        report |= {"budget": budget, "evictions": settings}
    names: Sequence[str] = TABLE_TASKS if table else TASKS
    names = tasks.split(",") if tasks else names
    rows, left_out = [], []

    def late():
        return seconds is not None and time.perf_counter() - begin > seconds

    # By batch before by task: what a cut-off run has, is whole for small batches.
    for size in [int(b) for b in (batch or ("1,4,16,64" if table else "1")).split(",")]:
        # A step's price grows with rows x nodes, so larger batches get less.
        fitting = max(4, nodes // size)
        chosen = variants(nodes, dev=dev)
        if table:
            tree = jaxkv.Tree(
                num_draft_tokens=fitting - 1,
                depth=min(10, fitting - 1),
                include_output=include_output,
            )
            chosen = table_variants(tree, budget, evict)
        for task in names:
            whole = -(-samples // size) * size  # no smaller last batch
            seed = DEVELOPMENT_SEED if dev else REPORT_SEED
            drawn = draw(lm, task, length, whole, seed)
            for row in measured(lm, task, drawn, size, chosen, late):
                if "accuracy" in row:
                    rows.append(row)
                    print(line(row), flush=True)
                else:
                    left_out.append(row)
                # Each time, so that a crash loses one row.
                write_json(out, report | {"rows": rows, "left_out": left_out})
    for row in left_out:
        print("left out after --seconds:", *row.values())
    print(json.dumps({"written": str(out), "rows": len(rows)}))


if __name__ == "__main__":
    typer.run(main)
