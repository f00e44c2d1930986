"""Parameters that lie over several devices, each reading its own part of a file."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxkv.models.layout import Spans

Span = tuple[int, int]
# Of a matrix `[out, in]`, or of numbers `[out]`: some rows, and some of their columns.
Read = Callable[[Span, Span | None], np.ndarray]


def is_cut(where: Any) -> bool:
    """Return whether that is a sharding over a mesh, so that parts are to be read."""
    return isinstance(where, jax.sharding.NamedSharding)


def place(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    read: Read,
    spans: Callable[[int, int], Spans],
    *,
    turned: bool,
) -> jax.Array:
    """Return an array of which each device has read its own part.

    Args:
      shape: of the whole, `[in, out]` if it is turned.
      sharding: where it goes.
      read: of the file; called once for parts that several devices hold.
      spans: which rows of the file stand for a run of those of the parameter.
      turned: whether the file holds the matrix the other way.
    """
    made: dict[tuple[Span, ...], np.ndarray] = {}

    def part(index):
        first, *others = (
            (start, stop)
            for start, stop, _ in (
                along.indices(size) for along, size in zip(index, shape, strict=True)
            )
        )
        key = first, *others
        if key not in made:
            rows, *columns = reversed(key) if turned else key
            pieces = [read(span, *(columns or [None])) for span in spans(*rows)]
            whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            made[key] = whole.T if turned else whole
        return made[key]

    return jax.make_array_from_callback(shape, sharding, part)


def put(array: np.ndarray, where: Any, columns: np.ndarray | None) -> jax.Array:
    """Put a whole parameter on a device, on the default one, or over a mesh."""
    if is_cut(where):
        return distribute(array, where, columns)
    return jax.device_put(array, where)


def distribute(
    whole: np.ndarray, sharding: jax.sharding.Sharding, columns: np.ndarray | None
) -> jax.Array:
    """Give each device its part of an array, once its columns are laid out.

    Args:
      whole: of the checkpoint, on the host.
      sharding: where it goes.
      columns: which column lies in each place; see `layout.order`.
    """

    def part(index: Any) -> np.ndarray:
        if columns is None:
            return whole[index]
        *others, last = index
        laid: Any = (*others, columns[last])
        return whole[laid]

    return jax.make_array_from_callback(whole.shape, sharding, part)
