"""One decode step of attention over a fixed-size cache, the new token's write included.

Axis letters: `B` batch, `N` query heads, `K` key/value heads, `S` slots, `H` head size.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxkv.kernels.outputs import DecodeOutput
from jaxkv.kernels.per_shard import per_shard
from jaxkv.kernels.shapes import check_groups, check_shape

Implementation = Literal["reference", "xla", "triton", "pallas_tpu"]

_CACHE = ("B K S H", "B K S H", "B K S")


def decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    target: jax.Array,
    position: jax.Array,
    *,
    scale: float,
    implementation: Implementation | None = None,
) -> DecodeOutput:
    """Write one token into its slot, then attend from it to all occupied slots.

    Args:
      query: `[B, N, H]` of the new token; head `n` reads head `n // (N / K)`.
      key: `[B, K, H]` of the new token, rotated.
      value: `[B, K, H]` of the new token.
      keys: `[B, K, S, H]`.
      values: `[B, K, S, H]`; free slots of both may hold anything, NaN included.
      positions: int32 `[B, K, S]`, negative where a slot is free.
      target: int32 `[B, K]`, the slot that the new token overwrites.
      position: int32 `[B]` of the new token; -1 for a finished row, which writes
        nothing and whose output is finite but means nothing.
      scale: factor on the logits.
      implementation: "reference" (float32), "xla" (anywhere), "triton" (NVIDIA, through
        jax-triton), "pallas_tpu" (TPU), or None for the best one that can run; `choose`
        says which.

    Returns:
      The output and the updated cache.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    where = "decode_attention"
    sizes = check_shape(
        where,
        query=(query, "B N H"),
        key=(key, "B K H"),
        value=(value, "B K H"),
        keys=(keys, "B K S H"),
        values=(values, "B K S H"),
        positions=(positions, "B K S"),
        target=(target, "B K"),
        position=(position, "B"),
    )
    check_groups(where, sizes["N"], sizes["K"])
    if implementation is None:
        implementation = choose(jax.default_backend(), query, keys)
    match implementation:
        case "reference":
            run = _reference
        case "xla":
            run = _xla
        case "triton":
            reason = triton_unavailable()
            if reason:
                raise NotImplementedError(f'{where}: implementation="triton" {reason}')
            from jaxkv.kernels.decode_triton import decode_attention_triton as run
        case "pallas_tpu":
            reason = tpu_unavailable()
            if reason:
                raise NotImplementedError(
                    f'{where}: implementation="pallas_tpu" {reason}'
                )
            from jaxkv.kernels.decode_tpu import decode_attention_tpu as run
        case _:
            raise ValueError(
                f"{where}: unknown {implementation=}; choose one of "
                f"{', '.join(get_args(Implementation))} or None."
            )
    run = per_shard(
        functools.partial(run, scale=scale),
        ("B N H", "B K H", "B K H", *_CACHE, "B K", "B"),
        ("B N H", *_CACHE),
    )
    return DecodeOutput(
        *run(query, key, value, keys, values, positions, target, position)
    )


def choose(platform: str, query=None, keys=None) -> Implementation:
    """Return the implementation that `None` stands for.

    Args:
      platform: of the device, as `jax.default_backend()` names it.
      query: `[B, N, H]`, or a `jax.ShapeDtypeStruct`.
      keys: `[B, K, S, H]`, likewise; without the two, those that every kernel takes.
    """
    if platform == "gpu" and not triton_unavailable():
        return "triton"
    if platform == "tpu":
        from jaxkv.kernels.attend_tpu import unsupported

        if query is None or not unsupported(query, keys):
            return "pallas_tpu"
    return "xla"


def triton_unavailable() -> str:
    """Return why the Triton version cannot run here, or an empty string."""
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU, but JAX runs on {jax.default_backend()}."
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        return f"needs jax-triton ({error}); pip install 'jaxkv[cuda13]'."
    return ""


def tpu_unavailable() -> str:
    """Return why the Pallas versions cannot run here, or an empty string.

    Under a mesh of TPU devices they can, wherever JAX itself runs: that is how a
    program is compiled for TPUs on a machine that has none.
    """
    from jax.experimental.pallas import tpu

    if tpu.is_tpu_device():
        return ""
    return (
        f"needs a TPU, but JAX runs on {jax.default_backend()}, and no mesh of TPU "
        "devices is set (jax.set_mesh)."
    )


def write(
    key, value, keys, values, positions, target, position
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Put one token per row into its slot; rows whose position is -1 stay as they are.

    Arguments are those of `decode_attention`.

    Returns:
      The new `keys`, `values` and `positions`.
    """
    batch, kv_heads, slots, _ = keys.shape
    # A slot beyond the end is dropped by the scatter, so a finished row writes nowhere.
    slot = jnp.where(position[:, None] < 0, slots, target)
    b = jnp.arange(batch)[:, None]
    k = jnp.arange(kv_heads)[None, :]
    where = (b, k, slot)
    flags = dict(mode="drop", unique_indices=True)
    return (
        keys.at[where].set(key.astype(keys.dtype), **flags),
        values.at[where].set(value.astype(values.dtype), **flags),
        positions.at[where].set(
            jnp.broadcast_to(position[:, None], target.shape), **flags
        ),
    )


def _reference(query, key, value, keys, values, positions, target, position, *, scale):
    """Everything in float32 and highest precision: the definition of the operation."""
    keys, values, positions = write(
        key, value, keys, values, positions, target, position
    )
    groups = query.shape[1] // keys.shape[1]
    occupied = jnp.repeat(positions >= 0, groups, axis=1)  # [B, N, S]
    k = jnp.repeat(keys.astype(jnp.float32), groups, axis=1)
    v = jnp.repeat(values.astype(jnp.float32), groups, axis=1)
    logits = scale * jnp.einsum(
        "bnh,bnsh->bns", query.astype(jnp.float32), k, precision="highest"
    )
    weights = _softmax(logits, occupied)
    v = jnp.where(occupied[..., None], v, 0.0)
    out = jnp.einsum("bns,bnsh->bnh", weights, v, precision="highest")
    return DecodeOutput(out.astype(query.dtype), keys, values, positions)


def _xla(query, key, value, keys, values, positions, target, position, *, scale):
    """Two contractions per key/value head, accumulated in float32."""
    keys, values, positions = write(
        key, value, keys, values, positions, target, position
    )
    batch, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    occupied = positions >= 0
    logits = scale * _logits(grouped, keys)
    weights = _softmax(logits, occupied[:, :, None])
    # 0 x NaN is NaN, so masked weights alone do not keep a free slot out.
    v = jnp.where(occupied[..., None], values, 0)
    out = jnp.einsum(
        "bkgs,bksh->bkgh",
        weights.astype(values.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    out = out.reshape(batch, heads, head_dim).astype(query.dtype)
    return DecodeOutput(out, keys, values, positions)


def _logits(grouped, keys):
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


def _softmax(logits, occupied):
    """Softmax over occupied slots; all zeros, not NaN, where no slot is occupied."""
    logits = jnp.where(occupied, logits, -jnp.inf)
    maximum = jnp.max(logits, axis=-1, keepdims=True, initial=-1e30)
    weights = jnp.exp(logits - maximum)
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
