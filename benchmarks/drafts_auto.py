"""Drafts that pay, or none: what measured prices come to, against fixed settings.

    python benchmarks/drafts_auto.py --out drafts.json
    python benchmarks/drafts_auto.py --file question.jsonl --kinds qa --out drafts.json

The prompts are windows of Python's own documentation with the wish for a summary or, of
a `question.jsonl` of Spec-Bench, the first turns of `--kinds`, in the model's chat
template. Each output has `--new` tokens, stop ids or not. Variants of a batch:

* `plain`: no drafts;
* `auto`: `Tree()`, prices measured;
* `always 4`, `always 16`: the same program, told that trees of so many nodes cost what
  a plain step does, and others too much;
* `never`: told that all do, so that drafts are watched and never fed;
* `failing`: `auto` with drafts of which each token is changed to another one.

A first round compiles, another measures prices, and both are left out. Then the
variants take turns, and each is compared with `plain` of its own round, since a machine
has other work at times. With `--lock` several processes compile side by side on one
GPU, and measure one after the other.
Where it has much, the processor's time says more than the clock: of all threads of the
process, prefill included (`work_against_plain`). On a GPU it means nothing.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from real_prompts import drawn_prompts
from speculation_prompts import chosen_prompts
from turns import Lock, alone, forget_prices

import jaxkv
from jaxkv.options import described
from jaxkv.provenance import provenance, write_json
from jaxkv.speculation.matching import Context
from jaxkv.text import pricing
from jaxkv.trees import DraftTree

EVICTION: dict[str, dict[str, Any]] = {
    "none": {},
    "longflow": {"prefill": jaxkv.DapQ(), "decode": jaxkv.LongFlow()},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failing(jaxkv.Tree):
    """Drafts as likely as `Tree`'s by their looks, and wrong.

    Attributes:
      words: of the vocabulary.
    """

    words: int = 49_152

    def draft(self, context: Context) -> DraftTree:
        """Return trees in which each token is another one, but for the root."""
        tree = super().draft(context)
        changed = tree.tokens.at[:, 1:].add(1)
        return tree._replace(tokens=changed % self.words)


Told = tuple[float, ...] | None
Round = dict[str, tuple[jaxkv.Completion, float]]  # and the processor's seconds
VARIANTS: dict[str, tuple[jaxkv.Drafter | None, Told]] = {
    "plain": (None, None),
    "auto": (jaxkv.Tree(), None),
    "always 4": (jaxkv.Tree(), (1.0, math.inf)),
    "always 16": (jaxkv.Tree(), (math.inf, 1.0)),
    "never": (jaxkv.Tree(), (math.inf, math.inf)),
    "failing": (Failing(), None),
}


@contextmanager
def told(found: pricing.Prices, prices: Told) -> Iterator[None]:
    """Give a program other prices for a while, or leave it those it has."""
    measured = found.timed
    if prices is not None:
        found.timed = [1.0, *prices] * 3
    try:
        yield
    finally:
        found.timed = measured


def rounds(
    lm: jaxkv.LanguageModel,
    prompts: list[list[int]],
    names: list[str],
    *,
    repeats: int,
    warm: int,
    lock: Path | None,
    **arguments: Any,
) -> tuple[list[Round], dict[jaxkv.Drafter, pricing.Prices]]:
    """Return what each variant gives in each round, and the prices of each drafter."""
    found: dict[jaxkv.Drafter, pricing.Prices] = {}

    def call(name: str) -> tuple[jaxkv.Completion, float]:
        drafter, prices = VARIANTS[name]
        begin = time.process_time()
        known = found.get(drafter, pricing.Prices(0)) if drafter else pricing.Prices(0)
        with told(known, prices):
            out = jaxkv.generate(
                lm, prompts, stop_ids=[], speculate=drafter, **arguments
            )
        return out, time.process_time() - begin

    for name in names:
        drafter, prices = VARIANTS[name]
        if prices is None:
            call(name)
            if drafter:
                found[drafter] = pricing.LEDGER.known()[-1]
    with alone(lock):
        forget_prices()
        for name in names:
            for _ in range(warm if VARIANTS[name][1] is None else 0):
                call(name)
        return [{name: call(name) for name in names} for _ in range(repeats)], found


def summary(
    name: str, outs: list[Round], prices: pricing.Prices | None
) -> dict[str, Any]:
    """Return a variant's row."""
    pairs = [(out[name], out["plain"]) for out in outs]
    stats = [out.stats for (out, _), _ in pairs]
    against = [
        out.stats.tokens_per_second / plain.stats.tokens_per_second
        for (out, _), (plain, _) in pairs
    ]
    work = [plain / ours for (_, ours), (_, plain) in pairs]
    same = [
        a == b
        for (out, _), (plain, _) in pairs
        for a, b in zip(out.tokens, plain.tokens, strict=True)
    ]
    drafts = stats[0].drafts
    return {
        "variant": name,
        "tokens_per_second": float(np.median([s.tokens_per_second for s in stats])),
        "against_plain": float(np.median(against)),
        "against_plain_each": against,
        "work_against_plain": float(np.median(work)),
        "work_against_plain_each": work,
        "prices": prices and prices.array().tolist(),
        "mal": drafts and drafts.mal_with_bonus,
        "steps": drafts and drafts.steps,
        "steps_with_draft": drafts and drafts.steps_with_draft,
        "same_outputs": float(np.mean(same)),
    }


def main(
    out: Annotated[Path, typer.Option(help="File for the result.")],
    model: Annotated[str, typer.Option(help="With a chat template.")] = "smollm2",
    file: Annotated[Path | None, typer.Option(help="Spec-Bench's.")] = None,
    kinds: Annotated[str, typer.Option(help="Of it, with commas.")] = "qa",
    evict: Annotated[str, typer.Option(help="none, longflow.")] = "none",
    batch: Annotated[str, typer.Option(help="Rows, with commas.")] = "1,4,16,64",
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = 4096,
    budget: Annotated[int, typer.Option(help="With longflow.")] = 1024,
    new: Annotated[int, typer.Option(help="Tokens of each output.")] = 256,
    variants: Annotated[str, typer.Option(help="With commas.")] = ",".join(VARIANTS),
    repeats: Annotated[int, typer.Option(help="Rounds that count.")] = 3,
    warm: Annotated[int, typer.Option(help="Calls that measure, before.")] = 1,
    lock: Lock = None,
    dtype: Annotated[str | None, typer.Option(help="Default: the device's.")] = None,
) -> None:
    """Measure, print a line for each variant, and write JSON."""
    lm = jaxkv.load(model, dtype=dtype)
    names = variants.split(",")
    report = provenance() | {
        "benchmark": "drafts, prices measured",
        "model": lm.name,
        "dtype": lm.dtype.name,
        "new": new,
        "variants": {n: described({"speculate": VARIANTS[n][0]}) for n in names},
    }
    counts: dict[str, Any] = dict(max_new_tokens=new, repeats=repeats, warm=warm)
    counts |= dict(lock=lock)
    rows: list[dict[str, Any]] = []
    for size in map(int, batch.split(",")):
        for kind in kinds.split(",") if file else ["documentation"]:
            if file:
                prompts, _ = chosen_prompts(lm, file, kind, size, new)
            else:
                prompts = drawn_prompts(lm, size, length)
            cell = {"kind": kind, "batch": size, "tokens": max(map(len, prompts))}
            for name in evict.split(","):
                options = EVICTION[name]
                if options:
                    options = options | {"budget": budget}
                outs, found = rounds(lm, prompts, names, **counts, **options)
                for variant in names:
                    drafter, _ = VARIANTS[variant]
                    row = summary(variant, outs, found[drafter] if drafter else None)
                    rows.append(cell | {"eviction": name} | row)
                    print(rows[-1], flush=True)
                write_json(out, report | {"rows": rows})


if __name__ == "__main__":
    typer.run(main)
