"""The small operations between a layer's matrix products, each in one launch.

A decode step of a small batch reads its weights as fast as memory allows, and then it
is the launches between the matrix products that cost: XLA makes three of a residual sum
and its norm, and five of the norms and rotations of a layer's heads.

What comes from a matrix product may come in parts (see `project`), to be added here.

Axis letters: `P` parts, `B` batch, `T` tokens, `D` hidden, `N` query heads, `K`
key/value heads, `H` head size.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from jaxkv.kernels import dispatch, rotary
from jaxkv.kernels.cache import Heads
from jaxkv.kernels.per_shard import (
    along,
    devices_per_row,
    mean_over_heads,
    per_shard,
)
from jaxkv.kernels.pointwise_triton import (
    add_rms_norm_triton,
    split_and_rotate_triton,
)
from jaxkv.kernels.shapes import checked

Implementation = Literal["xla", "triton"]

_MOST_ROWS = 256  # beyond that XLA's fusions are as good


@checked
def add_rms_norm(
    x: Float[Array, "B T D"],
    delta: Float[Array, "P B T D"] | None,
    weight: Float[Array, " D"],
    *,
    eps: float,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Add to the residual stream and normalise the sum.

    Args:
      x: the residual stream.
      delta: its sum over `P` is added to it, unless it is None.
      weight: of the norm; it may be wider than `x`.
      eps: added to the mean square.
      implementation: "xla" (anywhere), "triton" (NVIDIA), or None for the best one.

    Returns:
      The sum, and the sum over its root mean square times `weight`, both in the dtype
      of `x`; the arithmetic is float32, with a rounding before `weight`.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """

    def run(x, delta, weight):
        how = implementation or choose(x.shape[0] * x.shape[1] <= _MOST_ROWS)
        run = dispatch.resolve("add_rms_norm", how, _NORMS)
        return run(x, delta, weight, eps=eps)

    return per_shard(run, add_rms_norm)(x, delta, weight)


def join(parts: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Return the sum `[B, T, F]` of parts `[P, B, T, F]`, rounded once.

    The parts are added in their order, whatever the other sizes are.
    """
    if parts.shape[0] == 1:
        return parts[0].astype(dtype)
    return functools.reduce(jnp.add, parts.astype(jnp.float32)).astype(dtype)


@checked
def split_and_rotate(
    qkv: Float[Array, "P B T Q"],
    q_norm: Float[Array, " H"] | None,
    k_norm: Float[Array, " H"] | None,
    cos: Float32[Array, "B T R"],
    sin: Float32[Array, "B T R"],
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    dtype: jax.typing.DTypeLike,
    implementation: Implementation | None = None,
) -> Heads:
    """Split a fused projection into heads; normalise and rotate queries and keys.

    Args:
      qkv: the projection is its sum over `P`; `Q = (N + 2 K) H`. Under a mesh each
        device's queries, keys and values lie together, one device after the other.
      q_norm: weight of the queries' norm, or None for no norm (Qwen3 has it).
      k_norm: of the keys', likewise; both or none.
      cos: from `rotary.table`, for `R = H / 2` angles.
      sin: likewise.
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
    head_dim, columns = 2 * cos.shape[2], qkv.shape[3]
    wanted = (num_heads + 2 * num_kv_heads) * head_dim
    if columns != wanted:
        raise ValueError(
            f"{where}: qkv has {columns} columns, but {num_heads} + 2 x "
            f"{num_kv_heads} heads of {head_dim} need {wanted}."
        )
    heads = [number // devices_per_row() for number in (num_heads, num_kv_heads)]

    def run(*arrays):
        cos = arrays[3]
        how = implementation or choose(cos.shape[0] * cos.shape[1] <= _MOST_ROWS)
        return dispatch.resolve(where, how, _ROTATIONS)(
            *arrays,
            num_heads=heads[0],
            num_kv_heads=heads[1],
            eps=eps,
            dtype=dtype,
        )

    return per_shard(run, split_and_rotate)(qkv, q_norm, k_norm, cos, sin)


def norm_of_all_heads(
    qkv: jax.Array,
    q_norm: jax.Array,
    k_norm: jax.Array,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Normalise the queries of all heads of a token at once, and the keys (OLMo 2).

    Under a mesh the devices of a row add up what their heads have to the mean square:
    two numbers a token.

    Args:
      qkv: `[B, T, (N + 2 K) H]`, laid out as for `split_and_rotate`.
      q_norm: weight of the queries' norm, `[N H]`.
      k_norm: of the keys', `[K H]`.
      num_heads: `N`.
      num_kv_heads: `K`.
      eps: added to the mean squares.
      implementation: as for `add_rms_norm`; over several devices a row "xla" only.

    Returns:
      `qkv` with normalised queries and keys, as `add_rms_norm` normalises.

    Raises:
      ValueError: the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    width = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    devices = devices_per_row()
    cuts = [width * n // devices for n in (num_heads, num_heads + num_kv_heads)]
    if devices == 1:
        norm = functools.partial(add_rms_norm, eps=eps, implementation=implementation)
        q, k, v = jnp.split(qkv, cuts, axis=-1)
        normed = norm(q, None, q_norm)[1], norm(k, None, k_norm)[1]
        return jnp.concatenate((*normed, v), axis=-1)

    def together(qkv, q_norm, k_norm):
        q, k, v = jnp.split(qkv, cuts, axis=-1)
        squares = [jnp.square(x.astype(jnp.float32)).mean(-1) for x in (q, k)]
        of_q, of_k = mean_over_heads(jnp.stack(squares))[..., None]
        q, k = _scaled(q, of_q, q_norm, eps), _scaled(k, of_k, k_norm, eps)
        return jnp.concatenate((q, k, v), axis=-1)

    ways = {"xla": together, "triton": together}
    unable = {"triton": 'takes no heads of several devices; use "xla".'}
    how = implementation or "xla"
    run = dispatch.resolve("norm_of_all_heads", how, ways, unable=unable)
    return along(run, ("B T Q", "Q", "Q"), "B T Q")(qkv, q_norm, k_norm)


def choose(worth: bool) -> Implementation:
    """Return the implementation that `None` stands for.

    Args:
      worth: whether Triton's version is the best one where it can run.
    """
    able = worth and not dispatch.triton_unavailable()
    return "triton" if able else "xla"


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Normalise the last axis to unit root mean square, then scale by `weight`."""
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return _scaled(x, square, weight, eps)


def _scaled(x, square, weight, eps):
    """Return `x` over the root of a mean square, times `weight`."""
    weight = jnp.expand_dims(weight, range(x.ndim - 1))
    normed = (x.astype(jnp.float32) * jax.lax.rsqrt(square + eps)).astype(x.dtype)
    if weight.dtype == x.dtype:
        return normed * weight
    return (normed.astype(jnp.float32) * weight.astype(jnp.float32)).astype(x.dtype)


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
_ROTATIONS: dict[str, Callable[..., Heads]] = {
    "xla": _split_and_rotate_xla,
    "triton": split_and_rotate_triton,
}
