"""Products of tokens with a layer's matrices, shaped for what comes after them.

A decode step of a small batch waits for its weights and for its launches. So a product
may be returned in parts, which the launch that reads it adds up (`pointwise`), and the
gates of the feed-forward are applied where they are computed.

Triton's products of a token are the same bits whatever tokens are beside it, up to 64
of them. XLA chooses the order of a sum by their number.

Axis letters: `P` parts, `B` batch, `T` tokens, `D` depth, `F` columns, `V` vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkv.kernels import dispatch
from jaxkv.kernels.pointwise import Implementation, choose
from jaxkv.kernels.project_triton import (
    project_gated_triton,
    project_triton,
    unembed_triton,
    unsupported,
)
from jaxkv.kernels.shapes import checked


@checked
def project(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D F"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "P B T F"]:
    """Multiply tokens by a matrix.

    Args:
      x: tokens.
      weight: the matrix.
      implementation: "xla" (anywhere), "triton" (NVIDIA, up to 64 tokens in 16 bits),
        or None for the best one.

    Returns:
      Parts, whose sum over `P` is the product: one in the dtype of `x`, or several in
      float32. `pointwise.join` adds them.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    return _run("project", implementation, x, weight, _PRODUCTS)


@checked
def project_gated(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D G"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B T F"]:
    """Return `silu(x @ gate) * (x @ up)`, the inner half of a gated feed-forward.

    Args:
      x: tokens.
      weight: gate beside up, `G = 2 F` columns.
      implementation: as in `project`.

    Returns:
      The product in the dtype of `x`. Triton rounds once, at the end.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    where = "project_gated"
    if weight.shape[1] % 2:
        raise ValueError(
            f"{where}: weight holds gate beside up, but has {weight.shape[1]} columns."
        )
    return _run(where, implementation, x, weight, _GATED)


@checked
def unembed(
    x: Float[Array, "B T D"],
    weight: Float[Array, "R C"],
    *,
    tied: bool,
    implementation: Implementation | None = None,
) -> Float[Array, "B T V"]:
    """Multiply tokens by the output layer.

    Args:
      x: tokens.
      weight: `[D, V]`, or if `tied` `[V, D]`, an embedding.
      tied: see `weight`.
      implementation: as in `project`.

    Returns:
      The logits, in the dtype of `x`.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    where = "unembed"
    if weight.shape[tied] != x.shape[2]:
        axes = "[V D]" if tied else "[D V]"
        raise ValueError(
            f"{where}: weight must be {axes} with D={x.shape[2]}, got "
            f"[{weight.shape[0]} {weight.shape[1]}]."
        )
    reason = unsupported(x, weight, vocabulary=True)
    if implementation is None:
        implementation = choose(not reason)
    run = dispatch.resolve(where, implementation, _LOGITS, unable={"triton": reason})
    return run(x, weight, tied=tied)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiply; a single token on a GPU as if it were two.

    Of a row times a matrix of less than 10^7 numbers XLA:GPU makes a product of all
    their numbers, rounded to the dtype of `x` and stored, and a second launch that adds
    them up. That is three times the bytes.
    """
    if x.shape[:2] != (1, 1) or jax.default_backend() != "gpu":
        return x @ weight
    pair = jnp.broadcast_to(x, (2, *x.shape[1:]))
    return (pair @ weight)[:1]


def _run(where, implementation, x, weight, table):
    reason = unsupported(x, weight, gated=table is _GATED)
    if implementation is None:
        implementation = choose(not reason)
    run = dispatch.resolve(where, implementation, table, unable={"triton": reason})
    return run(x, weight)


def _project_xla(x, weight):
    return _product(x, weight)[None]


def _project_gated_xla(x, weight):
    gate, up = jnp.split(_product(x, weight), 2, axis=-1)
    return jax.nn.silu(gate) * up


def _unembed_xla(x, weight, *, tied):
    return jnp.einsum("btd,vd->btv", x, weight) if tied else x @ weight


_PRODUCTS = {"xla": _project_xla, "triton": project_triton}
_GATED = {"xla": _project_gated_xla, "triton": project_gated_triton}
_LOGITS = {"xla": _unembed_xla, "triton": unembed_triton}
