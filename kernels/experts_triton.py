"""The feed-forward of experts for few tokens on NVIDIA GPUs, in Triton.

It takes as long as the experts that were chosen take to be read, each once, and three
launches: one for gate and up, one for down, and one that adds up what a token's experts
made of it.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.kernels import triton_call
from jaxkv.kernels.triton_call import next_power_of_2, num_processors, shared_memory

MOST_TOKENS = 64  # of a decode step; beyond that XLA's products are as good

_UNIT = 8  # numbers of 16 bits that are loaded at once
_ROWS = 16  # of a product; see `experts_triton_body`
_SUM_BLOCK = 512  # columns of a token that one program adds up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How the work of one product is cut.

    Attributes:
      block: columns of a tile, of gates as well as of what they gate.
      depth: of a tile.
      warps: per program.
      stages: depth of the software pipeline.
    """

    block: int
    depth: int
    warps: int
    stages: int


def unsupported(
    x: jax.Array | jax.ShapeDtypeStruct,
    weights: Any,
) -> str:
    """Return why the kernels cannot take these, or an empty string.

    Args:
      x: tokens, `[M, D]`.
      weights: `experts.Weights`.
    """
    if not 1 <= len(x) <= MOST_TOKENS:
        return f"takes 1 to {MOST_TOKENS} tokens, got {len(x)}."
    dtypes = {str(leaf.dtype) for leaf in (weights.gate_up, weights.down)}
    if dtypes != {str(x.dtype)} or x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes one 16-bit float, got {x.dtype} and {', '.join(sorted(dtypes))}."
    count, inner, hidden = weights.down.shape
    if not count or not inner or not hidden or inner % _UNIT or hidden % _UNIT:
        return (
            f"takes experts of multiples of {_UNIT}, got {count} of {hidden} x {inner}."
        )
    return ""


def choose_tiles(
    depth: int,
    columns: int,
    per_token: int,
    *,
    gated: bool,
    num_sms: int = 132,
    shared: int = 232_448,
) -> Tiles:
    """Return tiles that keep the memory busy with the experts of one token.

    They do not depend on the number of tokens, so that no sum does. Measured on an H200
    for 1 and 8 tokens: wide tiles are better than more programs than processors.

    Args:
      depth: of one expert's matrix.
      columns: of it; with `gated` of the gates.
      per_token: experts of a token.
      gated: for the first product, which has twice the columns.
      num_sms: of the device.
      shared: bytes of shared memory of a program, at most.
    """
    block = 64
    if per_token * -(-columns // block) < num_sms // 2:
        block = 32
    tile = 64 if gated or depth % 128 else 128
    stage = 2 * tile * (block * (1 + gated) + _ROWS)
    most = 5 if gated else 4
    return Tiles(
        block=block,
        depth=tile,
        warps=8 if gated else 4,
        stages=max(2, min(most, shared // stage)),
    )


def experts_triton(
    x: jax.Array,
    experts: jax.Array,
    shares: jax.Array,
    weights: Any,
    *,
    gate: Any,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> jax.Array:
    """Do `experts.feed_forward` for flat tokens.

    Args:
      x: `[M, D]`, in 16 bits.
      experts: `[M, A]`; `E` stands for an expert of another device.
      shares: `[M, A]`, float32.
      weights: `experts.Weights`.
      gate: `experts.Gate`.
      tiles: of the two products, by default what `choose_tiles` says.

    Returns:
      `[M, D]`, in the dtype of `x`.
    """
    from jaxkv.kernels import experts_triton_body as body

    (tokens, per_token), (_, inner, hidden) = experts.shape, weights.down.shape
    first, second = tiles or tiles_here(hidden, inner, per_token)
    experts = experts.astype(jnp.int32)
    count = len(weights.down)
    activations = _product(
        body.experts_gated,
        *(x, experts, weights.gate_up, weights.gate_up_bias, x.dtype, first),
        constants(experts.shape, count, hidden, inner, first, gate=gate),
    )
    rows = _product(
        body.experts_down,
        *(activations, experts, weights.down, weights.down_bias, jnp.float32, second),
        constants(experts.shape, count, inner, hidden, second),
    )
    (out,) = triton_call.call(
        body.add_choices,
        (rows, experts, shares),
        (jax.ShapeDtypeStruct((tokens, hidden), x.dtype),),
        aliases={},
        grid=(-(-hidden // _SUM_BLOCK), tokens),
        num_warps=4,
        num_stages=1,
        **sum_constants(per_token, count, hidden),
    )
    return out


def _product(kernel, x, experts, weight, bias, dtype, tiles, sizes):
    """Multiply the rows of all choices, each by its expert's matrix."""
    columns, biased = sizes["COLUMNS"], bias is not None
    programs = sizes["EXPERTS"] if sizes["BY_EXPERT"] else experts.size
    (out,) = triton_call.call(
        kernel,
        (x, experts, weight, bias if biased else weight),
        (jax.ShapeDtypeStruct((experts.size, columns), dtype),),
        aliases={},
        grid=(-(-columns // tiles.block), programs),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        BIASED=biased,
        **sizes,
    )
    return out


def constants(
    chosen: tuple[int, ...],
    count: int,
    depth: int,
    columns: int,
    tiles: Tiles,
    *,
    gate: Any = None,
) -> dict[str, Any]:
    """Return the compile-time arguments of `experts_down`, or with a gate of the first.

    All but whether there are biases.
    """
    tokens, per_token = chosen
    gated = {}
    if gate is not None:
        limit = math.inf if gate.limit is None else gate.limit
        gated = dict(ALPHA=gate.alpha, LIMIT=limit, SHIFT=gate.shift)
    return gated | dict(
        TOKENS=tokens,
        TOKENS_PAD=max(_ROWS, next_power_of_2(tokens)),
        PER_TOKEN=per_token,
        PER_TOKEN_PAD=next_power_of_2(per_token),
        EXPERTS=count,
        BY_EXPERT=tokens * per_token > count,
        DEPTH=depth,
        COLUMNS=columns,
        BLOCK=tiles.block,
        BLOCK_DEPTH=tiles.depth,
    )


def sum_constants(per_token: int, count: int, columns: int) -> dict[str, int]:
    """Return the compile-time arguments of `add_choices`."""
    return dict(PER_TOKEN=per_token, EXPERTS=count, COLUMNS=columns, BLOCK=_SUM_BLOCK)


def tiles_here(hidden: int, inner: int, per_token: int) -> tuple[Tiles, Tiles]:
    """Return what `choose_tiles` does for both products on the default GPU."""
    sizes = dict(num_sms=num_processors(), shared=shared_memory())
    return (
        choose_tiles(hidden, inner, per_token, gated=True, **sizes),
        choose_tiles(inner, hidden, per_token, gated=False, **sizes),
    )
