"""An engine against fixed batches, on requests of which few are long.

    python benchmarks/engine.py OUT.json --shape qwen3-1.7b  # on a GPU
    python benchmarks/engine.py --model needle --requests 12 --rows 3 --max-prompt 128 \
      --max-new-tokens 48 --budget 64 --rates 0.8  # a small one

`engine`: all requests are there at the beginning. `batches`: as many rows in the order
of arrival, each batch until its longest output ends. `rates`: they arrive at random
(Poisson), at shares of the rate that the engine has shown; time to the first token, and
between tokens. `--full` keeps all of the cache. Lengths are drawn on a logarithmic
scale, with a fixed seed. Only what a request asked for counts as a token of it.
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


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile, in ms."""
    p50, p99 = np.percentile(seconds or [0.0], [50, 99])
    return {"p50_ms": 1e3 * p50, "p99_ms": 1e3 * p99}


def serve(engine: jaxkv.Engine, asked: list[Asked], at: np.ndarray) -> dict[str, Any]:
    """Submit requests at their seconds, and return what came of them."""
    before, begin = engine.counts, time.perf_counter()
    handles: list[Any] = []
    last: dict[Any, float] = {}
    between: list[float] = []
    while len(handles) < len(asked) or not engine.idle:
        now = time.perf_counter() - begin
        while len(handles) < len(asked) and at[len(handles)] <= now:
            one = asked[len(handles)]
            handles.append(
                engine.submit(one.prompt, max_new_tokens=one.new, stop_ids=[])
            )
        if engine.idle:
            time.sleep(max(at[len(handles)] - now, 0))
        for event in engine.step():
            now = time.perf_counter()
            if event.tokens:
                if event.handle in last:
                    # They come in blocks; each is charged its share of the wait.
                    share = (now - last[event.handle]) / len(event.tokens)
                    between += [share] * len(event.tokens)
                last[event.handle] = now
    seconds = time.perf_counter() - begin
    results = [handle.result for handle in handles]
    failed = [r.error for r in results if r.finish_reason == "error"]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
    after = dataclasses.asdict(engine.counts)
    done = {k: v - getattr(before, k) for k, v in after.items()}
    return {
        "seconds": seconds,
        "tokens_per_s": sum(len(r.tokens) for r in results) / seconds,
        "requests_per_s": len(results) / seconds,
        "rows_in_use": done["rows"] / max(done["blocks"] * engine.rows, 1),
        "row_steps_used": done["tokens"] / max(done["steps"] * engine.rows, 1),
        "host_share": done["gap"] / seconds,
        "late_share": done["late"] / max(done["blocks"], 1),
        "first_token": percentiles([r.first_token for r in results]),
        "between_tokens": percentiles(between),
        "counts": done,
    }


def in_batches(
    lm: LanguageModel, asked: list[Asked], rows: int, **options: Any
) -> dict[str, Any]:
    """Generate in batches in the order of arrival; compiling is not counted."""
    begin, compiling = time.perf_counter(), 0.0
    for first in range(0, len(asked), rows):
        batch = asked[first : first + rows]
        batch += batch[:1] * (rows - len(batch))  # no other shape
        out = jaxkv.generate(
            *(lm, [one.prompt for one in batch]),
            max_new_tokens=max(one.new for one in batch),
            stop_ids=[],
            **options,
        )
        compiling += out.stats.compile_seconds
    seconds = time.perf_counter() - begin - compiling
    return {
        "seconds": seconds,
        "compile_seconds": compiling,
        "tokens_per_s": sum(one.new for one in asked) / seconds,
    }


def measured(
    lm: LanguageModel,
    asked: list[Asked],
    what: list[str],
    rates: list[float],
    how: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Measure what is asked for: at once, in batches, and at each rate."""
    found: dict[str, Any] = {}
    if "batches" in what:
        found["batches"] = in_batches(lm, asked, how["rows"], **options)
    if not {"engine", "rates"} & {*what}:
        return found
    engine = jaxkv.Engine(lm, **how, **options)
    engine.warm_up()
    found["engine"] = serve(engine, asked, np.zeros(len(asked)))
    found["rates"] = {}
    for share in rates if "rates" in what else []:
        gaps = np.random.default_rng(1).exponential(size=len(asked))
        at = np.cumsum(gaps) / (share * found["engine"]["requests_per_s"])
        found["rates"][f"{share}"] = serve(engine, asked, at)
    return found


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
    block: Annotated[int, typer.Option(min=1, help="Decode steps.")] = 16,
    stall: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 4096,
    what: Annotated[
        str, typer.Option(help="engine, batches, rates.")
    ] = "engine,batches,rates",
    rates: Annotated[str, typer.Option(help="Shares.")] = "0.5,0.8,0.95",
    full: Annotated[bool, typer.Option("--full", help="Keep all of it.")] = False,
) -> None:
    """Measure, print the result, and write it where asked."""
    lm = model(name, shape)
    asked = workload(
        requests,
        (min(min_prompt, max_prompt), max_prompt),
        (min(min_new_tokens, max_new_tokens), max_new_tokens),
        lm.config.vocab_size,
    )
    how = dict(
        rows=rows,
        max_prompt=max_prompt,
        max_new_tokens=max_new_tokens,
        block=block,
        stall=stall,
    )
    options: dict[str, Any] = {
        "budget": budget,
        "prefill": registry.parse(prefill, registry.PREFILL, flag="--prefill"),
        "decode": registry.parse(decode, registry.DECODE, flag="--decode"),
    }
    options = {} if full else options
    shares = [float(share) for share in rates.split(",")]
    result = {
        "benchmark": "engine",
        "model": lm.name,
        "requests": requests,
        "prompt_tokens": sum(len(one.prompt) for one in asked),
        "new_tokens": sum(one.new for one in asked),
        "engine": how,
        "options": described(options),
        "measured": measured(lm, asked, what.split(","), shares, how, options),
        "provenance": provenance(),
    }
    print(result)
    if out is not None:
        write_json(out, result)


if __name__ == "__main__":
    typer.run(main)
