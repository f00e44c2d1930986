"""Rotary positions: bases, scalings, and the frequencies that they give.

Axis letters: `B` batch, `T` tokens, `H` head size.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.kernels import rotary


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation (Chen et al., arXiv 2306.15595; `rope_type: linear`).

    Attributes:
      factor: slow-down of all frequencies.
    """

    factor: float


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
class YarnScaling:
    """YaRN (Peng et al., arXiv 2309.00071, section 3; `rope_type: yarn`).

    Attributes:
      factor: slow-down of the low frequencies.
      original_max_positions: context of the first training stage, in tokens.
      beta_fast: frequencies that turn more often than that within it are left alone.
      beta_slow: those that turn less often are slowed down; between is a ramp.
      truncate: whether the ramp begins and ends at whole indices of frequencies.
      attention_factor: multiplies the rotated queries and keys.
    """

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (Ding et al., arXiv 2402.13753; `rope_type: longrope`).

    One set of divisors serves a network, whatever the length of a sequence: keys in a
    cache were rotated once, and what a row gets depends on no other row. That is the
    long one if `Config.max_positions` exceeds `original_max_positions`, else the short
    one. transformers decides at each call, by the longest sequence of the batch.

    Attributes:
      short_factors: what each rotary frequency is divided by in short sequences.
      long_factors: likewise in long ones.
      original_max_positions: the longest short sequence, in tokens.
      attention_factor: multiplies the rotated queries and keys, of either set.
    """

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_positions: int
    attention_factor: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequencyFactors:
    """Rotary scaling as GGUF files store it, worked out.

    Attributes:
      factors: what each rotary frequency is divided by, `[H / 2]`.
    """

    factors: tuple[float, ...]


Scaling = (
    LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | FrequencyFactors
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How the queries and keys of a layer are rotated.

    Attributes:
      theta: base of the frequencies.
      scaling: of the frequencies, or None.
      rotary_dim: how many dimensions of a head are rotated, the first ones in the
        checkpoint; None is all. See `head_order`.
    """

    theta: float = 10_000.0
    scaling: Scaling | None = None
    rotary_dim: int | None = None

    @property
    def attention_factor(self) -> float:
        """What the rotated queries and keys are multiplied by."""
        return getattr(self.scaling, "attention_factor", 1.0)


PLAIN = Rope()


def frequencies(rope: Rope | None, head_dim: int, max_positions: int) -> jax.Array:
    """Return the rotary frequencies, float32 `[H / 2]`, in radians per position.

    Args:
      rope: None rotates nothing.
      head_dim: `H`.
      max_positions: of the network, see `LongRopeScaling`.

    Returns:
      The frequencies; those of dimensions that are not rotated are 0, and last.
    """
    if rope is None:
        return jnp.zeros(head_dim // 2, jnp.float32)
    dim = rope.rotary_dim or head_dim
    exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    plain = 1.0 / (rope.theta**exponents)
    scaled = _scaled(plain, rope, dim, max_positions)
    return jnp.pad(scaled, (0, (head_dim - dim) // 2))


def reach(rope: Rope, max_positions: int) -> int:
    """Return the longest sequence of a network, in tokens.

    Args:
      rope: its rotation. YaRN is often added to a checkpoint that says nothing else of
        the sequences it then takes.
      max_positions: what the checkpoint says.
    """
    if not isinstance(rope.scaling, YarnScaling):
        return max_positions
    scaled = rope.scaling.factor * rope.scaling.original_max_positions
    return max(max_positions, int(scaled))


def table(
    rope: Rope | None, positions: jax.Array, head_dim: int, max_positions: int
) -> tuple[jax.Array, jax.Array]:
    """Return what queries and keys are multiplied with, float32 `[B, T, H / 2]`.

    These are the cosines and sines of the angles, times the scaling's factor. It is the
    same for both numbers of a pair, so that it may as well have multiplied them before
    the rotation: who turns queries back or ahead does so by `frequencies` alone.

    Args:
      rope: see `frequencies`.
      positions: integers `[B, T]`.
      head_dim: `H`.
      max_positions: of the network, see `LongRopeScaling`.
    """
    turn = frequencies(rope, head_dim, max_positions)
    cos, sin = rotary.table(positions, turn)
    if rope is None or rope.attention_factor == 1.0:
        return cos, sin
    # A dimension that is not rotated is not scaled, either.
    rotated = (rope.rotary_dim or head_dim) // 2
    factors = np.full(head_dim // 2, 1.0, np.float32)
    factors[:rotated] = rope.attention_factor
    return cos * factors[None, None], sin * factors[None, None]


def head_order(
    rope: Rope | None, head_dim: int, *, interleaved: bool = False
) -> np.ndarray | None:
    """Return where each dimension of a query or key belongs, int `[H]`.

    The network pairs dimension `i` with `i + H / 2`. Where a checkpoint rotates the
    first `R` dimensions only, it pairs `i` with `i + R / 2`; the others are shared out
    behind both halves of these, where a frequency of 0 leaves them alone. Since queries
    and keys are ordered alike, no logit changes.

    Args:
      rope: None is ordered as if all were rotated.
      head_dim: `H`.
      interleaved: whether the checkpoint pairs `2 i` with `2 i + 1` instead.

    Returns:
      The order, or None where each stays in its place.
    """
    rotated = (rope and rope.rotary_dim) or head_dim
    half, rest = rotated // 2, (head_dim - rotated) // 2
    if not rest and not interleaved:
        return None
    own = np.arange(rotated)
    side, pair = (own % 2, own // 2) if interleaved else (own // half, own % half)
    others = np.arange(2 * rest)
    return np.concatenate(
        [
            side * (head_dim // 2) + pair,
            others // max(rest, 1) * (head_dim // 2) + half + others % max(rest, 1),
        ]
    )


def _scaled(plain: jax.Array, rope: Rope, dim: int, max_positions: int) -> jax.Array:
    """Return frequencies `[dim / 2]` as their scaling has them."""
    match rope.scaling:
        case None:
            return plain
        case LinearScaling(factor=factor):
            return plain / factor
        case FrequencyFactors(factors=factors):
            return plain / jnp.asarray(factors, jnp.float32)
        case LongRopeScaling() as scaling:
            long = max_positions > scaling.original_max_positions
            factors = scaling.long_factors if long else scaling.short_factors
            return plain / jnp.asarray(factors, jnp.float32)
        case YarnScaling() as scaling:
            return _interpolated(plain, _yarn_ramp(scaling, rope.theta, dim), scaling)
        case Llama3Scaling() as scaling:
            wavelengths = 2 * math.pi / plain
            ratio = scaling.original_max_positions / wavelengths
            span = scaling.high_freq_factor - scaling.low_freq_factor
            kept = jnp.clip((ratio - scaling.low_freq_factor) / span, 0.0, 1.0)
            return _interpolated(plain, kept, scaling)


def _interpolated(
    plain: jax.Array, kept: jax.Array, scaling: Llama3Scaling | YarnScaling
) -> jax.Array:
    """Slow frequencies down by the factor, but for the share of each that is kept."""
    return (1 - kept) * plain / scaling.factor + kept * plain


def _yarn_ramp(scaling: YarnScaling, theta: float, dim: int) -> jax.Array:
    """Return which share of each frequency is kept, float32 `[dim / 2]`."""

    def index(turns: float) -> float:
        """Return where a frequency stands that makes so many turns."""
        wavelength = scaling.original_max_positions / turns
        return dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    first, last = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The bounds, and the step where both are one, are those of transformers.
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 0.001
    steps = (jnp.arange(dim // 2, dtype=jnp.float32) - first) / width
    return 1 - jnp.clip(steps, 0.0, 1.0)
