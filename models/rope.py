"""Rotary positions: bases, scalings, and the frequencies that they give.

Axis letters: `H` head size.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Rotary scaling of Llama 3.1 and later (`rope_type: llama3`).

    Attributes:
      factor: slow-down of the low frequencies.
      low_freq_factor: wavelengths longer than `original_max_positions /
        low_freq_factor` are scaled by `factor`.
      high_freq_factor: wavelengths shorter than `original_max_positions /
        high_freq_factor` are left alone; those between are interpolated.
      original_max_positions: context of the first training stage, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequencyFactors:
    """Rotary scaling as GGUF files store it, worked out.

    Attributes:
      factors: what each rotary frequency is divided by, `[H / 2]`.
    """

    factors: tuple[float, ...]


Scaling = Llama3Scaling | FrequencyFactors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How the queries and keys of a layer are rotated.

    Attributes:
      theta: base of the frequencies.
      scaling: of the frequencies, or None.
    """

    theta: float = 10_000.0
    scaling: Scaling | None = None


PLAIN = Rope()


def frequencies(rope: Rope, head_dim: int) -> jax.Array:
    """Return the rotary frequencies, float32 `[H / 2]`, in radians per position."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    plain = 1.0 / (rope.theta**exponents)
    scaling = rope.scaling
    if scaling is None:
        return plain
    if isinstance(scaling, FrequencyFactors):
        return plain / jnp.asarray(scaling.factors, jnp.float32)
    wavelengths = 2 * math.pi / plain
    ratio = scaling.original_max_positions / wavelengths
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = jnp.clip((ratio - scaling.low_freq_factor) / span, 0.0, 1.0)
    return (1 - smooth) * plain / scaling.factor + smooth * plain
