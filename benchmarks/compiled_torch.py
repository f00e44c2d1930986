"""Time decode steps of compiled PyTorch with static caches, as a careful user runs it.

    python benchmarks/compiled_torch.py --shape qwen3-8b --batch 1,8,32 --out torch.json
    jaxkv bench decode --shape qwen3-8b --batch 1,8,32 --context 3200 --out ours.json

Peers, greedy, with random weights of the same shape:

* `transformers`: `StaticCache`, and forward pass and choice of the token under
  `torch.compile(mode="reduce-overhead")`, which records CUDA graphs;
* `sdpa`, `grouped`, `matmul`: a decoder written for this benchmark (`plain_torch.py`),
  with fused projections and a static cache, whose layers are compiled, and whose whole
  step is one CUDA graph. They differ in attention;
* `tuned`: `grouped` with `coordinate_descent_tuning`, as gpt-fast has it, with which
  products of one row are Triton's;
* `eager`: `grouped` as one CUDA graph of what is not compiled.

All read a cache of `--context` slots whole, as a step of `jaxkv bench decode` does. A
row is on the disk as soon as it is measured, or says why there is none. The script is a
process of its own, because JAX takes the device's memory for itself; with `--lock`
several compile side by side, and are timed one after the other.
"""

import dataclasses
import functools
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # of each of many processes

import jax
import torch
import transformers
import typer
from plain_torch import ATTENTIONS, Plain
from turns import Lock, alone

from jaxkv.cli.bench_flags import batches_of
from jaxkv.models.config import Config
from jaxkv.models.hf import export as hf_export
from jaxkv.models.public_shapes import SHAPES
from jaxkv.provenance import provenance, write_json

PEERS = "transformers", *ATTENTIONS, "tuned", "eager"
WARM = 4  # steps: compile, record and replay


@dataclasses.dataclass(frozen=True)
class How:
    """What all runs share.

    Attributes:
      dtype: of weights and cache.
      device: of torch.
      context: slots of the cache; the new tokens included.
      steps: of one timed call.
      repeats: timed calls.
      lock: see `turns.alone`.
    """

    dtype: torch.dtype
    device: torch.device
    context: int
    steps: int
    repeats: int
    lock: Path | None

    @property
    def on_gpu(self) -> bool:
        """Whether there are graphs to record."""
        return self.device.type == "cuda"

    @property
    def begin(self) -> int:
        """Where the first token stands, so that the last one fills the cache."""
        return self.context - WARM - self.steps * (self.repeats + 1)

    def wait(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()


Step = Callable[[], None]  # decodes one token of each row


def graphed(step: Step, how: How) -> Step:
    """Return a step as one CUDA graph, which warming up has compiled."""
    if not how.on_gpu:
        return step
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM - 1):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def plain(peer: str, model: Plain, batch: int, how: How) -> Step:
    """Return a compiled step of the decoder of this benchmark."""
    options = {"coordinate_descent_tuning": True} if peer == "tuned" else None
    build = functools.partial(
        torch.compile, fullgraph=True, dynamic=False, options=options
    )
    step = model.step(
        ATTENTIONS.get(peer, ATTENTIONS["grouped"]),
        batch=batch,
        context=how.context,
        begin=how.begin,
        build=build if peer != "eager" else lambda function: function,
    )
    # A search by the clock must have the device to itself.
    with alone(how.lock if options else None):
        step()
        return graphed(step, how)


def of_transformers(model: Any, batch: int, how: How) -> Step:
    """Return a compiled step of transformers, whose cache is as good as full."""
    c = model.config
    cache = transformers.StaticCache(config=c, max_cache_len=how.context)
    cache.early_initialization(
        *(batch, c.num_key_value_heads, c.head_dim), how.dtype, how.device
    )
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(how.begin)

    def forward(token: torch.Tensor) -> torch.Tensor:
        found = model(input_ids=token, past_key_values=cache, use_cache=True)
        return found.logits[:, -1:].argmax(-1)

    mode = "reduce-overhead" if how.on_gpu else "default"
    compiled = torch.compile(forward, mode=mode, fullgraph=True, dynamic=False)
    token = torch.zeros(batch, 1, dtype=torch.long, device=how.device)

    def step() -> None:
        # A replayed graph writes its result over the last one.
        token.copy_(compiled(token))

    for _ in range(WARM):
        step()
    return step


def time_steps(step: Step, how: How) -> list[float]:
    """Return milliseconds a step of each timed call; the first call is left out."""
    calls = []
    with alone(how.lock):
        for _ in range(how.repeats + 1):
            how.wait()
            begin = time.perf_counter()
            for _ in range(how.steps):
                step()
            how.wait()
            calls.append(1e3 * (time.perf_counter() - begin) / how.steps)
    return calls[1:]


def weights_of(family: str, config: Config, how: How) -> Any:
    """Return a network with random weights, of transformers or of this benchmark."""
    if family == "plain":
        return Plain(config, how.dtype, how.device)
    name = str(how.dtype).removeprefix("torch.")
    settings = transformers.Qwen3Config(**hf_export.qwen3_config(config, name))
    with how.device:
        return transformers.AutoModelForCausalLM.from_config(
            settings, dtype=how.dtype, attn_implementation="sdpa"
        ).eval()


def measure(peer: str, model: Any, batch: int, how: How) -> dict[str, Any]:
    """Return one row, or why there is none."""
    row: dict[str, Any] = {"peer": peer, "batch": batch}
    begin = time.perf_counter()
    skips = torch._dynamo.utils.counters["inductor"]
    step: Callable[[], None] | None = None
    try:
        if peer == "transformers":
            step = of_transformers(model, batch, how)
        else:
            step = plain(peer, model, batch, how)
        row["compile_seconds"] = time.perf_counter() - begin
        calls = time_steps(step, how)
        row |= {"calls_ms": calls, "step_ms": statistics.median(calls)}
        row |= {"cudagraph_skips": skips["cudagraph_skips"]}
    except Exception as error:  # other rows go on
        row["why"] = f"{type(error).__name__}: {str(error)[:600]}"
    step = None
    torch.compiler.reset()
    gc.collect()
    if how.on_gpu:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return row | {"seconds_in_all": time.perf_counter() - begin}


def family_of(peer: str) -> str:
    """Return whose weights a peer takes."""
    return "transformers" if peer == "transformers" else "plain"


def versions(how: How) -> dict[str, Any]:
    """Return what measured."""
    found = provenance() | {"transformers": transformers.__version__}
    found |= {"torch": torch.__version__}
    if how.on_gpu:  # JAX was told to see none of it
        found["device"] = torch.cuda.get_device_name()
        found |= {"platform": "gpu", "driver": f"CUDA {torch.version.cuda}"}
    return found


def main(
    out: Annotated[Path, typer.Option(help="JSON.")],
    shape: Annotated[str, typer.Option(help="A dense Qwen3.")] = "qwen3-1.7b",
    batch: Annotated[str, typer.Option(help="Rows, with commas.")] = "1,8,32",
    context: Annotated[int, typer.Option(min=8, help="Slots.")] = 3200,
    steps: Annotated[int, typer.Option(min=1, help="Of one timed call.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls.")] = 5,
    peers: Annotated[str, typer.Option(help="With commas.")] = ",".join(PEERS),
    layers: Annotated[int | None, typer.Option(help="Fewer, to try it out.")] = None,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu is for trying it out.")] = "cuda",
    lock: Lock = None,
) -> None:
    """Time decode steps of compiled PyTorch with static caches."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"compiled_torch: torch {torch.__version__} finds no CUDA device."
        )
    kind = torch.device(device)
    how = How(getattr(torch, dtype), kind, context, steps, repeats, lock)
    if how.begin < 1:
        raise SystemExit(
            f"compiled_torch: {context - how.begin} tokens are decoded, and need a "
            f"--context of more, got {context}; time fewer --steps."
        )
    config = SHAPES[shape]
    if layers:
        config = dataclasses.replace(config, num_layers=layers)
    jax.config.update("jax_platforms", "cpu")  # the device's memory is torch's
    torch.manual_seed(0)
    result: dict[str, Any] = {"benchmark": "compiled_torch", "model": shape}
    result |= {"dtype": dtype, "context": context, "steps": steps}
    result |= {"layers": config.num_layers, **versions(how), "rows": []}
    names = peers.split(",")
    with torch.no_grad():
        for family in dict.fromkeys(map(family_of, names)):
            model = weights_of(family, config, how)
            for rows in batches_of(batch, "--batch"):
                for peer in names:
                    if family_of(peer) != family:
                        continue
                    row = measure(peer, model, rows, how)
                    result["rows"].append(row)
                    write_json(out, result)
                    step = row.get("step_ms")
                    said = f"{step:.3f} ms" if step else row["why"]
                    spent = f"{row['seconds_in_all']:.0f} s"
                    print(f"{peer}, batch {rows}: {said} ({spent})", flush=True)
            del model


if __name__ == "__main__":
    typer.run(main)
