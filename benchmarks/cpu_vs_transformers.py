"""Decode speed on the CPU against transformers with torch, on one folder, in one run.

Both read the same weights in float32, get the same prompts and threads, choose greedily
and ignore stop ids. Calls alternate, so that a slow moment of the machine hits all
alike. Only decoding is timed: from the first new token, which prefill pays for, to the
last; compilation is not in it either.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from jaxkv import language_model
from jaxkv.models.decoder import random_parameters
from jaxkv.models.hf import export as hf_export
from jaxkv.needle.training import CONFIG
from jaxkv.provenance import provenance, write_json
from jaxkv.text.inference import generate

RESULTS = Path(__file__).parent / "results"
ATTENTIONS = ("sdpa", "eager")  # transformers' default, and the other one it has


class Clock(transformers.StoppingCriteria):
    """Takes the time after every token, and never stops anything."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores, **_):
        """Return that no row is done."""
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def time_ours(lm: Any, prompts: np.ndarray, new: int) -> tuple[float, np.ndarray]:
    """Return tokens per second of decoding, and the tokens."""
    out = generate(lm, prompts.tolist(), max_new_tokens=new, stop_ids=[])
    return out.stats.tokens_per_second, np.array(out.tokens)


def time_theirs(model: Any, prompts: np.ndarray, new: int) -> tuple[float, np.ndarray]:
    """Return tokens per second of decoding, and the tokens."""
    clock = Clock()
    ids = torch.from_numpy(prompts).long()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=[clock],
    )
    tokens = out[:, prompts.shape[1] :].numpy()
    assert tokens.shape[1] == new, "transformers stopped early"
    decoded = (new - 1) * len(prompts)
    return decoded / (clock.times[-1] - clock.times[0]), tokens


def compare(
    folder: Path, *, batch: int, prompt: int, new: int, repeats: int, seed: int
) -> dict[str, Any]:
    """Return tokens per second of all three, and how much of their output agrees."""
    lm = language_model.load(folder, dtype="float32")
    models = {}
    for attention in ATTENTIONS:
        models[attention] = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        ).eval()
        # The folder's stop ids must not come back as a default.
        models[attention].generation_config.eos_token_id = None
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, lm.config.vocab_size, (batch, prompt), np.int32)
    speeds: dict[str, list[float]] = {name: [] for name in ("jaxkv", *ATTENTIONS)}
    tokens = {}
    for repeat in range(repeats + 1):
        for name, times in speeds.items():
            if name == "jaxkv":
                speed, tokens[name] = time_ours(lm, prompts, new)
            else:
                speed, tokens[name] = time_theirs(models[name], prompts, new)
            if repeat:  # the first round compiles and warms up
                times.append(speed)
    medians = {name: statistics.median(times) for name, times in speeds.items()}
    best = max(ATTENTIONS, key=lambda name: medians[name])
    fastest = {name: max(times) for name, times in speeds.items()}
    return {
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "tokens_per_second": medians,
        "calls_tokens_per_second": speeds,
        "fastest_of_transformers": best,
        "ratio": medians["jaxkv"] / medians[best],
        # Other work on the machine hurts torch more, so the best calls count as well.
        "ratio_of_best_calls": fastest["jaxkv"]
        / max(fastest[attention] for attention in ATTENTIONS),
        # Rounding may split a near-tie, and then the rest of that row differs.
        "same_tokens": {
            name: float((tokens["jaxkv"] == tokens[name]).mean()) for name in ATTENTIONS
        },
    }


def main(
    model: Annotated[
        Path | None, typer.Option(help="Folder; default: the shipped checkpoint.")
    ] = None,
    random: Annotated[
        bool, typer.Option("--random", help="Random weights of needle's sizes instead.")
    ] = False,
    batch: Annotated[list[int], typer.Option(help="Rows; may be repeated.")] = [1, 8],  # noqa: B006
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 512,
    new: Annotated[int, typer.Option(min=2, help="New tokens.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    seed: Annotated[int, typer.Option(help="Of prompts and random weights.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Default: a dated file in benchmarks/results.")
    ] = None,
) -> None:
    """Compare decode speed on the CPU with transformers and torch."""
    jax.config.update("jax_platforms", "cpu")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    header = provenance()
    torch.set_num_threads(header["cores"])  # what XLA takes
    with tempfile.TemporaryDirectory() as scratch:
        if random:
            model = Path(scratch) / "needle-random"
            hf_export.write_qwen3(
                random_parameters(CONFIG, jax.random.key(seed), "float32"),
                CONFIG,
                model,
                bos_id=0,
                stop_ids=[1],
                pad_id=0,
            )
        folder = model or language_model.needle_folder()
        rows = [
            compare(folder, batch=b, prompt=prompt, new=new, repeats=repeats, seed=seed)
            for b in batch
        ]
    result = {
        "benchmark": "cpu_vs_transformers",
        "model": folder.name,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        **header,
        "rows": rows,
    }
    table = Table(
        "batch",
        "jaxkv",
        *ATTENTIONS,
        "ratio",
        "of best",
        title=f"{folder.name}: decoded tokens/s, {prompt} + {new} tokens, "
        f"{result['threads']} threads",
        caption="median (slowest-fastest call); sdpa and eager are transformers'",
    )
    for row in rows:
        cells = []
        for name, median in row["tokens_per_second"].items():
            calls = row["calls_tokens_per_second"][name]
            cells.append(f"{median:.0f} ({min(calls):.0f}-{max(calls):.0f})")
        ratios = (f"{row[key]:.2f}" for key in ("ratio", "ratio_of_best_calls"))
        table.add_row(str(row["batch"]), *cells, *ratios)
    Console().print(table)
    day = header["date"][:10]
    write_json(out or RESULTS / f"{day}-cpu-vs-transformers-{folder.name}.json", result)


if __name__ == "__main__":
    typer.run(main)
