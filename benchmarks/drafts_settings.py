"""Choose the options of drafts on development answers: tokens a step, by option.

    python benchmarks/drafts_settings.py question.jsonl --out settings.json

The answers are the model's own, without drafts, to prompts of Spec-Bench that no table
reports (`speculation_prompts.py --help`); `--outputs` keeps them. `drafts_replay.py`
says how an answer is decoded again without its network. Here a tree is fed wherever
there is one, so that `tokens_a_step` is the mean acceptance length with the bonus
token. Its interval is a bootstrap's over answers. What a step with a tree costs is not
counted; it grows with `num_draft_tokens` alone.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from drafts_replay import answers, renumbered, steps

import jaxkv
from jaxkv import registry
from jaxkv.options import described
from jaxkv.provenance import provenance, write_json
from jaxkv.speculation import pace
from jaxkv.speculation.rules import Exact

SETTINGS = ";".join(
    [
        *(f"tree:num_draft_tokens={n}" for n in (3, 7, 15, 31, 63)),
        *(f"tree:ngram_min={n}" for n in (2, 3)),
        *(f"tree:ngram_max={n}" for n in (2, 5)),
        *(f"tree:max_matches={n}" for n in (4, 16)),
        *(f"tree:depth={n}" for n in (5, 15)),
        "tree:include_output=false",
        "prompt-lookup",
        "prompt-lookup:num_draft_tokens=15",
        "prompt-lookup:match=latest",
        "prompt-lookup:ngram_min=2",
    ]
)


def speed(counts: np.ndarray) -> float:
    """Return tokens a step of answers, `[answers, (tokens, steps)]`."""
    tokens, taken = counts.sum(0)
    return float(tokens / taken)


def interval(counts: np.ndarray) -> list[float]:
    """Return the 95 % interval of `speed`, over draws of as many answers."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(counts), size=(1000, len(counts)))
    found = [speed(counts[some]) for some in drawn]
    return [float(x) for x in np.quantile(found, [0.025, 0.975])]


def main(
    file: Annotated[Path, typer.Argument(help="Spec-Bench's question.jsonl.")],
    out: Annotated[Path, typer.Option(help="File for the result.")],
    model: Annotated[str, typer.Option(help="With a chat template.")] = "smollm2",
    outputs: Annotated[Path | None, typer.Option(help="File that keeps them.")] = None,
    settings: Annotated[str, typer.Option(help="With semicolons.")] = SETTINGS,
    prompts: Annotated[int, typer.Option(help="Of each kind.")] = 8,
    new: Annotated[int, typer.Option(help="Longest output.")] = 192,
) -> None:
    """Measure, print a line for each setting, and write JSON."""
    if outputs and outputs.exists():
        kept = json.loads(outputs.read_text("utf-8"))
    else:
        kept = answers(jaxkv.load(model), file, prompts, new, development=True)
        if outputs:
            write_json(outputs, kept)
    texts = {kind: renumbered(rows)[0] for kind, rows in kept.items()}
    report = provenance() | {"benchmark": "drafts, settings", "model": model}
    report |= {"new": new, "answers": {k: len(found) for k, found in texts.items()}}
    rows: list[dict[str, Any]] = []
    for setting in settings.split(";"):
        drafter = registry.parse(setting, registry.SPECULATE, flag="--settings")
        narrower = len(pace.widths(drafter, Exact())) - 1
        told = [math.inf] * narrower + [
            1.0
        ]  # the whole tree, and as if it cost nothing
        kinds = {
            kind: np.array(
                [[len(o) - 1, steps(p, o, drafter, told)[0]] for p, o in found]
            )
            for kind, found in texts.items()
        }
        every = np.concatenate(list(kinds.values()))
        row: dict[str, Any] = {"setting": setting}
        row |= {"options": described({"speculate": drafter})}
        row |= {"tokens_a_step": speed(every), "interval": interval(every)}
        rows.append(row | {"by_kind": {k: speed(x) for k, x in kinds.items()}})
        print(f"{setting}: {row['tokens_a_step']:.3f}", row["interval"], flush=True)
        write_json(out, report | {"rows": rows})
        jax.clear_caches()  # a program for each length, which all map memory


if __name__ == "__main__":
    typer.run(main)
