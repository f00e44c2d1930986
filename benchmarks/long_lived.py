"""Memory maps and resident memory of a process that meets ever new shapes.

Each call of `jaxkv.generate` has another shape or other options than all before it:
rows, length of the prompts, budget, longest output, policies, sampler, drafts. No two
of them share both of their programs. Weights are random: what is compiled does not
depend on them.
"""

import dataclasses
import itertools
import random
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

import jaxkv
from jaxkv import language_model
from jaxkv.laws.network import CONFIG
from jaxkv.models.decoder import Decoder, random_parameters
from jaxkv.options import described
from jaxkv.provenance import provenance, write_json
from jaxkv.runtime import programs

TINY = dataclasses.replace(CONFIG, vocab_size=64, max_positions=2048)
ROWS = (1, 2, 3, 4)
PROMPTS = (60, 90, 120, 180, 250)  # each of another bucket
NEW = (8, 70, 100)
BUDGETS = (20, 70, 100)
PREFILLS = (
    jaxkv.DapQ(),
    jaxkv.ExpectedAttention(),
    jaxkv.H2O(),
    jaxkv.KNorm(),
    jaxkv.SnapKV(window_size=8),
    jaxkv.StreamingLLM(),
    jaxkv.TOVA(),
)
DECODES = (
    jaxkv.Full(),
    jaxkv.H2ODecode(),
    jaxkv.LongFlow(),
    jaxkv.StreamingLLM(),
    jaxkv.TOVADecode(),
)
SAMPLERS = (jaxkv.Greedy(), jaxkv.Categorical(temperature=0.8, top_k=20))
DRAFTS = (None, jaxkv.PromptLookup(num_draft_tokens=3), jaxkv.Tree())


def calls(count: int, seed: int = 0) -> list[tuple[int, int, dict[str, Any]]]:
    """Draw different calls: rows, tokens of a prompt, and arguments."""
    plain = itertools.product(
        ROWS, PROMPTS, NEW, BUDGETS, PREFILLS, DECODES, SAMPLERS, DRAFTS[:1]
    )
    drafted = itertools.product(
        *(ROWS, PROMPTS, NEW, BUDGETS, PREFILLS, DECODES[:1], SAMPLERS, DRAFTS[1:])
    )
    names = "max_new_tokens", "budget", "prefill", "decode", "sampler", "speculate"
    drawn = random.Random(seed).sample([*plain, *drafted], count)
    return [
        (rows, prompt, dict(zip(names, options, strict=True)))
        for rows, prompt, *options in drawn
    ]


def resident_mib() -> int:
    """Return the resident memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 // 2**20


def main(
    out: Annotated[Path | None, typer.Argument(help="JSON; default: none.")] = None,
    count: Annotated[int, typer.Option("--calls", min=1)] = 500,
    layers: Annotated[int, typer.Option(min=1, help="Of the network.")] = 2,
    needle: Annotated[
        bool, typer.Option("--needle", help="Take needle, not a random network.")
    ] = False,
    bounded: Annotated[
        bool, typer.Option(help="Let go of programs, as the library does.")
    ] = True,
    every: Annotated[int, typer.Option(min=1, help="Calls between two lines.")] = 25,
) -> None:
    """Count memory maps and resident memory over many different calls."""
    if not bounded:
        programs.SHELF.most, programs.SHELF.most_maps = sys.maxsize, None
    lm = language_model.load("needle")
    if not needle:
        config = dataclasses.replace(TINY, num_layers=layers)
        params = random_parameters(config, jax.random.key(0), jnp.float32)
        lm = language_model.LanguageModel(
            name="tiny",
            folder=lm.folder,
            network=Decoder(config),
            params=params,
            tokenizer=None,
            stop_ids=(),
        )
    rng = np.random.default_rng(0)
    lines: list[dict[str, float]] = []
    begin = time.process_time()

    def measure(done: int) -> None:
        line = {
            "calls": done,
            "programs": len(programs.SHELF),
            "maps": programs.memory_maps() or 0,
            "resident_mib": resident_mib(),
            "cpu_seconds": round(time.process_time() - begin, 1),
        }
        lines.append(line)
        print("  ".join(f"{name} {value}" for name, value in line.items()), flush=True)

    measure(0)
    for done, (rows, prompt, options) in enumerate(calls(count), 1):
        ids = rng.integers(0, lm.config.vocab_size, (rows, prompt)).tolist()
        try:
            jaxkv.generate(lm, ids, stop_ids=[], **options)
        except ValueError as error:
            raise SystemExit(f"{described(options)}: {error}") from error
        if done % every == 0 or done == count:
            measure(done)
    if out:
        settings = {"network": lm.name, "layers": lm.config.num_layers}
        bounds = {"most": programs.SHELF.most, "most_maps": programs.SHELF.most_maps}
        write_json(out, provenance() | settings | bounds | {"lines": lines})


if __name__ == "__main__":
    typer.run(main)
