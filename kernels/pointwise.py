"""The small operations between a layer's matrix products, each in one launch.

A decode step of a small batch reads its weights as fast as memory allows, and then it
is the launches between the matrix products that cost: XLA makes three of a residual sum
and its norm, and five of the norms and rotations of a layer's heads.

What comes from a matrix product may come in parts (see `project`), to be added here.

Axis letters: `P` parts, `B` batch, `T` tokens, `D` hidden, `N` query heads, `K`
key/value heads, `H` head size.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxkv.kernels import dispatch, rotary
from jaxkv.kernels.cache import Heads
from jaxkv.kernels.per_shard import current_mesh
from jaxkv.kernels.pointwise_triton import (
    add_rms_norm_triton,
    split_and_rotate_triton,
)
from jaxkv.kernels.shapes import check_shape

Implementation = Literal["xla", "triton"]

_MOST_ROWS = 256  # beyond that XLA's fusions are as good


def add_rms_norm(
    x: jax.Array,
    delta: jax.Array | None,
    weight: jax.Array,
    *,
    eps: float,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Add to the residual stream and normalise the sum.

    Args:
      x: `[B, T, D]`, the residual stream.
      delta: `[P, B, T, D]`, whose sum over `P` is added to it, or None.
      weight: `[D]`.
      eps: added to the mean square.
      implementation: "xla" (anywhere), "triton" (NVIDIA), or None for the best one.

    Returns:
      The sum, and the sum over its root mean square times `weight`, both in the dtype
      of `x`; the arithmetic is float32, with a rounding before `weight`.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    where = "add_rms_norm"
    arrays = {"x": (x, "B T D"), "weight": (weight, "D")}
    if delta is not None:
        arrays["delta"] = (delta, "P B T D")
    sizes = check_shape(where, **arrays)
    if implementation is None:
        implementation = choose(sizes["B"] * sizes["T"] <= _MOST_ROWS)
    run = dispatch.resolve(where, implementation, _NORMS)
    return run(x, delta, weight, eps=eps)


def join(parts: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return the sum `[B, T, F]` of parts `[P, B, T, F]`, rounded once."""
    if parts.shape[0] == 1:
        return parts[0].astype(dtype)
    return parts.astype(jnp.float32).sum(0).astype(dtype)


def split_and_rotate(
    qkv: jax.Array,
    q_norm: jax.Array | None,
    k_norm: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    dtype: jax.typing.DTypeLike,
    implementation: Implementation | None = None,
) -> Heads:
    """Split a fused projection into heads; normalise and rotate queries and keys.

    Args:
      qkv: `[P, B, T, (N + 2 K) H]`, whose sum over `P` it is.
      q_norm: `[H]`, weight of the queries' norm, or None for no norm (Qwen3 has it).
      k_norm: `[H]`, likewise; both or none.
      cos: float32 `[B, T, H / 2]`, from `rotary.table`.
      sin: float32 `[B, T, H / 2]`.
      num_heads: `N`.
      num_kv_heads: `K`.
      eps: of the norms.
      dtype: of the result.
      implementation: "xla" (anywhere), "triton" (NVIDIA), or None for the best one.

    Returns:
      Queries, keys and values.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    where = "split_and_rotate"
    sizes = check_shape(
        where, qkv=(qkv, "P B T Q"), cos=(cos, "B T R"), sin=(sin, "B T R")
    )
    head_dim = 2 * sizes["R"]
    if sizes["Q"] != (num_heads + 2 * num_kv_heads) * head_dim:
        raise ValueError(
            f"{where}: qkv has {sizes['Q']} columns, but {num_heads} + 2 x "
            f"{num_kv_heads} heads of {head_dim} need "
            f"{(num_heads + 2 * num_kv_heads) * head_dim}."
        )
    if implementation is None:
        implementation = choose(sizes["B"] * sizes["T"] <= _MOST_ROWS)
    run = dispatch.resolve(where, implementation, _ROTATIONS)
    return run(
        *(qkv, q_norm, k_norm, cos, sin),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        eps=eps,
        dtype=dtype,
    )


def choose(worth: bool) -> Implementation:
    """Return the implementation that `None` stands for.

    Under a mesh of several devices it is XLA's, which it cuts along with its arrays.
    For a Triton call it would gather them on every device, the weights as well.

    Args:
      worth: whether Triton's version is the best one where it can run.
    """
    mesh = current_mesh()
    spread = mesh is not None and mesh.size > 1
    able = worth and not spread and not dispatch.triton_unavailable()
    return "triton" if able else "xla"


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Normalise the last axis to unit root mean square, then scale by `weight`."""
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(variance + eps)).astype(x.dtype) * weight


def _add_rms_norm_xla(x, delta, weight, *, eps):
    total = x if delta is None else x + join(delta, x.dtype)
    return total, rms_norm(total, weight, eps)


def _split_and_rotate_xla(
    qkv, q_norm, k_norm, cos, sin, *, num_heads, num_kv_heads, eps, dtype
):
    heads = join(qkv, dtype).reshape(*cos.shape[:2], -1, 2 * cos.shape[2])
    q, k, v = jnp.split(heads, [num_heads, num_heads + num_kv_heads], axis=2)
    if q_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return Heads(rotary.turn(q, cos, sin), rotary.turn(k, cos, sin), v)


_NORMS = {"xla": _add_rms_norm_xla, "triton": add_rms_norm_triton}
_ROTATIONS = {"xla": _split_and_rotate_xla, "triton": split_and_rotate_triton}
