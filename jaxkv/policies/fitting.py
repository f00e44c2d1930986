"""Whether arrays have the shapes and dtypes that somebody asked for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Misfit(ValueError):
    """An array that does not fit; `jaxkv.policies.contract` says whose it is."""


def fit(
    name: str,
    array: Any,
    axes: str,
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
) -> None:
    """Raise Misfit unless an array has this shape and dtype.

    Args:
      name: of the array.
      array: whatever came.
      axes: what the axes are called, such as "B K S".
      shape: wanted.
      dtype: wanted; `jnp.floating` is any of its kind.
    """
    kind = dtype is jnp.floating
    wanted = f"{'floating-point' if kind else jnp.dtype(dtype)} [{axes}]={list(shape)}"
    if not isinstance(array, jax.Array | np.ndarray):
        came = type(array).__name__
        raise Misfit(f"{name} must be an array, {wanted}, got {came}.")
    right = jnp.issubdtype(array.dtype, dtype) if kind else array.dtype == dtype
    if array.shape == shape and right:
        return
    hint = ""
    if array.shape != shape and sorted(array.shape) == sorted(shape):
        hint = " Its axes are in another order."
    raise Misfit(
        f"{name} must be {wanted}, got {array.dtype} {list(array.shape)}.{hint}"
    )
