"""One place for the messages of misshapen arguments."""

from collections.abc import Mapping

import jax


def check_shape(where: str, **arrays: tuple[jax.Array, str]) -> Mapping[str, int]:
    """Check that arrays agree with their axis letters and with each other.

    Args:
      where: the caller's name, for the message.
      **arrays: name to (array, letters), e.g. `query=(q, "B N H")`.

    Returns:
      Size of each letter.

    Raises:
      ValueError: a rank or a size does not fit; the message says which.
    """
    sizes: dict[str, int] = {}
    for name, (array, letters) in arrays.items():
        axes = letters.split()
        if len(axes) != array.ndim:
            raise ValueError(
                f"{where}: {name} must have the axes [{', '.join(axes)}], "
                f"got shape {array.shape}."
            )
        for axis, size in zip(axes, array.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(
                    f"{where}: axis {axis} of {name} is {size}, "
                    f"but it was {sizes[axis]} before; {name} has shape {array.shape}."
                )
    return sizes


def check_groups(where: str, num_heads: int, num_kv_heads: int) -> int:
    """Return query heads per key/value head, or raise ValueError."""
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{where}: {num_heads} query heads must be a multiple of "
            f"{num_kv_heads} key/value heads."
        )
    return num_heads // num_kv_heads
