"""Time to first token of each way to cut a prompt, and the memory that it takes.

    python benchmarks/first_token.py OUT.json
    python benchmarks/farm.py jobs/first-token.jobs LOGS --gpus 0,1 --per-gpu 8

The prompts are windows of Python's own documentation with the wish for a summary, in
the model's chat template. `query-aware` cuts them whole. `query-agnostic` reads and
cuts all but their last 32 tokens (`document_seconds`), then puts these behind, and
`first_token_seconds` is what they take. `program_bytes` is the dearest program of both:
what the compiler says of its arguments (the weights among them), its results and its
temporaries. All programs compile before any is timed. With `--lock` processes are timed
one after the other; with `--together` none is before all have compiled.
"""

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from real_prompts import drawn_prompts
from turns import Lock, alone

import jaxkv
from jaxkv import registry
from jaxkv.bench.clock import program_memory
from jaxkv.provenance import provenance, write_json
from jaxkv.runtime.programs import Program

METHODS = "full;snapkv;dapq;laq;laq:recommended"
ASKED = 32  # tokens at a prompt's end that are the question, where it is told apart


@contextlib.contextmanager
def compiling(together: Path | None) -> Iterator[None]:
    """Compile within; it ends when all processes that compile by now have done so."""
    if together is None:
        yield
        return
    with open(together, "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield
        fcntl.flock(file, fcntl.LOCK_UN)
        fcntl.flock(file, fcntl.LOCK_EX)


class Memory:
    """What the compiler says of every program, and which ones a call has run."""

    def __init__(self) -> None:
        self.bytes: dict[Any, int | None] = {}
        self.ran: set[Any] = set()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Note every program that is called within."""
        plain = Program.__call__

        def noted(program: Program, *args: Any, **kwargs: Any) -> Any:
            key = program.key(*args, **kwargs)
            if key not in self.bytes:
                with program._mesh(*args, **kwargs):
                    jitted = program._shelf.get(key, program._fresh)
                    # What is compiled here is what the call below runs.
                    found = program_memory(jitted.lower(*args, **kwargs).compile())
                self.bytes[key] = found["program_bytes"]
            self.ran.add(key)
            return plain(program, *args, **kwargs)

        Program.__call__ = noted  # type: ignore[method-assign]
        try:
            yield
        finally:
            Program.__call__ = plain  # type: ignore[method-assign]

    def most(self, call: Callable[[], Any]) -> int | None:
        """Run a call, and return the bytes of the dearest program in it."""
        self.ran = set()
        with self.watched():
            call()
        return max((self.bytes[key] or 0 for key in self.ran), default=None)


def whole(
    lm: jaxkv.LanguageModel, prompts: list[list[int]], cut: dict[str, Any]
) -> dict[str, float]:
    """Cut prompts with their questions, and return what that took."""
    out = jaxkv.generate(lm, prompts, max_new_tokens=2, stop_ids=[], **cut)
    return {
        "first_token_seconds": out.stats.prefill_seconds,
        "cache_bytes": out.stats.cache_bytes,
    }


def behind(
    lm: jaxkv.LanguageModel, prompts: list[list[int]], cut: dict[str, Any]
) -> dict[str, float]:
    """Cut documents, then put a question behind each, and return what either took."""
    begin = time.perf_counter()
    context = jaxkv.compress(lm, [row[:-ASKED] for row in prompts], **cut)
    jax.block_until_ready(context)
    document = time.perf_counter() - begin
    out = jaxkv.generate(
        lm,
        [row[-ASKED:] for row in prompts],
        context=context,
        documents=range(len(prompts)),
        max_new_tokens=2,
        stop_ids=[],
    )
    return {
        "document_seconds": document,
        "first_token_seconds": out.stats.prefill_seconds,
        "cache_bytes": out.stats.cache_bytes,
    }


PROTOCOLS = {"query-aware": whole, "query-agnostic": behind}


def main(
    out: Annotated[Path, typer.Argument(help="File for the result.")],
    model: Annotated[str, typer.Option(help="With a chat template.")] = "smollm2",
    batch: Annotated[str, typer.Option(help="Prompts, with commas.")] = "1,8",
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 4096,
    budget: Annotated[int, typer.Option(help="Of the prompt.")] = 512,
    methods: Annotated[str, typer.Option(help="With semicolons.")] = METHODS,
    protocols: Annotated[str, typer.Option(help="With commas.")] = ",".join(PROTOCOLS),
    repeats: Annotated[int, typer.Option(help="Timed calls of each.")] = 5,
    lock: Lock = None,
    together: Annotated[
        Path | None, typer.Option(help="A file; none is timed before all compiled.")
    ] = None,
) -> None:
    """Time prefill and the first token by method, and say what memory it takes."""
    calls: list[tuple[dict[str, Any], Callable[[], dict[str, float]]]] = []
    with compiling(together):
        lm, memory = jaxkv.load(model), Memory()
        for size in map(int, batch.split(",")):
            prompts = drawn_prompts(lm, size, length)
            for name in methods.split(";"):
                policy = registry.parse(name, registry.PREFILL, flag="--methods")
                cut: dict[str, Any] = {"prefill": policy, "budget": budget}
                if policy == jaxkv.Full():
                    cut = {}
                for protocol in protocols.split(","):

                    def call(
                        run: Callable[..., dict[str, float]] = PROTOCOLS[protocol],
                        prompts: list[list[int]] = prompts,
                        cut: dict[str, Any] = cut,
                    ) -> dict[str, float]:
                        return run(lm, prompts, cut)

                    row = {
                        "method": name,
                        "protocol": protocol,
                        "batch": size,
                        "prompt_tokens": max(map(len, prompts)),
                        "program_bytes": memory.most(call),
                    }
                    calls.append((row, call))
    rows = []
    with alone(lock):
        for row, call in calls:
            took = [call() for _ in range(repeats)]
            for name in took[0]:
                row[name] = float(np.median([each[name] for each in took]))
            rows.append(row)
            print(row, flush=True)
    write_json(out, provenance() | {"budget": budget, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
