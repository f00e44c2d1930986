"""One decode step of attention over a fixed-size cache, the new token's write included.

Axis letters: `B` batch, `N` query heads, `K` key/value heads, `S` slots, `H` head size.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkv.kernels import dispatch
from jaxkv.kernels.cache import Slots, Token, write
from jaxkv.kernels.decode_triton import decode_attention_triton
from jaxkv.kernels.per_shard import per_shard
from jaxkv.kernels.shapes import check_groups, checked
from jaxkv.kernels.weighing import capped

Implementation = Literal["reference", "xla", "triton", "pallas_tpu"]


@checked
def decode_attention(
    query: Float[Array, "B N H"],
    token: Token,
    slots: Slots,
    sink: Float[Array, " N"] | None = None,
    *,
    scale: float,
    cap: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B N H"], Slots]:
    """Write one token into its slot, then attend from it to all occupied slots.

    Args:
      query: of the new token; head `n` reads head `n // (N / K)`. The output of a
        finished row is finite but means nothing.
      token: the new one.
      slots: `slots.target` is the one that the token overwrites.
      sink: of each head, a logit beside those of the slots, whose weight goes nowhere;
        None is no such weight.
      scale: factor on the logits.
      cap: logits are `cap * tanh(logits / cap)`, the sink's excepted; None is no bound.
      implementation: "reference" (float32), "xla" (anywhere), "triton" (NVIDIA, through
        jax-triton), "pallas_tpu" (TPU), or None for the best one that can run; `choose`
        says which.

    Returns:
      The output, in the dtype of the query, and the slots with the token in them;
      `target` and `norms` are as they were.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    where = "decode_attention"
    check_groups(where, query.shape[1], slots.keys.shape[1])
    if implementation is None:
        implementation = choose(jax.default_backend(), query, slots.keys)
    run = dispatch.resolve(where, implementation, _RUNS)
    run = functools.partial(run, scale=scale, **dispatch.given(cap=cap))
    arrays = query, token, slots
    return per_shard(run, decode_attention)(*arrays, *dispatch.arrays(sink))


def choose(platform: str, query=None, keys=None) -> Implementation:
    """Return the implementation that `None` stands for.

    Args:
      platform: of the device, as `jax.default_backend()` names it.
      query: `[B, N, H]`, or a `jax.ShapeDtypeStruct`.
      keys: `[B, K, S, H]`, likewise; without the two, those that every kernel takes.
    """
    if platform == "gpu" and not dispatch.triton_unavailable():
        return "triton"
    if platform == "tpu":
        from jaxkv.kernels.attend_tpu import unsupported

        if query is None or not unsupported(query, keys):
            return "pallas_tpu"
    return "xla"


def decode_logits(
    query: jax.Array,
    keys: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    cap: float | None = None,
    exact: bool = False,
) -> jax.Array:
    """Return the logits of one token over the slots, for policies that want them.

    Args:
      query: `[B, N, H]`.
      keys: `[B, K, S, H]`, the token's own among them.
      positions: int32 `[B, K, S]`.
      scale: factor on the logits.
      cap: see `decode_attention`.
      exact: multiply in float32 and highest precision, as the reference does.

    Returns:
      Float32 `[B, K, G, S]`, for the `G` query heads of each key/value head; `-inf`
      where a slot is free.
    """
    batch, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    if exact:
        logits = jnp.einsum(
            "bkgh,bksh->bkgs",
            grouped.astype(jnp.float32),
            keys.astype(jnp.float32),
            precision="highest",
        )
    else:
        logits = _contract(grouped, keys)
    logits = capped(scale * logits, cap)
    return jnp.where((positions >= 0)[:, :, None], logits, -jnp.inf)


def decode_weights(
    query: jax.Array,
    keys: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    sink: jax.Array | None = None,
    cap: float | None = None,
    exact: bool = False,
) -> jax.Array:
    """Return the attention weights of one token: the softmax of `decode_logits`.

    Arguments are those of `decode_logits`, and `sink` of `decode_attention`.

    Returns:
      Float32 `[B, K, G, S]`; 0 where a slot is free, and where all of a head's are.
    """
    logits = decode_logits(query, keys, positions, scale=scale, cap=cap, exact=exact)
    if sink is not None:
        sink = sink.reshape(1, keys.shape[1], -1, 1)
    return softmax(logits, sink)


def softmax(logits: jax.Array, sink: jax.Array | None = None) -> jax.Array:
    """Softmax over the last axis; all zeros, not NaN, where all logits are `-inf`.

    Args:
      logits: float32.
      sink: one logit more, whose weight is not returned; broadcastable to them, with
        one entry on the last axis.
    """
    maximum = jnp.max(logits, axis=-1, keepdims=True, initial=-1e30)
    if sink is None:
        weights = jnp.exp(logits - maximum)
        return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    sink = sink.astype(jnp.float32)
    maximum = jnp.maximum(maximum, sink)
    weights = jnp.exp(logits - maximum)
    return weights / (weights.sum(-1, keepdims=True) + jnp.exp(sink - maximum))


def log_sum(logits: jax.Array, sink: jax.Array | None = None) -> jax.Array:
    """Return the logarithm of the sum that `softmax` divides by, float32 `[...]`.

    It is finite, and lower than that of any logit, where all logits are `-inf`.
    """
    maximum = jnp.max(logits, axis=-1, keepdims=True, initial=-1e30)
    if sink is not None:
        maximum = jnp.maximum(maximum, sink.astype(jnp.float32))
    total = jnp.exp(logits - maximum).sum(-1, keepdims=True)
    if sink is not None:
        total += jnp.exp(sink - maximum)
    return (maximum + jnp.log(jnp.maximum(total, 1e-30)))[..., 0]


def weigh(weights: jax.Array, values: jax.Array, positions: jax.Array) -> jax.Array:
    """Return the weighted sum of values, float32 `[B, K, G, H]`.

    Args:
      weights: float32 `[B, K, G, S]`, 0 where a slot is free.
      values: `[B, K, S, H]`; the product is taken in their dtype.
      positions: int32 `[B, K, S]`.
    """
    # 0 x NaN is NaN, so weights of 0 alone do not keep a free slot out.
    v = jnp.where((positions >= 0)[..., None], values, 0)
    return jnp.einsum(
        "bkgs,bksh->bkgh",
        weights.astype(values.dtype),
        v,
        preferred_element_type=jnp.float32,
    )


def attend_exactly(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    scale: float,
    sink: jax.Array | None = None,
    cap: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attend in float32 and highest precision, every query head by itself.

    Returns:
      Output `[B, N, H]`, weights `[B, N, S]`, and the values `[B, N, S, H]` that they
      weigh, 0 where a slot is free; all float32.
    """
    groups = query.shape[1] // keys.shape[1]
    occupied = jnp.repeat(positions >= 0, groups, axis=1)  # [B, N, S]
    k = jnp.repeat(keys.astype(jnp.float32), groups, axis=1)
    v = jnp.repeat(values.astype(jnp.float32), groups, axis=1)
    logits = scale * jnp.einsum(
        "bnh,bnsh->bns", query.astype(jnp.float32), k, precision="highest"
    )
    logits = jnp.where(occupied, capped(logits, cap), -jnp.inf)
    weights = softmax(logits, None if sink is None else sink[None, :, None])
    v = jnp.where(occupied[..., None], v, 0.0)
    out = jnp.einsum("bns,bnsh->bnh", weights, v, precision="highest")
    return out, weights, v


def _reference(query, token, slots, sink=None, *, scale, cap=None):
    """Everything in float32 and highest precision: the definition of the operation."""
    slots = write(token, slots)
    held = slots.keys, slots.values, slots.positions
    out, _, _ = attend_exactly(query, *held, scale, sink, cap)
    return out.astype(query.dtype), slots


def _xla(query, token, slots, sink=None, *, scale, cap=None):
    """Two contractions per key/value head, accumulated in float32."""
    slots = write(token, slots)
    weights = decode_weights(
        query, slots.keys, slots.positions, scale=scale, sink=sink, cap=cap
    )
    out = weigh(weights, slots.values, slots.positions)
    return out.reshape(query.shape).astype(query.dtype), slots


def _pallas_tpu(*arguments, **options):
    from jaxkv.kernels.decode_tpu import decode_attention_tpu

    return decode_attention_tpu(*arguments, **options)


_RUNS: dict[str, Callable[..., Any]] = {
    "reference": _reference,
    "xla": _xla,
    "triton": decode_attention_triton,
    "pallas_tpu": _pallas_tpu,
}


def _contract(grouped, keys):
    """Contract queries `[B, K, G, H]` with keys `[B, K, S, H]`: `[B, K, G, S]`."""
    if jax.default_backend() != "cpu":
        return jnp.einsum(
            "bkgh,bksh->bkgs", grouped, keys, preferred_element_type=jnp.float32
        )
    # Keys on the left: on the CPU a step of eight rows then takes a fifth less. XLA
    # would swap the operands back; the barrier keeps it from doing so.
    logits = jnp.einsum(
        "bksh,bkgh->bksg", keys, grouped, preferred_element_type=jnp.float32
    )
    return jax.lax.optimization_barrier(logits).swapaxes(2, 3)
