"""What drafts would bring at any price: real outputs, replayed without their network.

    python benchmarks/drafts_replay.py question.jsonl --out replay.json

First the model answers Spec-Bench's prompts (`speculation_prompts.py` says which) and
wishes for summaries of Python's documentation, without drafts; `--outputs` keeps them.
Then `generation.advance` decodes them again, with a stand-in that says the next token
of the answer: with `Exact` the steps are those of the model, and take no time. Told
that a step with a tree takes so many plain ones, it decides as it would on a machine
where that is so. Each price is that of one width alone, in batches of one. The result
has the plain steps that all answers of a kind take

* `auto`: as it decides;
* `always`: with a tree wherever there is one;
* `failing`: as it decides, where each drafted token is changed to another one.

What drafting itself costs is not counted: 0.01 to 0.2 plain steps each time.
"""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from drafts_auto import Failing
from real_prompts import drawn_prompts
from speculation_prompts import KINDS, chosen_prompts

import jaxkv
from jaxkv import generation
from jaxkv.options import described
from jaxkv.provenance import provenance, write_json
from jaxkv.speculation import loop
from jaxkv.speculation.rules import Exact

PRICES = {4: (1.1, 1.6, 3.0), 16: (1.15, 2.0, 4.0)}


@dataclasses.dataclass(frozen=True)
class Reader:
    """A network that reads what comes next from its parameters, int32 `[1, W]`."""

    words: int

    @property
    def config(self) -> Any:
        """What a loop asks for."""
        return SimpleNamespace(vocab_size=self.words, num_layers=0)

    def apply(self, variables: Any, *args: Any, method: str | None = None) -> Any:
        """Return the next tokens in place of hidden states, or their logits."""
        if method == "unembed":
            return jax.nn.one_hot(args[0][..., 0], self.words, dtype=jnp.float32)
        _, positions, cache, _ = args
        return jnp.take(variables["params"][0], positions + 1)[..., None], cache


advance = jax.jit(generation.advance, static_argnames=("network", "options"))


def steps(
    prompt: np.ndarray, answer: np.ndarray, drafter: jaxkv.Drafter, told: list[float]
) -> np.ndarray:
    """Return how many steps an answer takes, and how many of them are with trees.

    Args:
      prompt: token ids.
      answer: token ids.
      drafter: its trees are of all widths that are told.
      told: what a step with each width takes.
    """
    width, new = -(-len(prompt) // 512) * 512, -(-len(answer) // 64) * 64
    words = 512 * -(-(1 + int(max(prompt.max(), answer.max()))) // 512)
    text = np.zeros((1, width + new + 1), np.int32)
    text[0, : len(prompt)] = prompt
    tokens = jnp.asarray(text[:, :width])
    text[0, len(prompt) : len(prompt) + len(answer)] = answer
    first, one = jnp.asarray(answer[:1]), jnp.ones(1, jnp.int32)
    length = len(prompt) * one
    g = generation.Generation(
        tokens=jnp.full((1, new), -1, jnp.int32).at[:, 0].set(first),
        lengths=one,
        done=one == 0,
        finite=one == 1,
        last=first,
        position=length,
        cache=(),
        rngs=jax.random.split(jax.random.key(0), 1),
        seen=None,
        speculation=loop.begin(
            drafter, tokens, length, first, rule=Exact(), max_out=new
        ),
    )
    end = advance(
        *(Reader(words), jnp.asarray(text), g, jnp.int32(len(answer)), -one),
        jnp.asarray(told, jnp.float32),
        options=jaxkv.Options(speculate=drafter),
    )
    assert end.tokens[0, : len(answer)].tolist() == answer.tolist()
    counts = end.speculation.counts
    return np.array([int(counts.steps[0]), int(counts.tree_steps[0])])


def answers(
    lm: jaxkv.LanguageModel,
    file: Path,
    prompts: int,
    new: int,
    development: bool = False,
) -> dict[str, Any]:
    """Return prompts and outputs by kind."""
    asked = {
        kind: chosen_prompts(lm, file, kind, prompts, new, development)[0]
        for kind in KINDS.split(",")
    }
    if not development:
        asked["documentation"] = drawn_prompts(lm, prompts // 2, 1024)
    return {
        kind: {
            "prompts": rows,
            "outputs": jaxkv.generate(lm, rows, max_new_tokens=new).tokens,
        }
        for kind, rows in asked.items()
    }


def renumbered(
    rows: dict[str, Any],
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """Return prompts with outputs in ids of few words, and how many words.

    So the stand-in's logits are small. Outputs of 8 tokens or less are left out.
    """
    pairs = list(zip(rows["prompts"], rows["outputs"], strict=True))
    known, ids = np.unique(
        np.concatenate([[*p, *o] for p, o in pairs]), return_inverse=True
    )
    ends = np.cumsum([[len(p), len(o)] for p, o in pairs])
    parts = [part.astype(np.int32) for part in np.split(ids, ends[:-1])]
    texts = zip(parts[::2], parts[1::2], strict=True)
    return [(p, o) for p, o in texts if len(o) > 8], len(known)


def replay(rows: dict[str, Any], drafter: jaxkv.Tree) -> list[dict[str, Any]]:
    """Return what the answers of a kind take, by width and price."""
    texts, words = renumbered(rows)
    failing = Failing(words=words, **dataclasses.asdict(drafter))
    plain = sum(len(o) - 1 for _, o in texts)
    found = []
    for place, (width, prices) in enumerate(PRICES.items()):

        def total(how: jaxkv.Drafter, price: float, place: int = place) -> np.ndarray:
            told = [price if i == place else math.inf for i in range(len(PRICES))]
            return np.sum([steps(p, o, how, told) for p, o in texts], axis=0)

        always = total(drafter, 1.0)
        for price in prices:
            ours, fails = total(drafter, price), total(failing, price)
            row = {
                name: float(count[0] + (price - 1) * count[1])
                for name, count in (
                    *(("auto", ours), ("always", always)),
                    ("failing", fails),
                )
            }
            found.append({"nodes": width, "price": price, "plain": plain} | row)
    return found


def main(
    file: Annotated[Path, typer.Argument(help="Spec-Bench's question.jsonl.")],
    out: Annotated[Path, typer.Option(help="File for the result.")],
    model: Annotated[str, typer.Option(help="With a chat template.")] = "smollm2",
    outputs: Annotated[Path | None, typer.Option(help="File that keeps them.")] = None,
    prompts: Annotated[int, typer.Option(help="Of each kind.")] = 8,
    new: Annotated[int, typer.Option(help="Longest output.")] = 192,
) -> None:
    """Measure, print a line for each kind and price, and write JSON."""
    if outputs and outputs.exists():
        kept = json.loads(outputs.read_text("utf-8"))
    else:
        kept = answers(jaxkv.load(model), file, prompts, new)
        if outputs:
            write_json(outputs, kept)
    drafter = jaxkv.Tree()
    report = provenance() | {
        "benchmark": "drafts, replayed",
        "model": model,
        "new": new,
        "drafter": described({"speculate": drafter}),
    }
    rows: list[dict[str, Any]] = []
    for kind, texts in kept.items():
        for row in replay(texts, drafter):
            best = min(row["plain"], row["always"])
            row |= {
                "auto_against_best": best / row["auto"],
                "failing_against_plain": row["plain"] / row["failing"],
            }
            rows.append({"kind": kind, "answers": len(texts["outputs"])} | row)
            print(rows[-1], flush=True)
        write_json(out, report | {"rows": rows})


if __name__ == "__main__":
    typer.run(main)
