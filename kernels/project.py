"""Products of tokens with a layer's matrices, shaped for what comes after them.

A decode step of a small batch waits for its weights and for its launches. So a product
may be returned in parts, which the launch that reads it adds up (`pointwise`), and the
gates of the feed-forward are applied where they are computed.

Triton's products of a token are the same bits whatever tokens are beside it, up to 64
of them. XLA chooses the order of a sum by their number.

Under a mesh every device multiplies with its own part of a matrix. What is cut along
its columns gives columns; what is cut along its rows gives sums over some of the depth
in the dtype of the tokens. Of few tokens they stay parts, one of each device of a row;
of many the devices add them up. So under a mesh the bits of a token may depend on how
many are beside it.

Axis letters: `P` parts, `B` batch, `T` tokens, `D` depth, `F` columns, `V` vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxkv.kernels import dispatch
from jaxkv.kernels.per_shard import (
    add_up,
    along,
    columns_per_row,
    current_mesh,
    first_of_shard,
    parts_of_row,
    per_shard,
)
from jaxkv.kernels.pointwise import Implementation, choose, join
from jaxkv.kernels.project_triton import (
    project_gated_triton,
    project_triton,
    unembed_triton,
    unsupported,
)
from jaxkv.kernels.shapes import checked

Activation = Literal["silu", "gelu_tanh"]
Cut = Literal["heads", "rows"]


@checked
def project(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D F"],
    *,
    cut: Cut | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "P B T F"]:
    """Multiply tokens by a matrix.

    Args:
      x: tokens.
      weight: the matrix.
      cut: how the devices of a row share the matrix out under a mesh: "heads" is along
        its columns, "rows" along its rows; with None each has all of it.
      implementation: "xla" (anywhere), "triton" (NVIDIA, up to 64 tokens in 16 bits),
        or None for the best one.

    Returns:
      Parts, whose sum over `P` is the product: one in the dtype of `x`, or several in
      float32. `pointwise.join` adds them.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    run = functools.partial(_run, "project", implementation, _PRODUCTS)
    if cut == "heads":
        return along(run, ("B T D", "D Q"), "P B T Q")(x, weight)
    if cut == "rows" and current_mesh() is not None:
        run = _of_all_devices(run, columns_per_row())
        return along(run, ("B T F", "F D"), "P B T D")(x, weight)
    return along(run, ("B T D", "D C"), "P B T C")(x, weight)


@checked
def project_gated(
    x: Float[Array, "B T D"],
    weight: Float[Array, "D G"],
    *,
    activation: Activation = "silu",
    implementation: Implementation | None = None,
) -> Float[Array, "B T F"]:
    """Return `silu(x @ gate) * (x @ up)`, the inner half of a gated feed-forward.

    Args:
      x: tokens.
      weight: gate beside up, `G = 2 F` columns. Under a mesh each device's columns of
        gate lie beside those of up, one device after the other.
      activation: of the gate. "gelu_tanh" is GELU by its formula with tanh, which
        "xla" alone computes.
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
    run = functools.partial(_run, where, implementation, _GATED)
    if activation != "silu":
        reason = f'computes no activation="{activation}"; use "xla".'
        dispatch.resolve(
            where, implementation or "xla", _GATED, unable={"triton": reason}
        )
        run = functools.partial(_project_gated_xla, activation=activation)
    return along(run, ("B T D", "D F"), "B T F")(x, weight)


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
    run = functools.partial(_run, where, implementation, _LOGITS, tied=tied)
    return along(run, ("B T D", "V D" if tied else "D V"), "B T V")(x, weight)


@checked
def embed(
    tokens: Int[Array, "B T"], embedding: Float[Array, "V D"]
) -> Float[Array, "B T D"]:
    """Look tokens up.

    Under a mesh each device looks up those that lie in its part of the vocabulary.

    Raises:
      ValueError: shapes disagree.
    """
    if current_mesh() is None:
        return embedding[tokens]
    return per_shard(_embed_part, embed)(tokens, embedding)


def _embed_part(tokens, embedding):
    size = len(embedding)
    index = tokens - first_of_shard(size)
    here = (index >= 0) & (index < size)
    found = embedding[jnp.clip(index, 0, size - 1)]
    return add_up(jnp.where(here[..., None], found, 0))


def _of_all_devices(run, devices):
    """Return `run` with its own parts added, and with those of a row's devices."""

    def whole(x, weight):
        return parts_of_row(join(run(x, weight), x.dtype), devices)

    return whole


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


def _run(where, implementation, table, x, weight, **options):
    """Run on what this device has."""
    reason = unsupported(x, weight, gated=table is _GATED, vocabulary=table is _LOGITS)
    if implementation is None:
        implementation = choose(not reason)
    run = dispatch.resolve(where, implementation, table, unable={"triton": reason})
    return run(x, weight, **options)


def _project_xla(x, weight):
    return _product(x, weight)[None]


def _project_gated_xla(x, weight, *, activation: Activation = "silu"):
    gate, up = jnp.split(_product(x, weight), 2, axis=-1)
    return (jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate)) * up


def _unembed_xla(x, weight, *, tied):
    return jnp.einsum("btd,vd->btv", x, weight) if tied else x @ weight


_PRODUCTS = {"xla": _project_xla, "triton": project_triton}
_GATED: dict[str, Callable[..., Any]] = {
    "xla": _project_gated_xla,
    "triton": project_gated_triton,
}
_LOGITS = {"xla": _unembed_xla, "triton": unembed_triton}
