"""Long answers of a chat model in a small cache: what decode eviction does to them.

    python benchmarks/long_answers.py question.jsonl --out long_answers.json

The prompts are Spec-Bench's (`question.jsonl` of github.com/hemingkx/Spec-Bench), the
first turn of each, in the model's chat template; decoding is greedy. Prompts are
shorter than the smallest budget, which holds prompt and answer, so that eviction begins
in the answer. Of each method and budget:

* `agree`: the share of answers whose first n tokens are those of the full cache, of
  the answers that are as long with it, by n;
* `repeated`: the share of an answer's runs of four tokens that were in it before;
* `length` and `truncated`, the share of answers that reach the longest length;
* `rouge_l` against the full cache's answer (the F-measure of the longest common
  subsequence of token ids) and `log_likelihood` of the answer under the full cache.

Questions alternate between a development half, to choose options on, and the half that
is reported. A row is on the disk as soon as it is measured.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from speculation_prompts import log_likelihood, rouge_l

import jaxkv
from jaxkv import registry
from jaxkv.evaluation.statistics import half_width
from jaxkv.provenance import provenance, write_json
from jaxkv.runtime.compilation_cache import enable_compilation_cache
from jaxkv.text.chat import encode_chat

KINDS = "writing,roleplay,reasoning,math,coding,extraction,stem,humanities,qa"
METHODS = "longflow;longflow:recommended;h2o;tova;streaming-llm;vatp;r-kv"
AGREE = (16, 32, 64, 128, 256)


def repeated(answer: tuple[int, ...], n: int = 4) -> float:
    """Return the share of runs of `n` tokens that occurred before."""
    runs = [answer[i : i + n] for i in range(len(answer) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def agreement(
    full: list[tuple[int, ...]], answers: list[tuple[int, ...]]
) -> dict[str, float]:
    """Return the share of answers that begin as the full cache's do, by length."""
    found = {}
    for n in AGREE:
        long = [(a, b) for a, b in zip(full, answers, strict=True) if len(a) >= n]
        if long:
            found[str(n)] = float(np.mean([a[:n] == b[:n] for a, b in long]))
    return found


def described(
    lm: jaxkv.LanguageModel,
    prompts: list[list[int]],
    full: list[tuple[int, ...]],
    answers: list[tuple[int, ...]],
    new: int,
) -> dict[str, Any]:
    """Return what became of the answers, with half intervals."""
    mean, half = log_likelihood(lm, prompts, answers)
    values = {
        "length": [len(a) for a in answers],
        "truncated": [len(a) >= new for a in answers],
        "repeated": list(map(repeated, answers)),
        "rouge_l": [rouge_l(a, b) for a, b in zip(full, answers, strict=True)],
    }
    row: dict[str, Any] = {"answers": len(answers), "agree": agreement(full, answers)}
    for name, found in values.items():
        numbers = np.array(found, float)
        row |= {name: float(numbers.mean()), f"{name}_half": half_width(numbers)}
    return row | {"log_likelihood": mean, "log_likelihood_half": half}


def main(
    file: Annotated[Path, typer.Argument(help="Spec-Bench's question.jsonl.")],
    out: Annotated[Path, typer.Option(help="File for the result.")],
    model: Annotated[str, typer.Option(help="With a chat template.")] = "smollm2",
    kinds: Annotated[str, typer.Option(help="Categories, with commas.")] = KINDS,
    methods: Annotated[str, typer.Option(help="With semicolons.")] = METHODS,
    budgets: Annotated[str, typer.Option(help="Tokens, with commas.")] = "144,288,576",
    new: Annotated[int, typer.Option(help="Longest answer.")] = 1024,
    longest: Annotated[int, typer.Option(help="Of the prompts.")] = 128,
    dtype: Annotated[str | None, typer.Option(help="Default: the device's.")] = None,
) -> None:
    """Measure, print a line per method and budget, and write JSON."""
    enable_compilation_cache()
    lm = jaxkv.load(model, dtype=dtype)
    questions = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    prompts = [
        encode_chat(lm, [{"role": "user", "content": row["turns"][0]}])
        for row in questions
        if row["category"] in kinds.split(",")
    ]
    prompts = [row for row in prompts if len(row) <= longest]
    report = provenance() | {
        "benchmark": "long answers",
        "model": lm.name,
        "dtype": lm.dtype.name,
        "new": new,
    }
    rows: list[dict[str, Any]] = []

    def add(name: str, budget: int | None, answers: list[tuple[int, ...]]) -> None:
        for half, first in {"development": 0, "report": 1}.items():
            of = slice(first, None, 2)
            told = described(lm, prompts[of], full[of], answers[of], new)
            rows.append({"method": name, "budget": budget, "half": half} | told)
        shown = (
            f"rouge-l {rows[-1]['rouge_l']:.3f}, repeated {rows[-1]['repeated']:.3f}"
        )
        print(f"{name} {budget}: {shown}", flush=True)
        write_json(out, report | {"rows": rows})

    full = list(jaxkv.generate(lm, prompts, max_new_tokens=new).tokens)
    add("full", None, full)
    for name in methods.split(";"):
        policy = registry.parse(name, registry.DECODE, flag="--methods")
        for budget in map(int, budgets.split(",")):
            answers = jaxkv.generate(
                lm, prompts, max_new_tokens=new, budget=budget, decode=policy
            )
            add(name, budget, list(answers.tokens))


if __name__ == "__main__":
    typer.run(main)
