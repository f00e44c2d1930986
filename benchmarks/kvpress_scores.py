"""Right answers of a real network under our policies and under kvpress', side by side.

    python benchmarks/kvpress_scores.py ours FOLDER --samples 6
    python benchmarks/kvpress_scores.py theirs FOLDER --gguf FILE
    python benchmarks/kvpress_scores.py compare FOLDER --out RESULT.json

The second command runs in an environment of kvpress: `pip install kvpress==0.5.5
"transformers<5.3" torch gguf`; the first prints which file it wants. Both networks read
the same token ids, the question within what is cut, and decode greedily in float32 at
the positions that follow; budgets are tokens of each head, under AdaKV on average.
Methods that are done are not run again. `compare` says of how many answers the two
agree, and what share of the kept tokens is the same, over layers and heads.
"""

import argparse
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

TASKS = ("niah_single_1", "niah_single_words", "niah_single_uuid", "niah_multikey")
SEED = 1_000_003  # of development: no table of the README is made of these
BATCH = 12


def our_policies() -> dict[str, Any]:
    """Return our policies, with the settings that kvpress has."""
    import jaxkv

    snap = jaxkv.SnapKV.kvpress(window_size=32, kernel_size=7)
    expected = jaxkv.ExpectedAttention.kvpress()
    return {
        "snapkv": snap,
        "adakv": jaxkv.AdaKV(policy=snap, most=3.0),  # as many as there are heads
        "adakv, safeguard 0.5": jaxkv.AdaKV(policy=snap, most=3.0, safeguard=0.5),
        "snapkv, kernel 31": jaxkv.SnapKV.kvpress(window_size=32, kernel_size=31),
        "criticalkv": jaxkv.CriticalKV(policy=snap),
        "chunkkv": jaxkv.ChunkKV(policy=snap),
        "tova": jaxkv.TOVA.kvpress(),
        "keydiff": jaxkv.KeyDiff(),
        "expected-attention": expected,
        "adakv of expected-attention": jaxkv.AdaKV(policy=expected, most=3.0),
    }


def their_presses(ratio: float) -> dict[str, Any]:
    """Return the presses of the same names, made to remove a share of the prompt."""
    import kvpress

    def snap(kernel_size: int = 7) -> Any:
        return kvpress.SnapKVPress(ratio, window_size=32, kernel_size=kernel_size)

    def expected() -> Any:
        return kvpress.ExpectedAttentionPress(ratio, epsilon=1e-2)

    return {
        "snapkv": snap(),
        "adakv": kvpress.AdaKVPress(snap()),
        "adakv, safeguard 0.5": kvpress.AdaKVPress(snap(), alpha_safeguard=0.5),
        "snapkv, kernel 31": snap(31),
        "criticalkv": kvpress.CriticalKVPress(snap()),
        "chunkkv": kvpress.ChunkKVPress(snap()),
        "tova": kvpress.TOVAPress(ratio),
        "keydiff": kvpress.KeyDiffPress(ratio),
        "expected-attention": expected(),
        "adakv of expected-attention": kvpress.AdaKVPress(expected()),
    }


def runs(folder: Path, side: str, asked: argparse.Namespace) -> Iterator[tuple]:
    """Yield method, budget and file of each run to do; a budget of 0 keeps all."""
    for budget in map(int, asked.budgets.split(",")):
        for method in asked.methods.split(";"):
            file = folder / f"{side} {method} {budget}.npz"
            if not file.exists():
                yield method, budget, file


def write(file: Path, outputs: list[list[int]], kept: np.ndarray | None) -> None:
    """Write outputs, and which tokens each layer and head keeps of each prompt."""
    wide = max(map(len, outputs))
    tokens = np.full((len(outputs), wide), -1, np.int32)
    for row, output in zip(tokens, outputs, strict=True):
        row[: len(output)] = output
    held = {} if kept is None else {"kept": np.packbits(kept, axis=-1)}
    np.savez_compressed(file, tokens=tokens, **held)
    print(file.name, flush=True)


def ours(asked: argparse.Namespace) -> None:
    """Draw prompts where there are none, and run our policies."""
    import jaxkv
    from jaxkv.evaluation.questions import Cell, draw_questions
    from jaxkv.language_model import smollm2_file

    lm, file = jaxkv.load("smollm2"), asked.folder / "prompts.json"
    if not file.exists():
        cells = [Cell(task=task, length=asked.length) for task in TASKS]
        drawn = draw_questions(lm, cells, samples=asked.samples, seed=SEED)
        asked.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(
            json.dumps(
                [
                    dict(
                        task=question.cell.task,
                        ids=question.ids.tolist(),
                        outputs=question.sample.outputs,
                        new=min(question.sample.max_new_tokens, asked.new),
                        stop=list(lm.stop_ids),
                    )
                    for question in drawn
                ]
            )
        )
        print("the file for --gguf:", smollm2_file())
    prompts = json.loads(file.read_text())
    longest = max(len(prompt["ids"]) for prompt in prompts)
    for method, budget, file in runs(asked.folder, "ours", asked):
        how: dict[str, Any] = {}
        if budget:
            how = dict(prefill=our_policies()[method], budget=budget)
        outputs: list[list[int]] = []
        held = []
        for first in range(0, len(prompts), BATCH):
            part = prompts[first : first + BATCH]
            ids = [prompt["ids"] for prompt in part]
            out = jaxkv.generate(
                lm, ids, max_new_tokens=max(x["new"] for x in part), **how
            )
            outputs += [
                list(row[: prompt["new"]])
                for row, prompt in zip(out.tokens, part, strict=True)
            ]
            if budget:
                context = jaxkv.compress(lm, ids, **how)
                held += [
                    np.stack(
                        [
                            np.stack(
                                [np.isin(np.arange(longest), head) for head in layer]
                            )
                            for layer in context.kept_positions(row)
                        ]
                    )
                    for row in range(len(part))
                ]
        write(file, outputs, np.stack(held) if held else None)


def theirs(asked: argparse.Namespace) -> None:
    """Run kvpress' presses."""
    import torch
    import transformers

    torch.set_grad_enabled(False)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        asked.gguf.parent,
        gguf_file=asked.gguf.name,
        dtype=torch.float32,
        attn_implementation="sdpa",
    ).eval()
    prompts = json.loads((asked.folder / "prompts.json").read_text())
    longest = max(len(prompt["ids"]) for prompt in prompts)
    for method, budget, file in runs(asked.folder, "theirs", asked):
        part = file.with_suffix(".part")  # a run goes on where it was stopped
        found = pickle.loads(part.read_bytes()) if part.exists() else []
        for prompt in prompts[len(found) :]:
            found.append(answered(model, prompt, method, budget, longest))
            part.write_bytes(pickle.dumps(found))
        outputs, held = zip(*found, strict=True)
        write(file, list(outputs), np.stack(held) if budget else None)
        part.unlink()


def answered(
    model: Any, prompt: dict[str, Any], method: str, budget: int, longest: int
) -> tuple[list[int], np.ndarray | None]:
    """Return the greedy output, and what is kept, bool `[layer, head, token]`."""
    import torch
    from transformers import DynamicCache

    ids, cache = torch.tensor([prompt["ids"]]), DynamicCache()
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    held: list[np.ndarray] = []
    if budget:
        # A half more, so that no rounding of the share makes it a token less.
        press = their_presses(1 - (budget + 0.5) / ids.shape[1])[method]
        press.compress = noting(press.compress, held, longest)
        with press(model):
            logits = model(input_ids=ids, past_key_values=cache).logits
    else:
        logits = model(input_ids=ids, past_key_values=cache).logits
    output, position = [], ids.shape[1]
    while True:
        token = int(logits[0, -1].argmax())
        output.append(token)
        if token in prompt["stop"] or len(output) == prompt["new"]:
            return output, np.stack(held) if budget else None
        logits = model(
            input_ids=torch.tensor([[token]]),
            position_ids=torch.tensor([[position]]),
            past_key_values=cache,
        ).logits
        position += 1


def noting(
    compress: Callable[..., Any], held: list, longest: int
) -> Callable[..., Any]:
    """Return a press' `compress` that notes which tokens each head keeps."""

    def noted(module, hidden_states, keys, *rest):
        cut = compress(module, hidden_states, keys, *rest)
        mask = np.zeros((keys.shape[1], longest), bool)
        masked = getattr(module, "masked_key_indices", None)
        if masked is not None:
            mask[:, : keys.shape[2]] = True
            mask[masked[1].numpy(), masked[2].numpy()] = False
        else:
            for head in range(keys.shape[1]):
                places = {
                    key.tobytes(): i for i, key in enumerate(keys[0, head].numpy())
                }
                mask[
                    head, [places[key.tobytes()] for key in cut[0][0, head].numpy()]
                ] = True
        held.append(mask)
        return cut

    return noted


def answer_kept(lm: Any, prompts: list, kept: np.ndarray, task: str) -> np.ndarray:
    """Return the share of the answer's tokens that is kept, `[layer, head]`."""
    found = []
    for prompt, held in zip(prompts, kept, strict=True):
        if prompt["task"] != task:
            continue
        pieces = [lm.tokenizer.decode([token]) for token in prompt["ids"]]
        ends = np.cumsum([len(piece) for piece in pieces])
        first = "".join(pieces).index(prompt["outputs"][0])
        last = first + len(prompt["outputs"][0])
        inside = (ends > first) & (ends - list(map(len, pieces)) < last)
        found.append(held[..., : len(pieces)][..., inside].mean(-1))
    return np.round(np.mean(found, axis=0), 3)


def compare(asked: argparse.Namespace) -> None:
    """Score both sides, and write one table."""
    import jaxkv
    from jaxkv.provenance import provenance, write_json
    from jaxkv.tasks import exact, wilson

    lm = jaxkv.load("smollm2")
    prompts = json.loads((asked.folder / "prompts.json").read_text())
    rows = []
    for file in sorted(asked.folder.glob("theirs *.npz")):
        method, _, budget = file.stem.removeprefix("theirs ").rpartition(" ")
        mine = file.with_name(file.name.replace("theirs", "ours", 1))
        if not mine.exists():
            continue
        sides = [np.load(mine), np.load(file)]
        right = np.array(
            [
                [
                    exact(
                        lm.tokenizer.decode(row[row >= 0], skip_special_tokens=True),
                        prompt["outputs"],
                    )
                    for row, prompt in zip(side["tokens"], prompts, strict=True)
                ]
                for side in sides
            ]
        )
        count = len(prompts)
        row = dict(method=method, budget=int(budget), prompts=count)
        for name, side in zip(("ours", "theirs"), right, strict=True):
            row[name] = int(side.sum())
            row[f"{name}_interval"] = [round(x, 3) for x in wilson(side.sum(), count)]
            row[f"{name}_by_task"] = {
                task: int(
                    sum(
                        s
                        for s, p in zip(side, prompts, strict=True)
                        if p["task"] == task
                    )
                )
                for task in TASKS
            }
        row["same_verdict"] = int((right[0] == right[1]).sum())
        row["same_output"] = sum(
            np.array_equal(a[a >= 0], b[b >= 0])
            for a, b in zip(*(side["tokens"] for side in sides), strict=True)
        )
        if "kept" in sides[0]:
            a, b = (np.unpackbits(side["kept"], axis=-1) for side in sides)
            row["kept_by_both"] = float((a & b).sum() / b.sum())
            row["kept"] = [float(x.sum(-1).mean()) for x in (a, b)]
            row["answer_kept"] = {
                task: answer_kept(lm, prompts, a, task).tolist() for task in TASKS
            }
        rows.append(row)
        print(row)
    write_json(asked.out, provenance() | {"kvpress": "0.5.5", "rows": rows})


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("ours", "theirs", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=6, help="Of each task.")
    parser.add_argument("--length", type=int, default=1024, help="Tokens of a prompt.")
    parser.add_argument("--new", type=int, default=128, help="Tokens of an output.")
    parser.add_argument("--budgets", default="128,256")
    parser.add_argument("--methods", default="snapkv;adakv", help="With semicolons.")
    parser.add_argument("--gguf", type=Path, help="The network's file.")
    parser.add_argument("--out", type=Path, help="For the result.")
    asked = parser.parse_args()
    {"ours": ours, "theirs": theirs, "compare": compare}[asked.what](asked)


if __name__ == "__main__":
    main()
