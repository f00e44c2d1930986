"""Sample whole generations of transformers with its full cache, on a GPU.

    python benchmarks/throughput_transformers.py --shape qwen3-1.7b --out theirs.json
    jaxkv bench throughput --shape qwen3-1.7b --transformers theirs.json ...

Random weights of the same shape, transformers' default attention and cache (`sdpa` and
`DynamicCache`, filled with random keys and values), single-token forward passes and
argmax. Steps are sampled as by `jaxkv bench throughput`, in fewer ranges. A process of
its own, because JAX takes the device's memory for itself.
"""

import gc
import statistics
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import torch
import transformers
import typer

from jaxkv.bench import throughput
from jaxkv.bench.throughput import Work
from jaxkv.bench.throughput_report import BENCHMARK, TRANSFORMERS
from jaxkv.cli.bench_flags import batches_of
from jaxkv.models.config import Config
from jaxkv.models.hf import export as hf_export
from jaxkv.models.public_shapes import SHAPES
from jaxkv.provenance import provenance, write_json


def make_model(config: Config, dtype: str, attention: str, device: str) -> Any:
    """Return a causal language model of this shape with random weights."""
    settings = hf_export.qwen3_config(config, dtype)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.Qwen3Config(**settings),
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
        )
    return model.eval()


def make_cache(model: Any, batch: int, length: int) -> transformers.DynamicCache:
    """Return a cache that holds `length` random tokens of each row."""
    config, like = model.config, next(model.parameters())
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    cache = transformers.DynamicCache()
    for layer in range(config.num_hidden_layers):
        keys, values = (
            torch.randn(shape, dtype=like.dtype, device=like.device) for _ in range(2)
        )
        cache.update(keys, values, layer)
    return cache


def run_steps(model: Any, cache: Any, batch: int, steps: int) -> float:
    """Decode greedily and return seconds per step."""
    device = next(model.parameters()).device
    token = torch.zeros((batch, 1), dtype=torch.long, device=device)
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(steps):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    synchronize(device)
    return (time.perf_counter() - begin) / steps


def time_prefill(model: Any, rows: int, work: Work) -> float:
    """Return the median seconds until the first token."""
    device = next(model.parameters()).device
    tokens = torch.zeros((rows, work.prompt), dtype=torch.long, device=device)
    seconds = []
    for _ in range(work.repeats + 1):
        synchronize(device)
        begin = time.perf_counter()
        model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_batch(model: Any, batch: int, work: Work) -> dict[str, Any]:
    """Return a record as `jaxkv bench throughput` has them, for one batch size."""
    row = {"method": TRANSFORMERS, "batch": batch}
    on_gpu = next(model.parameters()).device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    # At the end first: what does not fit there does not fit.
    length = work.prompt + work.new - 1
    cache = make_cache(model, batch, length)
    state_bytes = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    run_steps(model, cache, batch, 1)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    ranges, records = throughput.split(work, work.prompt + work.new), []
    for part in ranges:
        del cache
        cache = make_cache(model, batch, part.filled)
        run_steps(model, cache, batch, 2)
        # Goes on from there, so two tokens later than the middle.
        ms = 1e3 * run_steps(model, cache, batch, work.steps)
        records.append(vars(part) | {"step_ms": ms})
    del cache
    rows = min(batch, work.prefill_rows)
    prefill = time_prefill(model, rows, work) * batch / rows
    decode = throughput.whole_seconds(ranges, [x["step_ms"] for x in records])
    return row | {
        "fits": True,
        "tokens_per_second": batch * work.new / (prefill + decode),
        "seconds": prefill + decode,
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "ranges": records,
        "state_bytes": state_bytes,
        "peak_bytes": peak,
    }


def try_batch(model: Any, batch: int, work: Work) -> dict[str, Any]:
    """Return the record of `time_batch`, or one that says that it does not fit."""
    try:
        return time_batch(model, batch, work)
    except torch.cuda.OutOfMemoryError as error:
        why = str(error).splitlines()[0][:200]
        return {"method": TRANSFORMERS, "batch": batch, "fits": False, "why": why}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def most_rows(config: Config, work: Work, dtype: str) -> int:
    """Return how many rows fit by their shapes, beside a copy of one layer's cache."""
    free, _ = torch.cuda.mem_get_info()
    token = 2 * config.num_kv_heads * config.head_dim * getattr(torch, dtype).itemsize
    layers = config.num_layers + 1
    return int(0.97 * free) // (token * layers * (work.prompt + work.new))


def main(
    out: Annotated[Path, typer.Option(help="JSON, for --transformers.")],
    shape: Annotated[str, typer.Option(help="A dense Qwen3.")] = "qwen3-1.7b",
    prompt: Annotated[int, typer.Option(min=1)] = 512,
    new: Annotated[int, typer.Option(min=2)] = 16_000,
    batches: Annotated[
        str, typer.Option(help="Rows, with commas; auto: 1, 8, 32, ... that fit.")
    ] = "auto",
    ranges: Annotated[int, typer.Option(min=1, help="Lengths that are timed.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each.")] = 16,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    attention: Annotated[Literal["sdpa", "eager"], typer.Option()] = "sdpa",
    device: Annotated[str, typer.Option(help="cpu is for trying it out.")] = "cuda",
    seconds: Annotated[float, typer.Option(help="Start nothing new after.")] = 100.0,
) -> None:
    """Sample whole generations of transformers with its full cache."""
    begin = time.perf_counter()
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"throughput_transformers: torch {torch.__version__} finds no CUDA device."
        )
    jax.config.update("jax_platforms", "cpu")  # the device's memory is torch's
    torch.manual_seed(0)
    work = Work(prompt=prompt, new=new, ranges=ranges, steps=steps)
    config = SHAPES[shape]
    model = make_model(config, dtype, attention, device)
    automatic = batches == "auto"
    if automatic:
        wanted = throughput.automatic_batches(most_rows(config, work, dtype))
    else:
        wanted = batches_of(batches, "--batches")
    result: dict[str, Any] = {"benchmark": BENCHMARK, "model": shape, "dtype": dtype}
    result |= {**vars(work), "attention": attention, "cache": "DynamicCache"}
    result |= {**provenance(), "rows": []}
    if device == "cuda":
        # JAX was told to see none of it.
        result["device"] = torch.cuda.get_device_name()
        result |= {"platform": "gpu", "driver": f"CUDA {torch.version.cuda}"}
    wanted = sorted(set(wanted))
    with torch.inference_mode():
        while wanted and time.perf_counter() - begin < seconds:
            batch = wanted.pop()
            row = try_batch(model, batch, work)
            result["rows"].append(row)
            smaller = batch * 7 // 8
            if automatic and not row["fits"] and wanted and smaller > wanted[-1]:
                wanted.append(smaller)  # near the largest that does fit
            speed = row.get("tokens_per_second")
            print(f"batch {batch}: {row.get('why') or f'{speed:.1f} tokens/s'}")
            write_json(out, result)
    if wanted:
        print(f"time was up before batches {wanted}")


if __name__ == "__main__":
    typer.run(main)
