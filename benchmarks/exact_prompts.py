"""Exact is exact: outputs with drafts against plain decoding's, of all of Spec-Bench.

    python benchmarks/exact_prompts.py question.jsonl --out exact.json
    python benchmarks/exact_prompts.py question.jsonl --batch 1 --most 96 --out one.json

The first turns of all questions (`question.jsonl` of github.com/hemingkx/Spec-Bench) in
the model's chat template, the full cache, `Exact`. Outputs are compared token by token
with those of plain decoding of the same batch. Variants:

* `again`: plain decoding, a second time;
* `lookup`, `tree`, `aligned`: the drafters with as many drafts, their defaults at most,
  as give a batch 64 nodes, for which bits are promised (`DraftStats.guarantee`);
* `default tree`: `Tree()`, which in larger batches is promised none.

So that few programs compile, there are two lengths: the first row of each batch is the
longest prompt of its length, and does not count. Without such a row, at batch 1,
questions are of the two commonest lengths alone. All of a variant's outputs are made
before it is on the disk.
"""

import collections
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from speculation_needle import drafts_of

import jaxkv
from jaxkv.evaluation.statistics import mean_interval
from jaxkv.options import described
from jaxkv.provenance import provenance, write_json
from jaxkv.text.chat import encode_chat
from jaxkv.text.planning import bucket

NODES = 64  # of all rows, up to which bits are promised
SHORT = 1024  # tokens; the longer of two lengths is what the longest prompt needs

Prompts = dict[int, list[int]]  # by the number of the question


def variants(batch: int) -> dict[str, Any]:
    """Return the drafters by name."""
    most = NODES // batch - 1
    drafts = min(15, most)
    trees: dict[str, Any] = dict(num_draft_tokens=drafts, depth=min(10, drafts))
    return {
        "again": None,
        "lookup": jaxkv.PromptLookup(num_draft_tokens=min(10, most)),
        "tree": jaxkv.Tree(**trees),
        "aligned": jaxkv.Aligned(**trees),
        "default tree": jaxkv.Tree(),
    }


def batches(prompts: Prompts, size: int) -> list[tuple[list[int], Prompts]]:
    """Return the questions of each batch, behind a first row that fixes its length."""
    found = []
    for longest in (True, False):
        some = {n: p for n, p in prompts.items() if (bucket(len(p)) > SHORT) == longest}
        if not some:
            continue
        first = max(some.values(), key=len)
        numbers = list(some)
        for start in range(0, len(numbers), size - 1):
            rows = {n: some[n] for n in numbers[start : start + size - 1]}
            found.append((first, rows))
    return found


def commonest(prompts: Prompts, most: int) -> list[tuple[list[int], Prompts]]:
    """Return questions of the two commonest lengths, each alone."""
    sizes = collections.Counter(bucket(len(p)) for p in prompts.values())
    found = []
    for size, _ in sizes.most_common(2):
        some = [(n, p) for n, p in prompts.items() if bucket(len(p)) == size]
        found += [(p, {n: p}) for n, p in some[: most // 2]]
    return found


def decode(
    lm: jaxkv.LanguageModel,
    groups: list[tuple[list[int], Prompts]],
    batch: int,
    **arguments: Any,
) -> tuple[dict[int, tuple[int, ...]], list[Any], int]:
    """Return each question's output, each batch's drafts, and how many were decoded."""
    tokens: dict[int, tuple[int, ...]] = {}
    drafts, decoded = [], 0
    for first, some in groups:
        rows = [first, *some.values()] if batch > 1 else [first]
        rows += [first] * (batch - len(rows))
        out = jaxkv.generate(lm, rows, **arguments)
        skip = 1 if batch > 1 else 0
        tokens |= dict(zip(some, out.tokens[skip:], strict=False))
        drafts.append(out.stats.drafts)
        decoded += sum(map(len, out.tokens)) - batch
    return tokens, drafts, decoded


def compared(
    plain: dict[int, tuple[int, ...]],
    tokens: dict[int, tuple[int, ...]],
    kinds: dict[int, str],
) -> dict[str, Any]:
    """Return the shares of equal outputs, and where the others first differ."""
    differ = {}
    for number, want in plain.items():
        got = tokens[number]
        if got != want:
            pairs = enumerate(zip(want, got, strict=False))
            ends = min(len(want), len(got))
            differ[number] = next((i for i, (a, b) in pairs if a != b), ends)
    by_kind = collections.defaultdict(list)
    for number in plain:
        by_kind[kinds[number]].append(number not in differ)
    share, low, high = mean_interval(n not in differ for n in plain)
    return {
        "outputs": len(plain),
        "output_tokens": sum(map(len, plain.values())),
        "equal": share,
        "equal_from": low,
        "equal_to": high,
        "equal_by_kind": {k: float(np.mean(v)) for k, v in by_kind.items()},
        "first_difference_of": differ,
    }


def main(
    file: Annotated[Path, typer.Argument(help="Spec-Bench's question.jsonl.")],
    out: Annotated[Path, typer.Option(help="File for the result.")],
    model: Annotated[str, typer.Option(help="With a chat template.")] = "smollm2",
    batch: Annotated[int, typer.Option(min=1, max=32, help="Rows.")] = 8,
    most: Annotated[int | None, typer.Option(help="Questions; default: all.")] = None,
    new: Annotated[int, typer.Option(help="Longest output.")] = 128,
    only: Annotated[str, typer.Option(help="Variants, with commas.")] = "",
    break_even: Annotated[float, typer.Option(help="0: every draft is fed.")] = 0.0,
    dtype: Annotated[str | None, typer.Option(help="Default: the device's.")] = None,
) -> None:
    """Decode with and without drafts, compare, print a line per variant, write JSON."""
    lm = jaxkv.load(model, dtype=dtype)
    questions = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    kinds = {q["question_id"]: q["category"] for q in questions}
    prompts = {
        q["question_id"]: encode_chat(lm, [{"role": "user", "content": q["turns"][0]}])
        for q in questions
    }
    if batch == 1:
        groups = commonest(prompts, most or len(prompts))
    else:
        step = max(1, len(prompts) // (most or len(prompts)))
        groups = batches(dict(list(prompts.items())[::step]), batch)
    chosen = variants(batch)
    if only:
        chosen = {name: chosen[name] for name in only.split(",")}
    report = provenance() | {
        "benchmark": "exact speculation on prompts",
        "model": lm.name,
        "dtype": lm.dtype.name,
        "batch": batch,
        "new": new,
        "break_even": break_even,
        "variants": {n: described({"speculate": d}) for n, d in chosen.items()},
    }
    plain, *_ = decode(lm, groups, batch, max_new_tokens=new)
    rows: list[dict[str, Any]] = []
    for name, drafter in chosen.items():
        begin = time.perf_counter()
        arguments = {}
        if drafter is not None:
            arguments = {"speculate": replace(drafter, break_even=break_even)}
        tokens, drafts, decoded = decode(
            lm, groups, batch, max_new_tokens=new, **arguments
        )
        row = {"variant": name} | compared(plain, tokens, kinds)
        row["seconds"] = time.perf_counter() - begin
        if drafter is not None:
            row["guarantee"] = drafts[0].guarantee
            row |= drafts_of(drafts, decoded)
        rows.append(row)
        write_json(out, report | {"rows": rows})
        print(
            f"batch {batch}, {name}: {row['equal']:.2%} of {row['outputs']} equal "
            f"({row['equal_from']:.2%} to {row['equal_to']:.2%}), MAL "
            f"{row.get('mal_with_bonus', 1.0):.2f}, {row.get('guarantee', 'plain')}, "
            f"{row['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    typer.run(main)
