"""Time decode steps of compiled PyTorch with static caches, as a careful user runs it.

    python benchmarks/compiled_torch.py --shape qwen3-8b --batch 1,8,32 --out torch.json
    jaxkv bench decode --shape qwen3-8b --batch 1,8,32 --context 3200 --out ours.json

Two peers, greedy, with random weights of the same shape:

* `transformers`: `StaticCache`, and the forward pass under
  `torch.compile(mode="reduce-overhead")`, which records CUDA graphs;
* `plain`: a decoder written for this benchmark, with fused projections, a static cache
  and one whole step under `torch.compile(mode="max-autotune")`.

Both read a cache of `--context` slots whole, as a step of `jaxkv bench decode` does.
The script is a process of its own, because JAX takes the device's memory for itself.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import torch
import transformers
import typer
from torch.nn import functional

from jaxkv.cli.bench_flags import batches_of
from jaxkv.models.config import Config
from jaxkv.models.hf import export as hf_export
from jaxkv.models.public_shapes import SHAPES
from jaxkv.provenance import provenance, write_json

Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # token, position -> token


@dataclasses.dataclass(frozen=True)
class How:
    """What all runs share.

    Attributes:
      dtype: of weights and cache.
      device: of torch.
      context: slots of the cache; the new tokens included.
      steps: of one timed call.
      repeats: timed calls.
    """

    dtype: torch.dtype
    device: torch.device
    context: int
    steps: int
    repeats: int

    @property
    def on_gpu(self) -> bool:
        """Whether there are graphs to record."""
        return self.device.type == "cuda"


class Plain(torch.nn.Module):
    """A dense Qwen3 whose step reads and writes one static cache."""

    def __init__(self, config: Config, batch: int, how: How):
        super().__init__()
        c, self.config = config, config
        made = dict(dtype=how.dtype, device=how.device)

        def matrix(*shape: int) -> torch.nn.Parameter:
            weight = torch.empty(shape, **made).normal_(std=0.02)
            return torch.nn.Parameter(weight, requires_grad=False)

        def ones(size: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.ones(size, **made), requires_grad=False)

        self.embedding = matrix(c.vocab_size, c.hidden_size)
        self.head = self.embedding if c.tied else matrix(c.vocab_size, c.hidden_size)
        self.final_norm = ones(c.hidden_size)
        self.layers = torch.nn.ModuleList()
        for _ in range(c.num_layers):
            layer = torch.nn.Module()
            layer.attention_norm = ones(c.hidden_size)
            layer.mlp_norm = ones(c.hidden_size)
            layer.q_norm, layer.k_norm = ones(c.head_dim), ones(c.head_dim)
            layer.qkv = matrix(c.qkv_size, c.hidden_size)
            layer.output = matrix(c.hidden_size, c.num_heads * c.head_dim)
            layer.gate_up = matrix(2 * c.intermediate_size, c.hidden_size)
            layer.down = matrix(c.hidden_size, c.intermediate_size)
            shape = batch, c.num_kv_heads, how.context, c.head_dim
            layer.register_buffer("keys", torch.randn(shape, **made))
            layer.register_buffer("values", torch.randn(shape, **made))
            self.layers.append(layer)
        exponents = torch.arange(0, c.head_dim, 2, device=how.device) / c.head_dim
        frequencies = 1.0 / c.rope.theta**exponents
        slots = torch.arange(how.context, device=how.device)
        angles = slots[:, None] * frequencies[None]
        self.register_buffer("cos", angles.cos().to(how.dtype))
        self.register_buffer("sin", angles.sin().to(how.dtype))
        self.register_buffer("slots", slots)

    def rotate(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Rotate heads, `[B, heads, 1, H]`, by one position."""
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos[position], self.sin[position]
        turned = first * cos - second * sin, second * cos + first * sin
        return torch.cat(turned, dim=-1)

    def forward(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Return the tokens behind `token`, `[B]`; all stand at `position`, `[1]`."""
        c = self.config
        norm = functional.rms_norm
        x = functional.embedding(token, self.embedding)
        seen = (self.slots <= position)[None, None, None]
        for layer in self.layers:
            y = norm(x, (c.hidden_size,), layer.attention_norm, c.rms_norm_eps)
            qkv = functional.linear(y, layer.qkv).view(len(token), -1, 1, c.head_dim)
            sizes = [c.num_heads, c.num_kv_heads, c.num_kv_heads]
            q, k, v = qkv.split(sizes, dim=1)
            q = norm(q, (c.head_dim,), layer.q_norm, c.rms_norm_eps)
            k = norm(k, (c.head_dim,), layer.k_norm, c.rms_norm_eps)
            q, k = self.rotate(q, position), self.rotate(k, position)
            layer.keys.index_copy_(2, position, k)
            layer.values.index_copy_(2, position, v)
            out = functional.scaled_dot_product_attention(
                q, layer.keys, layer.values, attn_mask=seen, enable_gqa=True
            )
            x = x + functional.linear(out.reshape(len(token), -1), layer.output)
            y = norm(x, (c.hidden_size,), layer.mlp_norm, c.rms_norm_eps)
            gate, up = functional.linear(y, layer.gate_up).chunk(2, dim=-1)
            x = x + functional.linear(functional.silu(gate) * up, layer.down)
        x = norm(x, (c.hidden_size,), self.final_norm, c.rms_norm_eps)
        return functional.linear(x, self.head).argmax(-1)


def plain(config: Config, batch: int, how: How) -> Step:
    """Return a compiled step of the decoder above."""
    if config.qkv_bias or config.output_bias or not config.qk_norm:
        raise SystemExit("compiled_torch: takes the shape of a dense Qwen3.")
    model = Plain(config, batch, how).eval()
    mode = "max-autotune" if how.on_gpu else "default"
    return torch.compile(model, mode=mode, fullgraph=True)


def of_transformers(config: Config, batch: int, how: How) -> Step:
    """Return a compiled step of transformers, whose cache a prompt has filled."""
    name = str(how.dtype).removeprefix("torch.")
    settings = transformers.Qwen3Config(**hf_export.qwen3_config(config, name))
    with how.device:
        model = transformers.AutoModelForCausalLM.from_config(
            settings, dtype=how.dtype, attn_implementation="sdpa"
        ).eval()
    cache = transformers.StaticCache(config=settings, max_cache_len=how.context)
    # A prompt fills it up to the timed steps; row by row would need another cache.
    length = how.context - timed_tokens(how)
    prompt = torch.randint(config.vocab_size, (batch, length), device=how.device)
    model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
    mode = "reduce-overhead" if how.on_gpu else "default"
    compiled = torch.compile(model.forward, mode=mode, fullgraph=True)

    def step(token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        found = compiled(
            input_ids=token[:, None],
            position_ids=position[None].expand(len(token), 1),
            past_key_values=cache,
        )
        return found.logits[:, -1].argmax(-1)

    return step


PEERS = {"plain": plain, "transformers": of_transformers}


def timed_tokens(how: How) -> int:
    """Return how many tokens a peer decodes, warming up included."""
    return how.steps * (how.repeats + 1)


def time_steps(step: Step, batch: int, how: How) -> list[float]:
    """Return milliseconds a step of each timed call; the first call warms up."""
    token = torch.zeros(batch, dtype=torch.long, device=how.device)
    position = torch.full((1,), how.context - timed_tokens(how), device=how.device)
    calls = []
    for _ in range(how.repeats + 1):
        wait(how)
        begin = time.perf_counter()
        for _ in range(how.steps):
            # A replayed graph writes its result over the last one.
            token = step(token, position).clone()
            position += 1
        wait(how)
        calls.append(1e3 * (time.perf_counter() - begin) / how.steps)
    return calls[1:]


def wait(how: How) -> None:
    """Wait for the device."""
    if how.on_gpu:
        torch.cuda.synchronize()


def measure(peer: str, config: Config, batch: int, how: How) -> dict[str, Any]:
    """Return one row, or why there is none."""
    row: dict[str, Any] = {"peer": peer, "batch": batch}
    begin = time.perf_counter()
    try:
        calls = time_steps(PEERS[peer](config, batch, how), batch, how)
    except torch.cuda.OutOfMemoryError as error:
        return row | {"fits": False, "why": str(error).splitlines()[0][:200]}
    finally:
        torch.compiler.reset()
        gc.collect()
        if how.on_gpu:
            torch.cuda.empty_cache()
    row |= {"fits": True, "calls_ms": calls, "step_ms": statistics.median(calls)}
    return row | {"seconds_in_all": time.perf_counter() - begin}


def main(
    out: Annotated[Path, typer.Option(help="JSON.")],
    shape: Annotated[str, typer.Option(help="A dense Qwen3.")] = "qwen3-1.7b",
    batch: Annotated[str, typer.Option(help="Rows, with commas.")] = "1,8,32",
    context: Annotated[int, typer.Option(min=8, help="Slots.")] = 3200,
    steps: Annotated[int, typer.Option(min=1, help="Of one timed call.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls.")] = 5,
    peers: Annotated[str, typer.Option(help="Of plain, transformers.")] = (
        "plain,transformers"
    ),
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu is for trying it out.")] = "cuda",
) -> None:
    """Time decode steps of compiled PyTorch with static caches."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"compiled_torch: torch {torch.__version__} finds no CUDA device."
        )
    how = How(getattr(torch, dtype), torch.device(device), context, steps, repeats)
    if timed_tokens(how) >= context:
        raise SystemExit(
            f"compiled_torch: {timed_tokens(how)} tokens are decoded, and need a "
            f"--context of more, got {context}; time fewer --steps."
        )
    jax.config.update("jax_platforms", "cpu")  # the device's memory is torch's
    torch.manual_seed(0)
    result: dict[str, Any] = {"benchmark": "compiled_torch", "model": shape}
    result |= {"dtype": dtype, "context": context, "steps": steps}
    result |= {"transformers": transformers.__version__, "torch": torch.__version__}
    result |= {**provenance(), "rows": []}
    if how.on_gpu:  # JAX was told to see none of it
        result["device"] = torch.cuda.get_device_name()
        result |= {"platform": "gpu", "driver": f"CUDA {torch.version.cuda}"}
    with torch.inference_mode():
        for rows in batches_of(batch, "--batch"):
            for peer in peers.split(","):
                row = measure(peer, SHAPES[shape], rows, how)
                result["rows"].append(row)
                step = row.get("step_ms")
                print(f"{peer}, batch {rows}: {row.get('why') or f'{step:.3f} ms'}")
                write_json(out, result)


if __name__ == "__main__":
    typer.run(main)
