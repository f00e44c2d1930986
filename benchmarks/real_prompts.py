"""Eviction and drafts on long real prompts: speed by batch.

    python benchmarks/real_prompts.py table --out table.json

The prompts are windows of Python's own documentation with the wish for a summary, in
the model's chat template. `table` crosses batch sizes with {plain, eviction,
speculation, both}: eviction is DapQ on the prompt and LongFlow on the output, drafts
are a tree that shrinks with the batch. All programs compile before any is timed; with
`--lock` several processes compile side by side, and are timed one after the other.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from turns import Lock, alone, forget_prices

import jaxkv
from jaxkv.evaluation.perplexity import PYDOC, read_texts
from jaxkv.options import described
from jaxkv.provenance import provenance, write_json
from jaxkv.text.chat import encode_chat

WISH = "Summarize this documentation in a few paragraphs:\n\n"

app = typer.Typer()

Model = Annotated[str, typer.Option(help="With a chat template.")]
Out = Annotated[Path, typer.Option(help="File for the result.")]
Batch = Annotated[str, typer.Option(help="Rows, with commas.")]
Length = Annotated[int, typer.Option(help="Tokens of a prompt.")]
Repeats = Annotated[int, typer.Option(help="Timed calls of each variant.")]


def drawn_prompts(lm: jaxkv.LanguageModel, rows: int, length: int) -> list[list[int]]:
    """Return prompts of at most `length` tokens, each of another part of the text."""
    (text,) = read_texts([PYDOC])
    ids = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    room = length - len(encode_chat(lm, [{"role": "user", "content": WISH}])) - 8
    found = []
    for first in np.linspace(0, len(ids) - room, rows).astype(int):
        part = lm.tokenizer.decode(ids[first : first + room])
        row = encode_chat(lm, [{"role": "user", "content": WISH + part}])
        found.append(row[:length])
    return found


def timed(
    lm: jaxkv.LanguageModel,
    prompts: list[list[int]],
    variants: dict[str, dict[str, Any]],
    *,
    new: int,
    repeats: int,
    lock: Path | None,
) -> list[dict[str, Any]]:
    """Return a row per variant: medians over the timed calls."""

    def call(arguments: dict[str, Any]) -> jaxkv.Completion:
        return jaxkv.generate(lm, prompts, max_new_tokens=new, stop_ids=[], **arguments)

    for arguments in variants.values():
        call(arguments)
    rows = []
    with alone(lock):
        forget_prices()
        for name, arguments in variants.items():
            if "speculate" in arguments:
                call(arguments)
            outs = [call(arguments) for _ in range(repeats)]
            stats = [out.stats for out in outs]
            drafts = stats[0].drafts
            rows.append(
                {
                    "batch": len(prompts),
                    "prompt_tokens": max(stats[0].prompt_tokens),
                    "new": new,
                    "variant": name,
                    "prefill_seconds": float(
                        np.median([s.prefill_seconds for s in stats])
                    ),
                    "tokens_per_second": float(
                        np.median([s.tokens_per_second for s in stats])
                    ),
                    "cache_bytes": stats[0].cache_bytes,
                    "mal": drafts and drafts.mal_with_bonus,
                    "steps": drafts and drafts.steps,
                    "steps_with_draft": drafts and drafts.steps_with_draft,
                    "compile_seconds": sum(s.compile_seconds for s in stats),
                }
            )
            print(rows[-1], flush=True)
    return rows


def drafter_of(name: str) -> jaxkv.Drafter:
    """Return a drafter by its kind and how many tokens it drafts."""
    kind, _, count = name.partition(":")
    if kind == "lookup":
        return jaxkv.PromptLookup(num_draft_tokens=int(count))
    if kind == "tree":
        return jaxkv.Tree(num_draft_tokens=int(count), depth=min(10, int(count)))
    raise SystemExit(f"real_prompts: --drafts takes tree:N and lookup:N, got {name}.")


@app.callback()  # or an app of one command takes no name
def named() -> None:
    """Measure eviction and drafts on long real prompts."""


@app.command()
def table(
    out: Out,
    model: Model = "smollm2",
    batch: Batch = "1,4,16,64",
    length: Length = 4096,
    new: Annotated[int, typer.Option(help="Tokens of each output.")] = 256,
    budget: Annotated[int, typer.Option(help="Of prompt and output.")] = 1024,
    drafts: Annotated[
        str, typer.Option(help="As tree:15,lookup:10: how many tokens; or by batch.")
    ] = "",
    repeats: Repeats = 3,
    lock: Lock = None,
) -> None:
    """Cross batch sizes with eviction and speculation."""
    lm = jaxkv.load(model)
    rows, used = [], {}
    for size in map(int, batch.split(",")):
        nodes = max(4, 16 // max(1, size // 4))
        evict: dict[str, Any] = {
            "budget": budget,
            "prefill": jaxkv.DapQ(),
            "decode": jaxkv.LongFlow(),
        }
        variants: dict[str, dict[str, Any]] = {"plain": {}, "eviction": evict}
        for name in (drafts or f"tree:{nodes - 1}").split(","):
            draft = {"speculate": drafter_of(name)}
            variants |= {f"speculation, {name}": draft, f"both, {name}": evict | draft}
        used[size] = {name: described(v) for name, v in variants.items()}
        prompts = drawn_prompts(lm, size, length)
        rows += timed(lm, prompts, variants, new=new, repeats=repeats, lock=lock)
        write_json(out, provenance() | {"variants": used, "rows": rows})


if __name__ == "__main__":
    app()
