"""Scores of a real network under our policies and under kvpress', side by side.

    python benchmarks/kvpress_scores.py draw FOLDER --samples 6 --length 1024
    python benchmarks/kvpress_scores.py ours FOLDER --budgets 128,256
    python benchmarks/kvpress_scores.py theirs FOLDER --budgets 128,256
    python benchmarks/kvpress_scores.py compare FOLDER --out RESULT.json

`theirs` runs in an environment of kvpress: `pip install kvpress==0.5.5
"transformers<5.3" torch`, `gguf` too for its first run, which turns the network's file
into a folder (`--gguf`; `draw` prints which it is). Both networks read the same token
ids, the question within what is cut, and decode greedily in float32 at the positions
that follow. Budgets are tokens of each head, on average under AdaKV and KVzip, and of
each layer under PyramidKV.

Work is done in blocks of prompts, each with samples of every task. What a folder has is
not done again, so that a run may be stopped, and others may run beside it, `--part 2/4`
say. `compare` takes the blocks that both sides have: paired differences, and what share
of outputs and of kept tokens is the same.
"""

import argparse
import contextlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

TASKS = (
    *("niah_single_1", "niah_single_words", "niah_single_uuid"),
    *("niah_multikey", "niah_multivalue", "niah_multiquery"),
)
SEED = 1_000_003  # of development: no table of the README is made of these
CHUNK, LAG, SINKS = 20, 32, 4  # of ChunkKV, LagKV and all who keep the first tokens
REQUEST = ("\n\nRepeat the previous context exactly.", "\n")  # KVzip's
METHODS = (
    *("full", "snapkv", "pyramidkv", "tova", "knorm", "streaming-llm", "keydiff"),
    *("expected-attention", "lagkv", "chunkkv", "adakv", "criticalkv", "kvzip"),
)


def keep(method: str, budget: int, length: int) -> int:
    """Return how many tokens to keep, so that no method has to break a tie or a chunk.

    kvpress keeps whole chunks, the last one of the prompt among them, which is shorter,
    since SnapKV's window is in it. Of LagKV's partitions it keeps equally many tokens,
    and one more of some, any of them: their ranks are the same.
    """
    if method == "full":
        return length
    if method == "chunkkv":
        return (budget // CHUNK - 1) * CHUNK + ((length - 1) % CHUNK + 1)
    if method == "lagkv":
        compared = (length - SINKS) // LAG - 1
        whole = length - compared * LAG
        return whole + (budget - whole) // compared * compared
    return budget


def our_policies(request: tuple[int, ...]) -> dict[str, Any]:
    """Return our policies, with the settings that kvpress has."""
    import jaxkv

    snap = jaxkv.SnapKV.kvpress()
    zip_ = jaxkv.KVzip(repeat_ids=request)
    return {
        "full": None,
        "snapkv": snap,
        "pyramidkv": jaxkv.PyramidKV.kvpress(),
        "tova": jaxkv.TOVA.kvpress(),
        "knorm": jaxkv.KNorm(),
        "streaming-llm": jaxkv.StreamingLLM(n_sink=SINKS),
        "keydiff": jaxkv.KeyDiff(),
        "expected-attention": jaxkv.ExpectedAttention.kvpress(),
        "lagkv": jaxkv.LagKV(lag_size=LAG, n_sink=SINKS),
        "chunkkv": jaxkv.ChunkKV.kvpress(policy=snap, chunk_length=CHUNK),
        # Three times, since there are as many heads.
        "adakv": jaxkv.AdaKV(policy=snap, most=3.0),
        # kvpress takes the mean of what the window pays, we the sum.
        "criticalkv": jaxkv.CriticalKV(policy=snap, epsilon=64 * 1e-4),
        "kvzip": jaxkv.AdaKV(policy=zip_, safeguard=0.0, most=3.0),
    }


def their_presses(budget: int, length: int) -> dict[str, Any]:
    """Return kvpress' presses of these names for a prompt of this length."""
    import kvpress

    def ratio(method: str, more: float = 0.5) -> float:
        # A half more, so that no rounding of the share makes it a token less.
        return 1 - (keep(method, budget, length) + more) / length

    chunks = -(-length // CHUNK)
    return {
        "snapkv": kvpress.SnapKVPress(ratio("snapkv")),
        "pyramidkv": kvpress.PyramidKVPress(ratio("pyramidkv", 0)),
        "tova": kvpress.TOVAPress(ratio("tova")),
        "knorm": kvpress.KnormPress(ratio("knorm")),
        "streaming-llm": kvpress.StreamingLLMPress(ratio("streaming-llm")),
        "keydiff": kvpress.KeyDiffPress(ratio("keydiff")),
        "expected-attention": kvpress.ExpectedAttentionPress(
            ratio("expected-attention"), epsilon=1e-2
        ),
        "lagkv": kvpress.LagKVPress(ratio("lagkv"), lag_size=LAG),
        "chunkkv": kvpress.ChunkKVPress(
            kvpress.SnapKVPress(1 - (budget // CHUNK + 0.5) / chunks)
        ),
        "adakv": kvpress.AdaKVPress(kvpress.SnapKVPress(ratio("adakv"))),
        "criticalkv": kvpress.CriticalKVPress(kvpress.SnapKVPress(ratio("criticalkv"))),
    }


def draw(asked: argparse.Namespace) -> None:
    """Write prompts, and a tokenizer for KVzip."""
    import jaxkv
    from jaxkv.evaluation.questions import Cell, draw_questions
    from jaxkv.language_model import smollm2_file

    lm = jaxkv.load("smollm2")
    tasks = asked.tasks.split(",")
    cells = [Cell(task=task, length=asked.length) for task in tasks]
    drawn = draw_questions(lm, cells, samples=asked.samples, seed=SEED)
    prompts = [
        dict(
            task=question.cell.task,
            ids=question.ids.tolist(),
            outputs=question.sample.outputs,
            new=question.sample.max_new_tokens,
        )
        for question in sorted(drawn, key=lambda question: question.index)
    ]
    lm.tokenizer.chat_template = None
    lm.tokenizer.save_pretrained(asked.folder / "tokenizer")
    request = lm.tokenizer(list(REQUEST), add_special_tokens=False)["input_ids"]
    written = dict(
        tasks=tasks,
        prompts=prompts,
        request=[x for some in request for x in some],
        stop=list(lm.stop_ids),
    )
    (asked.folder / "prompts.json").write_text(json.dumps(written))
    print("the file for --gguf:", smollm2_file())


def blocks(asked: argparse.Namespace) -> Iterator[tuple[str, list]]:
    """Yield name and prompts of each block of this part."""
    prompts = json.loads((asked.folder / "prompts.json").read_text())["prompts"]
    part, parts = map(int, asked.part.split("/"))
    firsts = range(0, len(prompts), asked.block)
    for number, first in enumerate(firsts):
        if number % parts == part - 1:
            yield f"{first:04d}", prompts[first : first + asked.block]


def write(file: Path, outputs: list[list[int]], kept: np.ndarray | None) -> None:
    """Write outputs, and which tokens each layer and head keeps of each prompt."""
    wide = max(map(len, outputs))
    tokens = np.full((len(outputs), wide), -1, np.int32)
    for row, output in zip(tokens, outputs, strict=True):
        row[: len(output)] = output
    held: dict[str, Any] = {} if kept is None else {"kept": np.packbits(kept, axis=-1)}
    whole = file.with_suffix(".part.npz")
    np.savez_compressed(whole, tokens=tokens, **held)
    whole.rename(file)
    print(file.name, flush=True)


def missing(asked: argparse.Namespace, side: str, block: str) -> dict[str, list]:
    """Return each method's budgets that a block lacks, and their files."""
    found: dict[str, list] = {}
    for method in asked.methods.split(","):
        for budget in [0] if method == "full" else map(int, asked.budgets.split(",")):
            file = asked.folder / f"{side} {method} {budget} {block}.npz"
            if not file.exists():
                found.setdefault(method, []).append((budget, file))
    return found


def ours(asked: argparse.Namespace) -> None:
    """Run our policies."""
    import jax

    import jaxkv

    jax.config.update("jax_default_matmul_precision", "highest")
    lm = jaxkv.load("smollm2", dtype="float32")
    request = json.loads((asked.folder / "prompts.json").read_text())["request"]
    policies = our_policies(tuple(request))
    for method in asked.methods.split(","):
        for block, prompts in blocks(asked):
            todo = missing(asked, "ours", block).get(method, [])
            if not todo:
                continue
            ids = [prompt["ids"] for prompt in prompts]
            how: dict[str, Any] = {}
            if method != "full":
                budgets = [keep(method, b, len(row)) for b, _ in todo for row in ids]
                how = dict(prefill=policies[method], budget=budgets)
            out = jaxkv.generate(
                lm,
                ids * len(todo),
                max_new_tokens=max(prompt["new"] for prompt in prompts),
                return_cache=True,
                **how,
            )
            longest = max(map(len, ids))
            for number, (_, file) in enumerate(todo):
                rows = range(number * len(ids), (number + 1) * len(ids))
                of_rows = zip(out.tokens[rows.start : rows.stop], prompts, strict=True)
                outputs = [list(row[: prompt["new"]]) for row, prompt in of_rows]
                assert out.context is not None  # `return_cache` asks for it
                held = [
                    marked(out.context.kept_positions(row), len(x), longest)
                    for row, x in zip(rows, ids, strict=True)
                ]
                write(file, outputs, None if method == "full" else np.stack(held))


def marked(layers: Any, length: int, longest: int) -> np.ndarray:
    """Return which tokens of a prompt are kept, bool `[layer, head, token]`."""
    index = np.arange(longest)
    found = np.array([[np.isin(index, head) for head in layer] for layer in layers])
    return found & (index < length)


def theirs(asked: argparse.Namespace) -> None:
    """Run kvpress' presses, all of them in one reading of each prompt."""
    import torch
    import transformers
    from kvpress_side import Reader, decode, read_tokenizer_once

    torch.set_grad_enabled(False)
    transformers.utils.logging.disable_progress_bar()
    how: dict[str, Any] = dict(dtype=torch.float32, attn_implementation="sdpa")
    load, model_folder = transformers.AutoModelForCausalLM, asked.folder / "network"
    if asked.gguf:
        model = load.from_pretrained(
            asked.gguf.parent, gguf_file=asked.gguf.name, **how
        )
        model.save_pretrained(model_folder)
        return
    model = load.from_pretrained(model_folder, **how).eval().to(asked.device)
    model.config.name_or_path = words = str(asked.folder / "tokenizer")
    written = json.loads((asked.folder / "prompts.json").read_text())
    assert read_tokenizer_once(words, REQUEST) == written["request"]
    (asked.folder / "theirs.json").write_text(json.dumps(versions(asked.device)))
    for block, prompts in blocks(asked):
        todo = missing(asked, "theirs", block)
        if not todo:
            continue
        wanted = [
            (method, budget) for method, some in todo.items() for budget, _ in some
        ]
        reader = Reader(model, wanted, their_presses)
        read = [reader.read(prompt["ids"]) for prompt in prompts]
        longest = max(len(prompt["ids"]) for prompt in prompts)
        new = [prompt["new"] for prompt in prompts]
        for method, some in todo.items():
            for budget, file in some:
                caches = [found.pop((method, budget)) for found in read]
                outputs = decode(model, caches, new, written["stop"])
                held = [cache.kept(longest) for cache in caches]
                write(file, outputs, None if method == "full" else np.stack(held))


def versions(device: str) -> dict[str, str]:
    """Return what kvpress runs on."""
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    packages = ("kvpress", "transformers", "torch", "tokenizers", "numpy")
    return dict(device=name) | {x: importlib.metadata.version(x) for x in packages}


def compare(asked: argparse.Namespace) -> None:
    """Score both sides, and write and print one table."""
    import jaxkv
    from jaxkv.provenance import provenance, write_json

    lm = jaxkv.load("smollm2")
    written = json.loads((asked.folder / "prompts.json").read_text())
    found: dict[tuple[str, int], list] = {}
    for file in sorted(asked.folder.glob("theirs *.npz")):
        _, method, budget, block = file.stem.split(" ")
        mine = file.with_name(file.name.replace("theirs", "ours", 1))
        if mine.exists():
            sides = [dict(np.load(x)) for x in (mine, file)]
            first, count = int(block), len(sides[0]["tokens"])
            some = written["prompts"][first : first + count]
            found.setdefault((method, int(budget)), []).append((some, sides))
    order = {method: number for number, method in enumerate(METHODS)}
    rows = [
        row_of(lm.tokenizer, method, budget, found[method, budget])
        for method, budget in sorted(found, key=lambda x: (x[1], order[x[0]]))
    ]
    theirs = json.loads((asked.folder / "theirs.json").read_text())
    head: dict[str, Any] = dict(theirs=theirs, seed=SEED, tasks=written["tasks"])
    lengths = [len(prompt["ids"]) for prompt in written["prompts"]]
    head |= dict(prompt_tokens=[min(lengths), max(lengths)])
    write_json(asked.out, provenance() | head | {"rows": rows})
    for row in rows:
        mine, other, apart = (
            [f"{100 * x:.1f}" for x in row[name]]
            for name in ("ours", "theirs", "difference")
        )
        print(
            f"| {row['method']} | {row['budget']} | {row['prompts']} | {mine[0]} "
            f"({mine[1]} to {mine[2]}) | {other[0]} ({other[1]} to {other[2]}) | "
            f"{apart[0]} ({apart[1]} to {apart[2]}) | {row['same_output']} | "
            f"{100 * row.get('kept_by_both', 1):.3f} % |"
        )


def row_of(tokenizer: Any, method: str, budget: int, found: list) -> dict[str, Any]:
    """Return a row of the table: scores in [0, 1], and middle and ends of intervals."""
    from jaxkv.evaluation.statistics import average, average_difference, mean_interval
    from jaxkv.tasks import score_all

    prompts = [prompt for some, _ in found for prompt in some]
    tokens = [
        [row[row >= 0] for _, sides in found for row in sides[side]["tokens"]]
        for side in (0, 1)
    ]
    scores = np.array(
        [
            [
                score_all(
                    tokenizer.decode(row, skip_special_tokens=True), prompt["outputs"]
                )
                for row, prompt in zip(some, prompts, strict=True)
            ]
            for some in tokens
        ]
    )
    tasks = np.array([prompt["task"] for prompt in prompts])
    of = {task: scores[:, tasks == task] for task in dict.fromkeys(tasks.tolist())}
    row: dict[str, Any] = dict(method=method, budget=budget, prompts=len(prompts))
    for side, name in enumerate(("ours", "theirs")):
        row[name] = average([mean_interval(x[side]) for x in of.values()])
        row[f"{name}_by_task"] = {
            task: round(float(x[side].mean()), 4) for task, x in of.items()
        }
    row["difference"] = average_difference([x[0] - x[1] for x in of.values()])
    row["same_score"] = int((scores[0] == scores[1]).sum())
    row["same_output"] = sum(map(np.array_equal, *tokens))
    if method != "full":
        row |= kept_of(found)
    return row


def kept_of(found: list) -> dict[str, Any]:
    """Return the share of theirs that both keep, and tokens per layer and head."""
    both, counts, prompts, worst = 0, np.zeros(2), 0, 1.0
    for _, sides in found:
        a, b = (np.unpackbits(side["kept"], axis=-1) for side in sides)
        common = (a & b).sum((1, 2, 3)) / b.sum((1, 2, 3))
        worst = min(worst, float(common.min()))
        both += (a & b).sum(dtype=int)
        counts += [x.sum(dtype=int) / (x.shape[1] * x.shape[2]) for x in (a, b)]
        prompts += len(a)
    heads = a.shape[1] * a.shape[2]
    return dict(
        kept_by_both=float(both / (counts[1] * heads)),
        kept_by_both_least=worst,
        kept=(counts / prompts).round(3).tolist(),
    )


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("draw", "ours", "theirs", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=6, help="Of each task.")
    parser.add_argument("--length", type=int, default=1024, help="Tokens of a prompt.")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--budgets", default="128,256")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--block", type=int, default=len(TASKS), help="Prompts of it.")
    parser.add_argument("--part", default="1/1", help="Every so manieth block.")
    parser.add_argument("--device", default="cpu", help="torch's.")
    parser.add_argument("--gguf", type=Path, help="The network's file, once.")
    parser.add_argument("--out", type=Path, help="For the result.")
    return parser


def main() -> None:
    """Do what the command line asks for."""
    asked = parser().parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    do = dict(draw=draw, ours=ours, theirs=theirs, compare=compare)
    with contextlib.suppress(KeyboardInterrupt):
        do[asked.what](asked)


if __name__ == "__main__":
    main()
