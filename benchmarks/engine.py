"""An engine against fixed batches, on requests of which few are long.

    python benchmarks/engine.py OUT.json --shape qwen3-1.7b  # on a GPU
    python benchmarks/engine.py --model needle --requests 12 --rows 3 --max-prompt 256 \
      --max-new-tokens 48 --budget 64 --rates 0.8  # a small one

`engine`: all requests are there at the beginning. `batches`: as many rows in the order
of arrival, each batch until its longest output ends. `rates`: other requests, of
outputs that are less long, arrive at random (Poisson), at shares of the rate that the
engine has shown for such requests in its steady part, from the first blocks until none
waits; time from when they were due to the first token, and between tokens. `full`: the
same as `rates` with two thirds of them, and all of the cache is kept.

Lengths are drawn on a logarithmic scale, with a fixed seed, those of prompts from the
powers of two, for which few programs are compiled. Only what a request asked for counts
as a token of it. OUT.json is written every few seconds: a run that is stopped leaves
what it has, and one that comes to `--seconds` ends by itself. What was not finished
says so.
"""

import gc
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from engine_at_work import Asked, Record, Run, workload

import jaxkv
from jaxkv import registry
from jaxkv.language_model import LanguageModel, load
from jaxkv.models.decoder import Decoder, random_parameters
from jaxkv.models.public_shapes import SHAPES
from jaxkv.options import described
from jaxkv.provenance import provenance
from jaxkv.runtime.seeds import key_of
from jaxkv.text.planning import bucket


def in_batches(
    lm: LanguageModel,
    asked: list[Asked],
    rows: int,
    most: int | None,
    record: Record,
    **options: Any,
) -> None:
    """Generate in batches in the order of arrival; compiling is not counted.

    Args:
      lm: the model.
      asked: the requests.
      rows: of a batch.
      most: batches, or None; of the others the time is taken to be that of the steps
        that their longest outputs need.
      record: where to note it.
      **options: of `generate`.
    """
    starts = range(0, len(asked), rows)
    longest = [max(one.new for one in asked[first : first + rows]) for first in starts]
    done: list[dict[str, Any]] = []
    compiled = 0.0
    # The first ones of those that share a program.
    alike = [n for n, new in enumerate(longest) if bucket(new) == bucket(longest[0])]
    for number in alike[:most]:
        first, steps = starts[number], longest[number]
        if record.left < (done[-1]["seconds"] if done else 0):
            break
        batch = asked[first : first + rows]
        tokens = sum(one.new for one in batch)
        batch += batch[:1] * (rows - len(batch))  # no other shape
        begin = time.perf_counter()
        out = jaxkv.generate(
            *(lm, [one.prompt for one in batch]),
            max_new_tokens=steps,
            stop_ids=[],
            **options,
        )
        compiling = out.stats.compile_seconds
        seconds = time.perf_counter() - begin - compiling
        compiled += compiling
        done.append(dict(number=number, seconds=seconds, tokens=tokens, steps=steps))
        spent, taken = (sum(one[k] for one in done) for k in ("seconds", "steps"))
        record.note(
            "batches",
            {
                "finished": len(done) == len(longest),
                "seconds": spent,
                "compile_seconds": compiled,
                "tokens_per_s": sum(one["tokens"] for one in done) / spent,
                "tokens_per_s_of_all": sum(one.new for one in asked)
                / (spent / taken * sum(longest)),
                "steps_of_all": sum(longest),
                "each": done,
            },
        )


class Bench:
    """What is measured, of one model and one workload.

    Attributes:
      lm: the model.
      asked: the requests.
      others: those that arrive at rates.
      how: sizes of the engine.
      record: where results are noted.
    """

    def __init__(
        self,
        lm: LanguageModel,
        asked: list[Asked],
        others: list[Asked],
        how: dict[str, Any],
        record: Record,
    ):
        self.lm, self.asked, self.others = lm, asked, others
        self.how, self.record = how, record

    def engine(self, name: str, **options: Any) -> jaxkv.Engine:
        """Make an engine, and compile what these requests need."""
        begin = time.perf_counter()
        engine = jaxkv.Engine(self.lm, **self.how, **options)
        lengths = {len(one.prompt) for one in self.asked + self.others}
        engine.warm_up(prompts=sorted(lengths), draws=False)
        self.record.note(name, {"seconds": time.perf_counter() - begin})
        return engine

    def at_once(
        self, engine: jaxkv.Engine, asked: list[Asked], name: str
    ) -> dict[str, Any]:
        """Serve requests that are all there at the beginning."""
        if self.record.left < 0:
            return {"tokens_per_s": 0.0, "steady": None}
        found = Run(engine, asked, np.zeros(len(asked))).go(self.record, name)
        self.record.note(name, found)
        return found

    def rates(self, engine: jaxkv.Engine, shares: list[float], name: str) -> None:
        """Serve requests that arrive at shares of the highest rate."""
        asked = self.others
        found = self.at_once(engine, asked, f"{name}: at once")
        each = sum(one.new for one in asked) / len(asked)
        highest = (found["steady"] or found)["tokens_per_s"] / each
        for share in shares:
            if self.record.left < 0:
                return
            gaps = np.random.default_rng(1).exponential(size=len(asked))
            at, said = np.cumsum(gaps) / (share * highest), f"{name}: {share}"
            found = Run(engine, asked, at).go(self.record, said)
            self.record.note(said, {"asked_per_s": share * highest, **found})


def measure(
    bench: Bench,
    what: list[str],
    rates: list[float],
    batches: int | None,
    options: dict[str, Any],
) -> None:
    """Measure what is asked for, in the order of its worth."""
    if {"engine", "rates"} & {*what}:
        engine = bench.engine("warm-up", **options)
        if "engine" in what:
            bench.at_once(engine, bench.asked, "engine")
    if "batches" in what and bench.record.left > 0:
        rows = bench.how["rows"]
        in_batches(bench.lm, bench.asked, rows, batches, bench.record, **options)
    if "rates" in what:
        bench.rates(engine, rates, "rates")
    if {"engine", "rates"} & {*what}:
        del engine
        gc.collect()  # its rows, so that others fit
    if "full" in what and bench.record.left > 0:
        most = max(one.new for one in bench.others)
        bench.how |= {"max_new_tokens": most}
        bench.asked, bench.others = [], bench.others[: len(bench.others) * 2 // 3]
        bench.rates(bench.engine("full: warm-up"), rates, "full")


def model(name: str, shape: str | None) -> LanguageModel:
    """Load a checkpoint, or draw weights of a public shape."""
    if shape is None:
        return load(name)
    config = SHAPES[shape]
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return LanguageModel(
        name=shape,
        folder=Path(),
        network=Decoder(config),
        params=random_parameters(config, key_of(0), dtype),
        tokenizer=None,
        stop_ids=(),
    )


def main(
    out: Annotated[Path | None, typer.Argument(help="JSON; default: none.")] = None,
    name: Annotated[str, typer.Option("--model", help="As jaxkv.load.")] = "needle",
    shape: Annotated[str | None, typer.Option(help="Random weights of it.")] = None,
    requests: Annotated[int, typer.Option(min=1)] = 512,
    rows: Annotated[int, typer.Option(min=1)] = 64,
    min_prompt: Annotated[int, typer.Option(min=1)] = 128,
    max_prompt: Annotated[int, typer.Option(min=1)] = 4096,
    min_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 8192,
    budget: Annotated[int, typer.Option(min=1)] = 3200,
    prefill: Annotated[str, typer.Option(help="Of the prompt.")] = "snapkv",
    decode: Annotated[str, typer.Option(help="Of the output.")] = "longflow",
    block: Annotated[int, typer.Option(min=1, help="Decode steps.")] = 8,
    stall: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 4096,
    together: Annotated[int, typer.Option(min=1, help="Prompts read in one.")] = 4,
    what: Annotated[
        str, typer.Option(help="engine, batches, rates, full.")
    ] = "engine,batches,rates,full",
    rates: Annotated[str, typer.Option(help="Shares.")] = "0.5,0.8,0.95",
    batches: Annotated[int | None, typer.Option(min=1, help="The first ones.")] = None,
    rate_requests: Annotated[int, typer.Option(min=1, help="At each rate.")] = 192,
    rate_new_tokens: Annotated[int, typer.Option(min=1, help="Of them.")] = 1024,
    seconds: Annotated[float, typer.Option(help="Of the process.")] = 1e9,
) -> None:
    """Measure, print the result, and write it where asked."""
    begin = time.perf_counter()
    until = begin + seconds
    lm = model(name, shape)
    prompts = min(min_prompt, max_prompt), max_prompt

    def drawn(number: int, new: int) -> list[Asked]:
        news = min(min_new_tokens, new), new
        return workload(number, prompts, news, lm.config.vocab_size)

    asked = drawn(requests, max_new_tokens)
    others = drawn(rate_requests, min(rate_new_tokens, max_new_tokens))
    sizes = dict(rows=rows, max_prompt=max_prompt, max_new_tokens=max_new_tokens)
    how = sizes | dict(block=block, stall=stall, together=together)
    options: dict[str, Any] = {
        "budget": budget,
        "prefill": registry.parse(prefill, registry.PREFILL, flag="--prefill"),
        "decode": registry.parse(decode, registry.DECODE, flag="--decode"),
    }
    record = Record(
        out,
        until,
        {
            "benchmark": "engine",
            "model": lm.name,
            "requests": requests,
            "prompt_tokens": sum(len(one.prompt) for one in asked),
            "new_tokens": sum(one.new for one in asked),
            "engine": how,
            "rate_requests": rate_requests,
            "rate_new_tokens": sum(one.new for one in others),
            "options": described(options),
            "provenance": provenance(),
        },
    )

    def compiled(event: str, duration_secs: float, **_: Any) -> None:
        if "backend_compile" in event and duration_secs > 1:
            at = time.perf_counter() - begin
            print(f"{at:.1f} s: compiled in {duration_secs:.1f}", flush=True)

    jax.monitoring.register_event_duration_secs_listener(compiled)
    shares = [float(share) for share in rates.split(",")]
    bench = Bench(lm, asked, others, how, record)
    measure(bench, what.split(","), shares, batches, options)


if __name__ == "__main__":
    typer.run(main)
