"""Speculation on prompts of users: speed, acceptance, and what lossy rules cost.

    python benchmarks/speculation_prompts.py question.jsonl --out speculation.json

The prompts are Spec-Bench's (`question.jsonl` of github.com/hemingkx/Spec-Bench), the
first turn of each, in the model's chat template; `multi_turn` is the second turn of its
conversations, behind the model's own plain answer to the first. Of each kind those are
taken whose length falls into the bucket that most of them share, so that few programs
compile.
Every variant gets the same prompts in the same order; its first batch runs twice, since
the first call compiles. What a step with drafts costs is a constant here, so that
acceptance does not depend on the machine; `drafts_auto.py` has what is measured. A
variant is on the disk as soon as it is measured. With `--lock` processes compile side
by side on one GPU and are timed in turns.

Quality is what the network itself says of an output (`log_likelihood`, nats a token,
mean over tokens, all in one pass over prompt and output), and how much of plain
decoding's output it shares (`rouge_l`, the F-measure of the longest common subsequence
of token ids).
"""

import collections
import json
import re
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from speculation_needle import differences, drafts_of
from turns import Lock, alone

import jaxkv
from jaxkv.evaluation.likelihood import losses
from jaxkv.evaluation.methods import Method
from jaxkv.evaluation.statistics import half_width
from jaxkv.options import described
from jaxkv.provenance import provenance, write_json
from jaxkv.runtime.compilation_cache import enable_compilation_cache
from jaxkv.text.chat import encode_chat
from jaxkv.text.planning import bucket

REPORTED = 24  # prompts of a kind
KINDS = "summarization,rag,translation,math_reasoning,qa,multi_turn"
RULES = {
    "F1": jaxkv.Conditional(form="F1"),
    "F2": jaxkv.Conditional(form="F2"),
    "F3": jaxkv.Conditional(form="F3"),
    "F4": jaxkv.Conditional(form="F4"),
    "fixed": jaxkv.FixedThreshold(),
    "typical": jaxkv.Typical(),
    "top-k": jaxkv.TopK(),
}


def variants(nodes: int) -> dict[str, dict[str, Any]]:
    """Return the arguments of `jaxkv.generate` by the name of the variant."""
    drafts = nodes - 1
    found: dict[str, dict[str, Any]] = {"plain": {}}
    for output in (False, True):
        name = " + output" if output else ""
        options: dict[str, Any] = dict(include_output=output)
        trees = dict(num_draft_tokens=drafts, break_even=0.35, **options)
        lookup = jaxkv.PromptLookup(break_even=0.2, **options)
        found |= {
            f"prompt lookup{name}": {"speculate": lookup},
            f"tree{name}": {"speculate": jaxkv.Tree(**trees)},
            f"aligned{name}": {"speculate": jaxkv.Aligned(**trees)},
        }
    aligned = found["aligned + output"]
    return found | {
        f"aligned + output, {name}": aligned | {"accept": rule}
        for name, rule in RULES.items()
    }


def conversations(
    lm: jaxkv.LanguageModel, rows: list[dict[str, Any]], new: int
) -> list[list[dict[str, str]]]:
    """Return the messages of each question, which the user has the last word in."""
    found = [[{"role": "user", "content": row["turns"][0]}] for row in rows]
    if not all(len(row["turns"]) > 1 for row in rows):
        return found
    firsts = [encode_chat(lm, messages) for messages in found]
    answers = jaxkv.generate(lm, firsts, max_new_tokens=new).text or ()
    return [
        [
            *said,
            {"role": "assistant", "content": answer},
            {"role": "user", "content": t},
        ]
        for said, answer, t in zip(
            found, answers, [row["turns"][1] for row in rows], strict=True
        )
    ]


def chosen_prompts(
    lm: jaxkv.LanguageModel,
    file: Path,
    kind: str,
    count: int,
    new: int,
    development: bool = False,
) -> tuple[list[list[int]], list[list[str]]]:
    """Return the first prompts of a kind that share its most common bucket.

    Beside each what a right output holds one of, empty where that is not known. For
    development it is the last of all others, in whatever bucket: at most `REPORTED` of
    a kind are ever reported.
    """
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    several = kind == "multi_turn"
    rows = [
        row
        for row in rows
        if (len(row["turns"]) > 1 if several else row["category"] == kind)
    ]
    ids = [encode_chat(lm, messages) for messages in conversations(lm, rows, new)]
    common = collections.Counter(map(bucket, map(len, ids))).most_common(1)[0][0]
    pairs = [
        (tokens, wanted(row))
        for tokens, row in zip(ids, rows, strict=True)
        if bucket(len(tokens)) == common
    ]
    reported = pairs[:REPORTED]
    if development:
        every = zip(ids, map(wanted, rows), strict=True)
        pairs = [pair for pair in every if pair not in reported][-count:]
    pairs = pairs[:count] if development else reported[:count]
    return [tokens for tokens, _ in pairs], [texts for _, texts in pairs]


def wanted(row: dict[str, Any]) -> list[str]:
    """Return the texts of which a right output holds one."""
    (reference, *_) = row.get("reference") or [None]
    if row["category"] == "math_reasoning" and reference:
        return [reference.split("####")[-1].strip()]
    if row["category"] == "rag" and reference:
        return [reference] if isinstance(reference, str) else list(reference)
    return []


def right(output: str, texts: list[str]) -> bool:
    """Return whether an output holds one of the texts, as words of their own."""
    plain = output.replace(",", "").lower()
    return any(
        re.search(
            rf"(?<!\w){re.escape(text.replace(',', '').lower().strip())}(?!\w)", plain
        )
        for text in texts
    )


def log_likelihood(
    lm: jaxkv.LanguageModel, prompts: list[list[int]], outputs: list[tuple[int, ...]]
) -> tuple[float, float]:
    """Return mean and half interval over outputs of what the network says of them."""
    rows = [[*p, *out] for p, out in zip(prompts, outputs, strict=True)]
    width = bucket(max(map(len, rows)))
    means = []
    for first in range(0, len(rows), 8):
        some = rows[first : first + 8]
        tokens = np.zeros((8, width), np.int32)
        for place, row in zip(tokens, some, strict=False):
            place[: len(row)] = row
        found = losses(lm, tokens, Method(name="full"), None, prompt=1)
        for place, row, prompt in zip(
            found, some, prompts[first : first + 8], strict=False
        ):
            means.append(-place[len(prompt) - 1 : len(row) - 1].mean())
    return float(np.mean(means)), half_width(means)


def rouge_l(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Return the F-measure of the longest common subsequence of two outputs."""
    lengths = np.zeros(len(b) + 1, int)
    other = np.array(b)
    for token in a:
        diagonal = lengths[:-1] + (other == token)
        lengths[1:] = np.maximum.accumulate(np.maximum(diagonal, lengths[1:]))
    return 2 * int(lengths[-1]) / (len(a) + len(b))


def measure(
    lm: jaxkv.LanguageModel,
    prompts: list[list[int]],
    answers: list[list[str]],
    *,
    batch: int,
    new: int,
    plain: list[tuple[int, ...]] | None,
    lock: Path | None = None,
    **arguments: Any,
) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """Generate for all prompts, and return what it came to, and the tokens."""
    groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    jaxkv.generate(lm, groups[0], max_new_tokens=new, **arguments)
    tokens: list[tuple[int, ...]] = []
    stats, wall = [], 0.0
    with alone(lock):
        for group in groups:
            begin = time.perf_counter()
            out = jaxkv.generate(lm, group, max_new_tokens=new, **arguments)
            wall += time.perf_counter() - begin - out.stats.compile_seconds
            stats.append(out.stats)
            tokens += out.tokens
    decoded = sum(len(row) for row in tokens) - len(tokens)
    seconds = sum(s.decode_seconds for s in stats)
    mean, half = log_likelihood(lm, prompts, tokens)
    result: dict[str, Any] = {
        "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "output_tokens": decoded + len(tokens),
        "decode_seconds": seconds,
        "wall_seconds": wall,
        "tokens_per_second": decoded / seconds,
        "log_likelihood": mean,
        "log_likelihood_half": half,
    }
    if all(answers):
        texts = lm.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        found = [right(*pair) for pair in zip(texts, answers, strict=True)]
        result |= {"right": float(np.mean(found)), "right_half": half_width(found)}
    if stats[0].drafts:
        result |= drafts_of([s.drafts for s in stats if s.drafts], decoded)
    if plain is not None:
        result |= differences(plain, tokens)
        result["rouge_l"] = float(np.mean(list(map(rouge_l, plain, tokens))))
    return result, tokens


def main(
    file: Annotated[Path, typer.Argument(help="Spec-Bench's question.jsonl.")],
    out: Annotated[Path, typer.Option(help="File for the result.")],
    model: Annotated[str, typer.Option(help="With a chat template.")] = "smollm2",
    kinds: Annotated[str, typer.Option(help="Categories, with commas.")] = KINDS,
    prompts: Annotated[int, typer.Option(help="Of each kind.")] = REPORTED,
    batch: Annotated[str, typer.Option(help="Rows, with commas.")] = "1,8",
    new: Annotated[int, typer.Option(help="Longest output.")] = 128,
    nodes: Annotated[int, typer.Option(help="Of the trees.")] = 16,
    only: Annotated[str, typer.Option(help="Variants, with semicolons.")] = "",
    development: Annotated[
        bool, typer.Option(help="Prompts that none report.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="Default: the device's.")] = None,
    lock: Lock = None,
) -> None:
    """Measure, print a line per variant, and write JSON."""
    enable_compilation_cache()
    lm = jaxkv.load(model, dtype=dtype)
    chosen = variants(nodes)
    if only:
        chosen = {name: chosen[name] for name in only.split(";")}
    report = provenance() | {
        "benchmark": "speculation on prompts",
        "model": lm.name,
        "dtype": lm.dtype.name,
        "new": new,
        "variants": {name: described(a) for name, a in chosen.items()},
    }
    rows: list[dict[str, Any]] = []
    for size in map(int, batch.split(",")):
        for kind in kinds.split(","):
            drawn, answers = chosen_prompts(
                *(lm, file, kind, prompts, new), development
            )
            whole = len(drawn) // size * size  # no smaller last batch
            drawn, answers = drawn[:whole], answers[:whole]
            base, plain = None, None
            for name, arguments in chosen.items():
                row, tokens = measure(
                    *(lm, drawn, answers),
                    batch=size,
                    new=new,
                    plain=plain,
                    lock=lock,
                    **arguments,
                )
                if name == "plain":
                    base, plain = row, tokens
                if base:
                    row["speedup_of_decoding"] = (
                        row["tokens_per_second"] / base["tokens_per_second"]
                    )
                    row["speedup_with_prefill"] = (
                        base["wall_seconds"] / base["output_tokens"]
                    ) / (row["wall_seconds"] / row["output_tokens"])
                rows.append({"kind": kind, "batch": size, "variant": name} | row)
                shown = row.get("mal_with_bonus", 1.0)
                print(f"{kind} {size} {name}: MAL {shown:.2f}", flush=True)
                write_json(out, report | {"rows": rows})


if __name__ == "__main__":
    typer.run(main)
