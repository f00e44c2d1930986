"""A dense Qwen3 in plain PyTorch for `compiled_torch.py`, in gpt-fast's manner.

Projections are fused, the cache is static, and a step reads and writes it whole. What
is compiled is one layer, from one sum of the residual stream to the next, since all
layers are alike: the kernels are those of a step compiled whole, in less time.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from jaxkv.models.config import Config

Attention = Callable[..., torch.Tensor]  # query, keys, values, mask -> [B, heads, 1, H]


def sdpa(q, keys, values, seen):
    """Leave grouped heads to PyTorch."""
    return functional.scaled_dot_product_attention(
        q, keys, values, attn_mask=seen, enable_gqa=True
    )


def grouped(q, keys, values, seen):
    """Take the query heads of a group for queries of one head."""
    batch, heads, _, size = q.shape
    q = q.reshape(batch, keys.shape[1], -1, size)
    seen = seen.expand(batch, keys.shape[1], q.shape[2], -1)
    out = functional.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
    return out.reshape(batch, heads, 1, size)


def matmul(q, keys, values, seen):
    """Multiply, and let the compiler fuse what stands between two products."""
    batch, heads, _, size = q.shape
    q = q.reshape(batch, keys.shape[1], -1, size) * size**-0.5
    logits = torch.matmul(q, keys.transpose(-1, -2))
    logits = logits.float().masked_fill(~seen, float("-inf"))
    weights = torch.softmax(logits, -1).to(values.dtype)
    return torch.matmul(weights, values).reshape(batch, heads, 1, size)


ATTENTIONS: dict[str, Attention] = dict(sdpa=sdpa, grouped=grouped, matmul=matmul)


def rotate(x, cos, sin):
    """Rotate heads, `[B, heads, 1, H]`, by one position."""
    first, second = x.chunk(2, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.cat(turned, dim=-1)


def run_layer(x, delta, at, weights, cache, *, config: Config, attention: Attention):
    """Add `delta` to the residual stream, and return it and what comes next."""
    c, norm = config, functional.rms_norm
    position, seen, cos, sin = at
    mixed, q_norm, k_norm, qkv, output, fed, gate_up, down = weights
    x = x + delta
    y = norm(x, (c.hidden_size,), mixed, c.rms_norm_eps)
    heads = functional.linear(y, qkv).view(len(x), -1, 1, c.head_dim)
    q, k, v = heads.split([c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
    q = rotate(norm(q, (c.head_dim,), q_norm, c.rms_norm_eps), cos, sin)
    k = rotate(norm(k, (c.head_dim,), k_norm, c.rms_norm_eps), cos, sin)
    keys, values = cache
    keys.index_copy_(2, position, k)
    values.index_copy_(2, position, v)
    out = attention(q, keys, values, seen)
    x = x + functional.linear(out.reshape(len(x), -1), output)
    y = norm(x, (c.hidden_size,), fed, c.rms_norm_eps)
    gate, up = functional.linear(y, gate_up).chunk(2, dim=-1)
    return x, functional.linear(functional.silu(gate) * up, down)


class Plain:
    """Random weights of a shape.

    Args:
      config: of a dense Qwen3.
      dtype: of weights and cache.
      device: of both.
    """

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device):
        c, self.config = config, config
        if c.qkv_bias or c.output_bias or c.experts or not c.qk_norm:
            raise SystemExit("compiled_torch: takes the shape of a dense Qwen3.")
        self.made: dict[str, Any] = dict(dtype=dtype, device=device)

        def matrix(*shape: int) -> torch.Tensor:
            return torch.empty(shape, **self.made).normal_(std=0.02)

        def ones(size: int) -> torch.Tensor:
            return torch.ones(size, **self.made)

        self.embedding = matrix(c.vocab_size, c.hidden_size)
        self.head = self.embedding if c.tied else matrix(c.vocab_size, c.hidden_size)
        self.final_norm = ones(c.hidden_size)
        self.layers = [
            (
                *(ones(c.hidden_size), ones(c.head_dim), ones(c.head_dim)),
                matrix(c.qkv_size, c.hidden_size),
                matrix(c.hidden_size, c.num_heads * c.head_dim),
                ones(c.hidden_size),
                matrix(2 * c.intermediate_size, c.hidden_size),
                matrix(c.hidden_size, c.intermediate_size),
            )
            for _ in range(c.num_layers)
        ]

    def step(
        self,
        attention: Attention,
        *,
        batch: int,
        context: int,
        begin: int,
        build: Callable[..., Any],
    ) -> Callable[[], None]:
        """Return a step of rows whose cache is filled up to `begin`.

        Each call decodes one token of all rows, behind those of the last call. `build`
        compiles what it is given.
        """
        c, device = self.config, self.made["device"]
        shape = batch, c.num_kv_heads, context, c.head_dim
        caches = [
            (torch.randn(shape, **self.made), torch.randn(shape, **self.made))
            for _ in self.layers
        ]
        exponents = torch.arange(0, c.head_dim, 2, device=device) / c.head_dim
        slots = torch.arange(context, device=device)
        angles = slots[:, None] * (1.0 / c.rope.theta**exponents)[None]
        cosines, sines = (
            x.to(self.made["dtype"]) for x in (angles.cos(), angles.sin())
        )
        token = torch.zeros(batch, dtype=torch.long, device=device)
        position = torch.full((1,), begin, device=device)
        nothing = torch.zeros(batch, c.hidden_size, **self.made)

        @build
        def first():
            seen = (slots <= position)[None, None, None]
            x = functional.embedding(token, self.embedding)
            return x, seen, cosines[position], sines[position]

        @build
        def last(x, delta):
            size = (c.hidden_size,)
            x = functional.rms_norm(x + delta, size, self.final_norm, c.rms_norm_eps)
            return functional.linear(x, self.head).argmax(-1)

        layer = build(functools.partial(run_layer, config=c, attention=attention))

        def step() -> None:
            x, *at = first()
            delta = nothing
            for weights, cache in zip(self.layers, caches, strict=True):
                x, delta = layer(x, delta, (position, *at), weights, cache)
            token.copy_(last(x, delta))
            position.add_(1)

        return step
