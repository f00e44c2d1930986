"""What a layer does between its attention and its gates, as it reads and writes.

A block of a layer reads the normalised residual stream and adds to it. Launch by
launch, that is a sum with a norm, a product, and for heads their norms and rotations;
"fused" does each of these operations in one launch.

Axis letters: `P` parts, `B` batch, `T` tokens, `D` hidden, `Q` columns of heads, `F`
columns, `G` two of them, `H` head size, `R` angles.
"""

from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Float32

from jaxkv.kernels import block_triton, dispatch, pointwise, project
from jaxkv.kernels.cache import Heads
from jaxkv.kernels.per_shard import current_mesh
from jaxkv.kernels.pointwise import join
from jaxkv.kernels.project_triton import project_gated_triton
from jaxkv.kernels.shapes import checked

Implementation = Literal["xla", "triton", "fused"]


@checked
def read_heads(
    x: Float[Array, "B T D"],
    delta: Float[Array, "P B T D"] | None,
    norm: Float[Array, " D"],
    weight: Float[Array, "D Q"],
    q_norm: Float[Array, " H"] | None,
    k_norm: Float[Array, " H"] | None,
    cos: Float32[Array, "B T R"],
    sin: Float32[Array, "B T R"],
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, Heads]:
    """Return queries, keys and values of the normalised residual stream, rotated.

    Args:
      x: the residual stream.
      delta: its sum over `P` is added first, unless it is None.
      norm: weight of the norm.
      weight: of the fused projection, cut along its heads under a mesh.
      q_norm: as in `pointwise.split_and_rotate`, and so are the next three.
      k_norm: see there.
      cos: see there.
      sin: see there.
      num_heads: of the queries.
      num_kv_heads: of keys and values.
      eps: of all norms.
      implementation: "xla" (anywhere), "triton" (NVIDIA, up to 64 tokens in 16 bits),
        "fused" (likewise, in bfloat16, on one device), or None for the best one.

    Returns:
      The residual stream with `delta` in it, and the heads.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    heads: dict[str, Any] = dict(num_heads=num_heads, num_kv_heads=num_kv_heads)
    reason = unfusable(x, weight, half=cos.shape[-1])
    if fuses("read_heads", implementation, reason):
        x = added(x, delta)
        arrays = x, norm, weight, q_norm, k_norm, cos, sin
        return x, block_triton.project_heads_triton(*arrays, **heads, eps=eps)
    how = apart(implementation)
    x, normed = pointwise.add_rms_norm(x, delta, norm, eps=eps, implementation=how)
    qkv = project.project(normed, weight, cut="heads", implementation=how)
    return x, pointwise.split_and_rotate(
        *(qkv, q_norm, k_norm, cos, sin),
        **heads,
        eps=eps,
        dtype=x.dtype,
        implementation=how,
    )


@checked
def read_gated(
    x: Float[Array, "B T D"],
    delta: Float[Array, "P B T D"] | None,
    norm: Float[Array, " D"],
    weight: Float[Array, "D G"],
    *,
    activation: project.Activation = "silu",
    eps: float,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the inner half of a gated feed-forward of the normalised stream.

    Args:
      x: the residual stream.
      delta: as in `read_heads`.
      norm: weight of the norm.
      weight: as in `project.project_gated`.
      activation: see there; "fused" computes "silu" alone.
      eps: of the norm.
      implementation: as in `read_heads`.

    Returns:
      The residual stream with `delta` in it, and the inner half `[B, T, F]`.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    reason = unfusable(x, weight, gated=True)
    if activation != "silu":
        reason = f'computes no activation="{activation}"; use "xla".'
    if fuses("read_gated", implementation, reason):
        x = added(x, delta)
        return x, project_gated_triton(x, weight, norm=norm, eps=eps)
    how = apart(implementation)
    x, normed = pointwise.add_rms_norm(x, delta, norm, eps=eps, implementation=how)
    return x, project.project_gated(
        normed, weight, activation=activation, implementation=how
    )


@checked
def add_product(
    x: Float[Array, "B T D"],
    inner: Float[Array, "B T F"],
    weight: Float[Array, "F D"],
    *,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Add a product to the residual stream, or return what is to be added to it.

    Args:
      x: the residual stream.
      inner: what a block has made of it.
      weight: the matrix, cut along its rows under a mesh.
      implementation: as in `read_heads`. Only "fused" adds; what reads the stream next
        does it for the others, in the launch of its norm.

    Returns:
      The residual stream; and parts `[P, B, T, D]` that are to be added, or None.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    if fuses("add_product", implementation, unfusable(inner, weight)):
        return block_triton.project_add_triton(x, inner, weight), None
    how = apart(implementation)
    return x, project.project(inner, weight, cut="rows", implementation=how)


def added(x: jax.Array, delta: jax.Array | None) -> jax.Array:
    """Return the residual stream with parts added, in its dtype."""
    return x if delta is None else x + join(delta, x.dtype)


def apart(implementation: Implementation | None) -> pointwise.Implementation | None:
    """Return how to do launch by launch what is not fused."""
    return "triton" if implementation == "fused" else implementation


def unfusable(x, weight, *, half: int = 64, gated: bool = False) -> str:
    """Return why one launch cannot do it, or an empty string."""
    if current_mesh() is not None:
        return "runs on one device, but a mesh is set."
    return block_triton.unsupported(x, weight, half=half, gated=gated)


def fuses(where: str, implementation: str | None, reason: str) -> bool:
    """Return whether an operation is done in one launch; raise where it cannot be."""
    if implementation is None:
        return False
    names = dict.fromkeys(("xla", "triton", "fused"), bool)
    return dispatch.resolve(where, implementation, names, unable={"fused": reason})(
        implementation == "fused"
    )
