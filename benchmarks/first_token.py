"""Time to first token of each way to cut a prompt, and the memory that it takes.

    python benchmarks/first_token.py OUT.json --methods "snapkv;dapq"
    OUT=COMPILED python benchmarks/farm.py JOBS LOGS --gpus 0,1 --per-gpu 8
    OUT=TIMED python benchmarks/farm.py JOBS LOGS --gpus 0,1 --per-gpu 4

The prompts are windows of Python's own documentation with the wish for a summary, in
the model's chat template. `query-aware` cuts them whole: `first_token_seconds` is
`jaxkv.compress` until the likeliest token behind them is known. `query-agnostic` cuts
all but their last 32 tokens (`document_seconds`), then puts these behind, and
`first_token_seconds` is what they take. Both read by one program, so that a method
compiles one for each batch size, and the one that puts questions behind is the same for
most methods. `program_bytes` is the dearest program of a call: what the compiler says
of its arguments (the weights among them), its results and its temporaries.

Each number is the median of `--repeats` calls behind one that compiles; `each` holds
all of them. With `--lock` a process runs nothing while another is timed. It compiles
then, and XLA, which tries kernels as it does, takes the GPU from whoever is timed: run
JOBS (`jobs/first-token.jobs`) twice, and drop the times of the first run. Programs are
kept on disk, where `jaxkv` keeps those of its commands, and the second tries nothing.
The file is written after each method, batch size and protocol; what it holds already is
not measured again. SIGTERM ends the process at once, and says where it stood.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import jax
import numpy as np
import typer
from real_prompts import drawn_prompts
from turns import Lock, alone

import jaxkv
from jaxkv import registry
from jaxkv.bench.clock import program_memory
from jaxkv.provenance import provenance, write_json
from jaxkv.runtime.compilation_cache import enable_compilation_cache
from jaxkv.runtime.programs import Program

METHODS = "full;snapkv;dapq;laq;laq:recommended"
ASKED = 32  # tokens at a prompt's end that are the question, where it is told apart


class Told:
    """What the process is about, on standard output, with the seconds since it began.

    It is said when it begins, and once more when SIGTERM ends the process. A thread
    waits for that: the main one hears of no signal before XLA has compiled.
    """

    def __init__(self) -> None:
        self.begin, self.about = time.monotonic(), "starting"
        signals, heard = os.pipe()
        os.set_blocking(heard, False)
        signal.set_wakeup_fd(heard)
        signal.signal(signal.SIGTERM, lambda *_: None)
        threading.Thread(target=self._wait, args=[signals], daemon=True).start()

    def say(self, about: str) -> None:
        """Say what comes next."""
        self.about = about
        print(f"{time.monotonic() - self.begin:6.1f} s  {about}", flush=True)

    def _wait(self, signals: int) -> None:
        while os.read(signals, 1)[0] != signal.SIGTERM:
            pass
        self.say(f"stopped while {self.about}; what was measured is in the file")
        os._exit(128 + signal.SIGTERM)


class Memory:
    """What the compiler says of every program, and which ones a call has run.

    What runs while they are found waits for `lock`, what is compiled does not.
    """

    def __init__(self, lock: Path | None) -> None:
        self.lock = lock
        self.bytes: dict[Any, int | None] = {}
        self.ran: set[Any] = set()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Note every program that is called within."""
        plain = Program.__call__

        def noted(program: Program, *args: Any, **kwargs: Any) -> Any:
            key = program.key(*args, **kwargs)
            if key not in self.bytes:
                # What is compiled here is what the call below runs.
                found = program_memory(program.compile(*args, **kwargs))
                self.bytes[key] = found["program_bytes"]
            self.ran.add(key)
            with alone(self.lock):
                return jax.block_until_ready(plain(program, *args, **kwargs))

        with mock.patch.object(Program, "__call__", noted):
            yield

    def most(self, call: Callable[[], Any]) -> int | None:
        """Run a call, and return the bytes of the dearest program in it."""
        self.ran = set()
        with self.watched():
            call()
        return max((self.bytes[key] or 0 for key in self.ran), default=None)


def read(
    lm: jaxkv.LanguageModel, prompts: list[list[int]], cut: dict[str, Any]
) -> tuple[jaxkv.Context, float]:
    """Read and cut prompts, choose their first tokens, and return the seconds too."""
    begin = time.perf_counter()
    context = jaxkv.compress(lm, prompts, **cut)
    np.asarray(context.logits.argmax(-1))
    return context, time.perf_counter() - begin


def whole(
    lm: jaxkv.LanguageModel, prompts: list[list[int]], cut: dict[str, Any]
) -> dict[str, float]:
    """Cut prompts with their questions, and return what that took."""
    return {"first_token_seconds": read(lm, prompts, cut)[1]}


def behind(
    lm: jaxkv.LanguageModel, prompts: list[list[int]], cut: dict[str, Any]
) -> dict[str, float]:
    """Cut documents, then put a question behind each, and return what either took."""
    context, seconds = read(lm, [row[:-ASKED] for row in prompts], cut)
    out = jaxkv.generate(
        lm,
        [row[-ASKED:] for row in prompts],
        context=context,
        documents=range(len(prompts)),
        max_new_tokens=1,
        stop_ids=[],
    )
    return {
        "document_seconds": seconds,
        "first_token_seconds": out.stats.prefill_seconds,
        "cache_bytes": out.stats.cache_bytes,
    }


PROTOCOLS = {"query-aware": whole, "query-agnostic": behind}


def measured(
    call: Callable[[], dict[str, float]],
    memory: Memory,
    told: Told,
    *,
    name: str,
    repeats: int,
) -> dict[str, Any]:
    """Compile what a call needs, then time it, and return its part of a row."""
    told.say(f"compiling {name}")
    begin = time.perf_counter()
    row: dict[str, Any] = {"program_bytes": memory.most(call)}
    row["compile_seconds"] = time.perf_counter() - begin
    told.say(f"waiting to time {name}")
    with alone(memory.lock):
        told.say(f"timing {name}")
        took = [call() for _ in range(repeats)]
    each = {key: [one[key] for one in took] for key in took[0]}
    return row | {k: float(np.median(x)) for k, x in each.items()} | {"each": each}


def main(
    out: Annotated[Path, typer.Argument(help="File for the result.")],
    model: Annotated[str, typer.Option(help="With a chat template.")] = "smollm2",
    batch: Annotated[str, typer.Option(help="Prompts, with commas.")] = "1,8",
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 4096,
    budget: Annotated[int, typer.Option(help="Of the prompt.")] = 512,
    methods: Annotated[str, typer.Option(help="With semicolons.")] = METHODS,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 7,
    lock: Lock = None,
) -> None:
    """Time prefill and the first token by method, and say what memory it takes."""
    told, memory = Told(), Memory(lock)
    rows = json.loads(out.read_text("utf-8"))["rows"] if out.is_file() else []
    there = {(row["method"], row["batch"], row["protocol"]) for row in rows}
    wanted = [
        (name, size, protocol)
        for name in methods.split(";")
        for size in map(int, batch.split(","))
        for protocol in PROTOCOLS
        if (name, size, protocol) not in there
    ]
    if not wanted:
        told.say(f"all of it is in {out} already")
        return
    enable_compilation_cache()
    told.say(f"loading {model}")
    lm = jaxkv.load(model)
    for name, size, protocol in wanted:
        policy = registry.parse(name, registry.PREFILL, flag="--methods")
        evicts = policy != jaxkv.Full()
        cut: dict[str, Any] = {"prefill": policy, "budget": budget} if evicts else {}
        prompts, run = drawn_prompts(lm, size, length), PROTOCOLS[protocol]

        def call(run=run, prompts=prompts, cut=cut) -> dict[str, float]:
            return run(lm, prompts, cut)

        row = {
            "method": name,
            "batch": size,
            "protocol": protocol,
            "prompt_tokens": max(map(len, prompts)),
        }
        title = f"{name}, {size} at once, {protocol}"
        row |= measured(call, memory, told, name=title, repeats=repeats)
        rows.append(row)
        write_json(out, provenance() | {"budget": budget, "rows": rows})
        shown = {key: value for key, value in row.items() if key != "each"}
        told.say(f"measured {len(rows)}: {shown}")


if __name__ == "__main__":
    typer.run(main)
