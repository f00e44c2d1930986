"""Speculation end to end, on needle's own tasks: speed, acceptance and score.

    python benchmarks/speculation_needle.py --out speculation_needle.json
    python benchmarks/speculation_needle.py --dev --out speculation_needle_dev.json
    python benchmarks/speculation_needle.py --table --out speculation_table.json

The first compares ways of drafting and of accepting on the report seed, on the quoting
tasks (quote, go on, edit). With `--dev` it looks at the development seed and at all
forms of conditional verification instead: what is chosen, is chosen there. With
`--table` it crosses batch sizes with eviction and speculation.

Every variant gets the same prompts in the same order, and its first batch twice, since
the first call compiles. Speed is that of decoding alone; prefill is given beside it.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import jaxkv
from jaxkv import evaluation
from jaxkv.evaluation import DEVELOPMENT_SEED, QUOTING, REPORT_SEED, Cell
from jaxkv.provenance import provenance, write_json

FORMS = ("F1", "F2", "F3", "F4")


def variants(nodes: int, *, dev: bool) -> dict[str, dict[str, Any]]:
    """Return the arguments of `jaxkv.generate` by the name of the variant."""
    drafts = nodes - 1
    aligned = jaxkv.Aligned(num_draft_tokens=drafts)
    shown = {
        "plain": {},
        "prompt lookup": {"speculate": jaxkv.PromptLookup()},
        "tree": {"speculate": jaxkv.Tree(num_draft_tokens=drafts)},
        "aligned": {"speculate": aligned},
    }
    if not dev:
        return shown | {
            "aligned, conditional": {
                "speculate": aligned,
                "accept": jaxkv.Conditional(),
            }
        }
    rules = {f"conditional {form}": jaxkv.Conditional(form=form) for form in FORMS}
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


def table_variants(nodes: int, budget: int) -> dict[str, dict[str, Any]]:
    """Return plain decoding, eviction, speculation, and both."""
    evict = {
        "budget": budget,
        "prefill": jaxkv.StreamingLLM(),
        "decode": jaxkv.StreamingLLM(),
    }
    depth = min(10, nodes - 1)
    draft = {"speculate": jaxkv.Tree(num_draft_tokens=nodes - 1, depth=depth)}
    return {
        "plain": {},
        "eviction": evict,
        "speculation": draft,
        "both": evict | draft,
    }


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
    tokens, right, scores, stats, wall = [], [], [], [], 0.0
    for number, group in enumerate(groups):
        prompts = [sample.prompt for sample in group]
        if number == 0:
            jaxkv.generate(lm, prompts, max_new_tokens=new, **arguments)
        begin = time.perf_counter()
        out = jaxkv.generate(lm, prompts, max_new_tokens=new, **arguments)
        wall += time.perf_counter() - begin - out.stats.compile_seconds
        stats.append(out.stats)
        tokens += out.tokens
        for sample, text in zip(group, out.text, strict=True):
            whole, part = evaluation.judge(sample, text)
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
    }
    if stats[0].drafts:
        result |= drafts_of([s.drafts for s in stats], decoded)
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
    """Return samples of one cell of the evaluation."""

    def count_tokens(text):
        return len(lm.tokenizer(text, add_special_tokens=False)["input_ids"])

    cell = Cell(task=task, length=length)
    return [
        evaluation.draw(cell, count_tokens, seed=seed, index=i) for i in range(samples)
    ]


def main(
    out: Annotated[Path, typer.Option(help="File for the result.")],
    length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 2048,
    samples: Annotated[int, typer.Option(help="Per task.")] = 32,
    batch: Annotated[str, typer.Option(help="Rows; several with --table.")] = "",
    nodes: Annotated[int, typer.Option(help="Of the trees at batch 1.")] = 64,
    budget: Annotated[int, typer.Option(help="Of the evicting variants.")] = 512,
    tasks: Annotated[str, typer.Option(help="With commas.")] = ",".join(QUOTING),
    dtype: Annotated[str | None, typer.Option(help="Default: the device's.")] = None,
    dev: Annotated[bool, typer.Option("--dev", help="Development seed.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Batch sizes.")] = False,
) -> None:
    """Measure, print a line per variant, and write JSON."""
    lm = jaxkv.load(dtype=dtype)
    seed = DEVELOPMENT_SEED if dev else REPORT_SEED
    batches = [int(b) for b in (batch or ("1,4,16,64" if table else "1")).split(",")]
    report = provenance() | {
        "benchmark": "speculation on needle",
        "seed": "development" if dev else "report",
        "length": length,
        "dtype": lm.dtype.name,
    }
    rows = []
    for task in tasks.split(","):
        for size in batches:
            drawn = draw(lm, task, length, max(samples, size), seed)
            # A step's price grows with rows x nodes, so larger batches get less.
            fitting = max(4, nodes // size)
            chosen = (
                table_variants(fitting, budget) if table else variants(nodes, dev=dev)
            )
            plain, plain_row = None, None
            for name, arguments in chosen.items():
                row, tokens = measure(lm, drawn, batch=size, plain=plain, **arguments)
                if plain is None:
                    plain, plain_row = tokens, row
                speed = row["tokens_per_second"] / plain_row["tokens_per_second"]
                wall = plain_row["wall_seconds"] / row["wall_seconds"]
                used = fitting if table else nodes
                row = {
                    "task": task,
                    "batch": size,
                    "nodes": used if "speculate" in arguments else None,
                    "variant": name,
                    "speedup_of_decoding": speed,
                    "speedup_with_prefill": wall,
                } | row
                rows.append(row)
                write_json(out, report | {"rows": rows})  # a crash loses one row
                print(
                    f"{task:9} batch {size:2} {name:30} {speed:5.2f} x, "
                    f"{row['tokens_per_second']:8.1f} tokens/s, "
                    f"MAL {row.get('mal_with_bonus', 1):.2f} with bonus, "
                    f"accuracy {row['accuracy']:.2f}",
                    flush=True,
                )
    print(json.dumps({"written": str(out), "rows": len(rows)}))


if __name__ == "__main__":
    typer.run(main)
