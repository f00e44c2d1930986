"""Rotary position embedding, in the half-split layout of Hugging Face.

Axis letters: `B` batch, `T` tokens, `H` head size.
"""

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, positions: jax.Array, frequencies: jax.Array) -> jax.Array:
    """Rotate heads by their position; negative positions rotate back.

    Args:
      x: `[B, T, heads, H]`.
      positions: `[B, T]` integer positions.
      frequencies: float32 `[H / 2]`, in radians per position.

    Returns:
      `x` rotated, in its own dtype; the arithmetic is float32.
    """
    cos, sin = table(positions, frequencies)
    return turn(x, cos[:, :, None], sin[:, :, None])


def table(positions: jax.Array, frequencies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cosine and sine, float32 `[B, T, H / 2]`, of the angles of RoPE.

    Args:
      positions: integers `[B, T]`.
      frequencies: float32 `[H / 2]`, in radians per position.
    """
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the pairs `(i, i + H / 2)` of the last axis of `x`.

    Args:
      x: `[..., H]`.
      cos: float32, broadcasts against `[..., H / 2]`.
      sin: float32, likewise. Averages of cosines and sines over positions give the
        average of the turned `x`.

    Returns:
      The result, in the dtype of `x`; the arithmetic is float32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
    return turned.astype(x.dtype)
