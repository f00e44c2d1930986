"""Causal attention over whole prompts: attention at prefill.

Prompts are padded on the right, so the causal mask alone keeps padding out of every
real token's sight, and no implementation needs the lengths.

Axis letters: `B` batch, `T` tokens, `W` tokens behind a prompt, `N` query heads, `K`
key/value heads, `H` head size.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxkv.kernels import decode, dispatch
from jaxkv.kernels.per_shard import per_shard
from jaxkv.kernels.shapes import check_groups, checked
from jaxkv.kernels.weighing import capped

Implementation = Literal["reference", "xla", "cudnn", "splash"]

_BLOCK = 256  # rows and columns of a tile of the XLA version


@checked
def causal_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    sink: Float[Array, " N"] | None = None,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Attend from every token to itself and the tokens before it.

    Args:
      query: head `n` reads key/value head `n // (N / K)`.
      key: of all tokens.
      value: of all tokens.
      sink: see `decode.decode_attention`.
      scale: factor on the logits; no default, so that nobody shares a mistake.
      window: how many tokens each attends to, itself the last; None is all of them.
      cap: see `decode.decode_attention`.
      implementation: "reference" (float32, T x T memory), "xla" (anywhere; memory
        linear in T), "cudnn" (NVIDIA, 16-bit; neither
        sink nor cap), "splash" (TPU), or None for the
        best one that can run; `choose` says which that is.

    Returns:
      The output, in the dtype of `query`.

    Raises:
      ValueError: shapes disagree, the window is empty, or the implementation is
        unknown.
      NotImplementedError: a named implementation cannot run these inputs.
    """
    where = "causal_attention"
    if window is not None and window < 1:
        raise ValueError(f"{where}: a window holds at least 1 token, got {window}.")
    if window is not None and window >= query.shape[1]:
        window = None
    check_groups(where, query.shape[2], key.shape[2])
    # JAX rounds what cuDNN says of a softmax's sum to 16 bits: too few for a sink.
    plain = sink is None and cap is None
    unable = {} if plain else {"cudnn": 'takes neither sink nor cap; use "xla".'}
    if implementation is None:
        _, length, _, head_dim = query.shape
        implementation = choose(
            jax.default_backend(), query.dtype, length=length, head_dim=head_dim
        )
        implementation = "xla" if implementation in unable else implementation
    run = dispatch.resolve(where, implementation, _RUNS, unable=unable)
    run = functools.partial(run, scale=scale, window=window, cap=cap)
    run = per_shard(run, causal_attention)
    return run(query, key, value, *dispatch.arrays(sink))


def choose(
    platform: str, dtype: jax.typing.DTypeLike, *, length: int, head_dim: int
) -> Implementation:
    """Return the implementation that `None` stands for."""
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    if platform == "gpu" and half and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    if platform == "tpu" and head_dim % 128 == 0 and length % 128 == 0:
        return "splash"
    return "xla"


@checked
def put_behind(
    whole: Float[Array, "B T K H"],
    more: Float[Array, "B W K H"],
    start: Int32[Array, " B"],
) -> Float[Array, "B T K H"]:
    """Put tokens behind each row's own prompt, in place of its padding.

    Args:
      whole: of any heads.
      more: what stands at the indices `start[b] ... start[b] + W - 1`.
      start: at most `T - W`.

    Raises:
      ValueError: shapes disagree.
    """
    return per_shard(_put_behind, put_behind)(whole, more, start)


def _put_behind(whole, more, start):
    rows = jnp.arange(len(whole), dtype=jnp.int32)[:, None]
    place = start[:, None] + jnp.arange(more.shape[1], dtype=jnp.int32)[None]
    return whole.at[rows, place].set(more)


@checked
def attention_behind(
    query: Float[Array, "B W N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    start: Int32[Array, " B"],
    sink: Float[Array, " N"] | None = None,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> Float[Array, "B W N H"]:
    """Attend from some tokens behind each prompt, as `causal_attention` would from all.

    In XLA, with a float32 softmax of `B N W T` numbers.

    Args:
      query: token `w` of row `b` stands at index `start[b] + w`.
      key: of all tokens, those of the queries among them; see `put_behind`.
      value: likewise.
      start: tokens of each prompt.
      sink: see `causal_attention`, and so are the next three.
      scale: see there.
      window: see there.
      cap: see there.

    Raises:
      ValueError: shapes disagree.
    """
    check_groups("attention_behind", query.shape[2], key.shape[2])
    run = functools.partial(_behind, scale=scale, window=window, cap=cap)
    return per_shard(run, attention_behind)(
        query, key, value, start, *dispatch.arrays(sink)
    )


def _behind(query, key, value, start, sink=None, *, scale, window, cap):
    batch, width, heads, head_dim = query.shape
    length, kv_heads = key.shape[1:3]
    logits = scale * jnp.einsum(
        "bwkgh,btkh->bkgwt",
        query.reshape(batch, width, kv_heads, -1, head_dim),
        key,
        preferred_element_type=jnp.float32,
    )
    own = start[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    behind = own[..., None] - jnp.arange(length, dtype=jnp.int32)[None, None]
    seen = (behind >= 0) & (behind < (window or length))
    logits = jnp.where(seen[:, None, None], capped(logits, cap), -jnp.inf)
    if sink is not None:
        sink = sink.reshape(1, kv_heads, -1, 1, 1)
    out = jnp.einsum(
        "bkgwt,btkh->bwkgh",
        decode.softmax(logits, sink).astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    return out.reshape(batch, width, heads, head_dim).astype(query.dtype)


def _reference(query, key, value, sink=None, *, scale, window=None, cap=None):
    """Materialise the whole matrix in float32: slow and obviously right."""
    _, length, heads, _ = query.shape
    groups = heads // key.shape[2]
    q = query.astype(jnp.float32)
    k = jnp.repeat(key.astype(jnp.float32), groups, axis=2)
    v = jnp.repeat(value.astype(jnp.float32), groups, axis=2)
    logits = scale * jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest")
    order = jnp.arange(length, dtype=jnp.int32)
    behind = order[:, None] - order[None]
    seen = (behind >= 0) & (behind < (window or length))
    logits = jnp.where(seen, capped(logits, cap), -jnp.inf)
    if sink is not None:  # a column more, whose weight goes nowhere
        own = sink.astype(jnp.float32)[None, :, None, None]
        own = jnp.broadcast_to(own, (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, own], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., :length]
    out = jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest")
    return out.astype(query.dtype)


def _blockwise(query, key, value, sink=None, *, scale, window=None, cap=None):
    """Online softmax over tiles; only those that hold something seen are computed."""
    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    groups = heads // kv_heads
    block = min(_BLOCK, length)
    num_blocks = -(-length // block)
    pad = ((0, 0), (0, num_blocks * block - length), (0, 0), (0, 0))

    def tiles(x):  # [B, T, heads, H] -> [blocks, B, heads, block, H]
        x = jnp.pad(x, pad).reshape(batch, num_blocks, block, x.shape[2], head_dim)
        return x.transpose(1, 0, 3, 2, 4)

    queries, keys, values = tiles(query), tiles(key), tiles(value)
    order = jnp.arange(block, dtype=jnp.int32)
    within = order[:, None] - order[None]
    reach = num_blocks * block if window is None else window

    def row(index):
        q = queries[index].reshape(batch, kv_heads, groups, block, head_dim)

        def step(column, carry):
            maximum, total, acc = carry
            logits = scale * jnp.einsum(
                "bkgth,bksh->bkgts",
                q,
                keys[column],
                preferred_element_type=jnp.float32,
            )
            logits = capped(logits, cap)
            behind = within + (index - column) * block
            logits = jnp.where((behind >= 0) & (behind < reach), logits, -jnp.inf)
            new_maximum = jnp.maximum(maximum, logits.max(-1))
            weights = jnp.exp(logits - new_maximum[..., None])
            rescale = jnp.exp(maximum - new_maximum)
            update = jnp.einsum(
                "bkgts,bksh->bkgth",
                weights.astype(value.dtype),
                values[column],
                preferred_element_type=jnp.float32,
            )
            return (
                new_maximum,
                total * rescale + weights.sum(-1),
                acc * rescale[..., None] + update,
            )

        rows = (batch, kv_heads, groups, block)
        # A row may see nothing of its first tile.
        maximum, total = (
            jnp.full(rows, -1e30, jnp.float32),
            jnp.zeros(rows, jnp.float32),
        )
        if sink is not None:
            own = sink.astype(jnp.float32).reshape(1, kv_heads, groups, 1)
            maximum, total = jnp.broadcast_to(own, rows), jnp.ones(rows, jnp.float32)
        carry = maximum, total, jnp.zeros((*rows, head_dim), jnp.float32)
        first = jnp.maximum(index * block - (reach - 1), 0) // block
        _, total, acc = jax.lax.fori_loop(first, index + 1, step, carry)
        return (acc / total[..., None]).astype(query.dtype)

    out = jax.lax.map(row, jnp.arange(num_blocks, dtype=jnp.int32))
    # [blocks, B, K, G, block, H]
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, heads, head_dim)
    return out[:, :length]


def _cudnn(query, key, value, sink=None, *, scale, window=None, cap=None):
    """Flash attention of cuDNN, through `jax.nn`; it is also differentiable."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError(
            'causal_attention: implementation="cudnn" needs an NVIDIA GPU, but JAX '
            f'runs on {jax.default_backend()}; use "xla".'
        )
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            'causal_attention: implementation="cudnn" takes bfloat16 or float16, got '
            f'{query.dtype}; use "xla".'
        )
    del sink, cap  # `causal_attention` has refused them
    return jax.nn.dot_product_attention(
        *(query, key, value),
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def _with_sink(out, total, sink):
    """Return outputs whose weights a sink has its share of.

    Args:
      out: `[..., H]`, of a softmax without it.
      total: `[...]`, the logarithm of the sum of its exponentials.
      sink: broadcastable to `total`.
    """
    share = jax.nn.sigmoid(total.astype(jnp.float32) - sink.astype(jnp.float32))
    return (out.astype(jnp.float32) * share[..., None]).astype(out.dtype)


def _splash(
    query, key, value, sink=None, *, scale, window=None, cap=None, interpret=False
):
    """Splash attention of JAX's TPU kernels, one call per sequence through vmap."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    batch, length, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    if length % 128 or head_dim % 128:
        raise NotImplementedError(
            'causal_attention: implementation="splash" needs T and H to be multiples '
            f'of 128, got T={length} and H={head_dim}; use "xla".'
        )
    groups = heads // kv_heads
    square = (length, length)
    mask: Any = splash_attention_mask.CausalMask(square)
    if window is not None:
        mask = splash_attention_mask.LocalMask(square, (window - 1, 0), offset=0)
    # Its own default, tiles of 128, keeps the matrix units waiting.
    block = math.gcd(length, 512)
    sizes = splash_attention_kernel.BlockSizes(block_q=block, block_kv=block)
    q = (query * scale).reshape(batch, length, kv_heads, groups, head_dim)
    # Mosaic has no 64 bits, and no other precision for 16.
    wide = query.dtype == jnp.float32
    set_by_user = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    precision = set_by_user if wide else None
    with jax.enable_x64(False), jax.default_matmul_precision(precision):
        kernel = splash_attention_kernel.make_splash_mqa_single_device(
            splash_attention_mask.MultiHeadMask([mask] * groups),
            block_sizes=sizes,
            interpret=interpret,
            attn_logits_soft_cap=cap,
            save_residuals=sink is not None,
        )
        out = jax.vmap(jax.vmap(kernel))(
            q.transpose(0, 2, 3, 1, 4), key.swapaxes(1, 2), value.swapaxes(1, 2)
        )  # [B, K, G, T, H]
    if sink is not None:
        out, (total,) = out
        out = _with_sink(out, total, sink.reshape(1, kv_heads, groups, 1))
    return out.transpose(0, 3, 1, 2, 4).reshape(query.shape)


_RUNS = {"reference": _reference, "xla": _blockwise, "cudnn": _cudnn, "splash": _splash}
