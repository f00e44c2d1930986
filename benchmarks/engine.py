"""An engine against fixed batches, on requests of which few are long.

    python benchmarks/engine.py OUT.json --shape qwen3-1.7b  # on a GPU
    python benchmarks/engine.py --model needle --requests 12 --rows 3 --max-prompt 128 \
      --max-new-tokens 48 --budget 64 --rates 0.8  # a small one

`engine`: all requests are there at the beginning. `batches`: as many rows in the order
of arrival, each batch until its longest output ends. `rates`: they arrive at random
(Poisson), at shares of the rate that the engine has shown in its steady part; time from
when they were due to the first token, and between tokens. `--full` keeps all of the
cache. Lengths are drawn on a logarithmic scale, with a fixed seed. Only what a request
asked for counts as a token of it. The steady part is from the first blocks until no
request waits.

OUT.json is written every few seconds: a run that is stopped leaves what it has, and one
that comes to `--seconds` ends by itself. What was not finished says so.
"""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

import jaxkv
from jaxkv import registry
from jaxkv.language_model import LanguageModel, load
from jaxkv.models.decoder import Decoder, random_parameters
from jaxkv.models.public_shapes import SHAPES
from jaxkv.options import described
from jaxkv.provenance import provenance, write_json
from jaxkv.runtime.seeds import key_of

_EVERY = 5.0  # seconds between two writings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A request of the workload."""

    prompt: np.ndarray
    new: int


def workload(
    number: int, prompt: tuple[int, int], new: tuple[int, int], vocabulary: int
) -> list[Asked]:
    """Draw requests: lengths on a logarithmic scale, most outputs short, a few long."""
    rng = np.random.default_rng(0)

    def lengths(least: int, most: int, power: float) -> np.ndarray:
        share = rng.random(number) ** power
        return np.round(least * (most / least) ** share).astype(int)

    prompts, outputs = lengths(*prompt, 1.0), lengths(*new, 2.0)
    return [
        Asked(prompt=rng.integers(3, vocabulary, size).astype(np.int32), new=int(out))
        for size, out in zip(prompts, outputs, strict=True)
    ]


class Record:
    """What has been measured, on disk every few seconds.

    Attributes:
      content: of the file.
    """

    def __init__(self, path: Path | None, until: float, content: dict[str, Any]):
        """Write to a path, and be late from a second of the process's clock on."""
        self._path, self._until, self._written = path, until, 0.0
        self.content = content
        self.measured: dict[str, Any] = content.setdefault("measured", {})

    @property
    def left(self) -> float:
        """Return how many seconds are left."""
        return self._until - time.perf_counter()

    @property
    def due(self) -> bool:
        """Return whether the file is due."""
        return time.perf_counter() - self._written > _EVERY

    def note(self, name: str, found: dict[str, Any]) -> None:
        """Write what has been found of something."""
        self.measured[name] = found
        self._written = time.perf_counter()
        if self._path is not None:
            write_json(self._path, self.content)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile, in ms."""
    p50, p99 = np.percentile(seconds or [0.0], [50, 99])
    return {"p50_ms": 1e3 * float(p50), "p99_ms": 1e3 * float(p99)}


class Run:
    """An engine at work on requests that are due at given seconds."""

    def __init__(self, engine: jaxkv.Engine, asked: list[Asked], at: np.ndarray):
        self._engine, self._asked, self._at = engine, asked, at
        self._handles: list[Any] = []
        self._first: dict[Any, float] = {}
        self._last: dict[Any, float] = {}
        self._between: list[float] = []
        self._waits: list[float] = []
        self._tokens = 0
        self._begin, self._before = time.perf_counter(), engine.counts
        self._edges: list[tuple[float, int, Any]] = []

    def go(self, record: Record, name: str) -> dict[str, Any]:
        """Serve all requests, or as many as there is time for."""
        engine, asked, at = self._engine, self._asked, self._at
        while len(self._handles) < len(asked) or not engine.idle:
            now = time.perf_counter() - self._begin
            while len(self._handles) < len(asked) and at[len(self._handles)] <= now:
                one = asked[len(self._handles)]
                self._handles.append(
                    engine.submit(one.prompt, max_new_tokens=one.new, stop_ids=[])
                )
            if engine.idle:
                time.sleep(max(at[len(self._handles)] - now, 0))
            self._step()
            if record.due:
                record.note(name, self.found(finished=False))
            if record.left < 0:
                found = self.found(finished=False)
                for handle in self._handles:
                    engine.cancel(handle)
                list(engine.run())
                return found
        return self.found(finished=True)

    def _step(self) -> None:
        engine = self._engine
        for event in engine.step():
            now = time.perf_counter()
            count = len(event.tokens)
            self._tokens += count
            if count and event.handle in self._last:
                # They come in blocks; each is charged its share of the wait.
                wait = now - self._last[event.handle]
                self._waits.append(wait)
                self._between += [wait / count] * count
            elif count:
                due = self._begin + self._at[event.handle.number - self._number]
                self._first[event.handle] = now - due
            if count:
                self._last[event.handle] = now
        # The steady part: from the first blocks until no request waits.
        begun, over = engine.counts.blocks > self._before.blocks, engine.waiting == 0
        if not self._at.any() and [begun, over and begun].count(True) > len(
            self._edges
        ):
            self._edges.append((time.perf_counter(), self._tokens, engine.counts))

    @property
    def _number(self) -> int:
        return self._handles[0].number

    def found(self, *, finished: bool) -> dict[str, Any]:
        """Return what has come of the requests so far."""
        ends = [h.result for h in self._handles if h.result is not None]
        failed = [r.error for r in ends if r.finish_reason == "error"]
        if failed:
            raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
        begin = self._begin, 0, self._before
        now = time.perf_counter(), self._tokens, self._engine.counts
        steady = None
        if len(self._edges) == 2:
            steady = self._part(*self._edges)
        return {
            "finished": finished,
            "ended": len(ends),
            **self._part(begin, now),
            "requests_per_s": len(ends) / (now[0] - self._begin),
            "steady": steady,
            "first_token": percentiles(list(self._first.values())),
            "between_tokens": percentiles(self._between),
            "between_blocks": percentiles(self._waits),
        }

    def _part(self, begin: Any, end: Any) -> dict[str, Any]:
        seconds, rows = end[0] - begin[0], self._engine.rows
        after = dataclasses.asdict(end[2])
        done = {k: v - getattr(begin[2], k) for k, v in after.items()}
        return {
            "seconds": seconds,
            "tokens_per_s": (end[1] - begin[1]) / seconds,
            "rows_in_use": done["rows"] / max(done["blocks"] * rows, 1),
            "row_steps_used": done["tokens"] / max(done["steps"] * rows, 1),
            "host_share": done["gap"] / seconds,
            "late_share": done["late"] / max(done["blocks"], 1),
            "counts": done,
        }


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
    for first, steps in list(zip(starts, longest, strict=True))[:most]:
        if done and record.left < steps * done[-1]["seconds"] / done[-1]["steps"]:
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
        done.append(dict(seconds=seconds, tokens=tokens, steps=steps))
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


def measure(
    lm: LanguageModel,
    asked: list[Asked],
    what: list[str],
    rates: list[float],
    batches: int | None,
    how: dict[str, Any],
    options: dict[str, Any],
    record: Record,
) -> None:
    """Measure what is asked for: at once, at each rate, and in batches."""
    if {"engine", "rates"} & {*what}:
        engine = jaxkv.Engine(lm, **how, **options)
        begin = time.perf_counter()
        engine.warm_up()
        record.note("warm_up", {"seconds": time.perf_counter() - begin})
        found = Run(engine, asked, np.zeros(len(asked))).go(record, "engine")
        record.note("engine", found)
        each = sum(one.new for one in asked) / len(asked)
        highest = (found["steady"] or found)["tokens_per_s"] / each
        for share in rates if "rates" in what else []:
            gaps = np.random.default_rng(1).exponential(size=len(asked))
            at, name = np.cumsum(gaps) / (share * highest), f"rate {share}"
            found = Run(engine, asked, at).go(record, name)
            record.note(name, {"asked_per_s": share * highest, **found})
        del engine
    if "batches" in what:
        in_batches(lm, asked, how["rows"], batches, record, **options)


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
        str, typer.Option(help="engine, batches, rates.")
    ] = "engine,batches,rates",
    rates: Annotated[str, typer.Option(help="Shares.")] = "0.5,0.8,0.95",
    batches: Annotated[int | None, typer.Option(min=1, help="The first ones.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Keep all of it.")] = False,
    seconds: Annotated[float, typer.Option(help="Of the process.")] = 1e9,
) -> None:
    """Measure, print the result, and write it where asked."""
    until = time.perf_counter() + seconds
    lm = model(name, shape)
    asked = workload(
        requests,
        (min(min_prompt, max_prompt), max_prompt),
        (min(min_new_tokens, max_new_tokens), max_new_tokens),
        lm.config.vocab_size,
    )
    sizes = dict(rows=rows, max_prompt=max_prompt, max_new_tokens=max_new_tokens)
    how = sizes | dict(block=block, stall=stall, together=together)
    options: dict[str, Any] = {
        "budget": budget,
        "prefill": registry.parse(prefill, registry.PREFILL, flag="--prefill"),
        "decode": registry.parse(decode, registry.DECODE, flag="--decode"),
    }
    options = {} if full else options
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
            "options": described(options),
            "provenance": provenance(),
        },
    )
    shares = [float(share) for share in rates.split(",")]
    measure(lm, asked, what.split(","), shares, batches, how, options, record)
    print(record.content)


if __name__ == "__main__":
    typer.run(main)
