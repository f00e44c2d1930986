"""The rotation of a network out of the metadata and the tensors of a GGUF file.

The keys mean what llama.cpp makes of them.
"""

import math

import numpy as np

from jaxkv.models import checkpoint_values as values
from jaxkv.models.checkpoint import CheckpointError
from jaxkv.models.gguf.header import Header
from jaxkv.models.gguf.keys import Keys
from jaxkv.models.rope import (
    FrequencyFactors,
    LinearScaling,
    LongRopeScaling,
    Rope,
    Scaling,
    YarnScaling,
)

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = frozenset((FREQUENCIES, LONG, SHORT))
KEYS = frozenset(
    "rope.dimension_count rope.freq_base rope.scale_linear rope.scaling.attn_factor "
    "rope.scaling.factor rope.scaling.original_context_length rope.scaling.type "
    "rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast "
    "rope.scaling.yarn_beta_slow rope.scaling.yarn_ext_factor "
    "rope.scaling.yarn_log_multiplier".split()
)


def read_rope(
    header: Header, keys: Keys, *, head_dim: int, max_positions: int, partial: bool
) -> Rope:
    """Return the rotation of all layers.

    Args:
      header: of the file.
      keys: of its architecture.
      head_dim: of the network.
      max_positions: of the network, in tokens.
      partial: whether the architecture may rotate a part of each head.

    Raises:
      CheckpointError: a key or tensor is damaged, or the network does not compute it.
    """
    rotated = keys.integer("rope.dimension_count", head_dim)
    if rotated != head_dim and (not partial or rotated % 2 or rotated > head_dim):
        values.unsupported(f"{keys.prefix}rope.dimension_count", rotated, head_dim)
    theta = keys.number("rope.freq_base", 10_000.0)
    scaling = _scaling(header, keys, rotated, max_positions)
    if isinstance(scaling, YarnScaling) and theta <= 1:
        raise CheckpointError(
            f"{keys.prefix}rope.freq_base must be above 1 for YaRN, found {theta}."
        )
    return Rope(
        theta=theta,
        scaling=scaling,
        rotary_dim=None if rotated == head_dim else rotated,
    )


def _scaling(
    header: Header, keys: Keys, rotated: int, max_positions: int
) -> Scaling | None:
    original = keys.integer("rope.scaling.original_context_length", max_positions)
    kind = keys.raw.get("rope.scaling.type", "linear")
    if kind == "yarn":
        for tensor in TENSORS & header.tensors.keys():
            raise CheckpointError(f"tensor {tensor} is not supported beside YaRN.")
        return _yarn(keys, original)
    stored = {
        name: _numbers(header, name, rotated // 2)
        for name in TENSORS
        if name in header.tensors
    }
    if not stored:
        keys.refuse("rope.scaling.type", "linear", "none", "yarn")
        keys.refuse("rope.scaling.attn_factor", 1)
        if kind == "none":
            keys.refuse("rope.scaling.factor", 0, 1)
        factors = [
            keys.number(key)
            for key in ("rope.scaling.factor", "rope.scale_linear")
            if keys.raw.get(key, 0) not in (0, 1)
        ]
        return LinearScaling(factor=factors[0]) if factors else None
    keys.refuse("rope.scaling.type", "linear", "none", "longrope")
    keys.refuse("rope.scaling.factor", 0, 1)
    keys.refuse("rope.scale_linear", 0, 1)
    if stored.keys() == {FREQUENCIES}:
        keys.refuse("rope.scaling.attn_factor", 1)
        return FrequencyFactors(factors=stored[FREQUENCIES])
    if stored.keys() != {LONG, SHORT}:
        raise CheckpointError(
            f"tensors {', '.join(sorted(stored))} must be {LONG} and {SHORT}, or "
            f"{FREQUENCIES}."
        )
    return LongRopeScaling(
        short_factors=stored[SHORT],
        long_factors=stored[LONG],
        original_max_positions=original,
        attention_factor=keys.number("rope.scaling.attn_factor", 1.0),
    )


def _yarn(keys: Keys, original: int) -> YarnScaling:
    keys.refuse("rope.scaling.yarn_ext_factor", 1)
    keys.refuse("rope.scaling.yarn_log_multiplier", 0)
    factor = keys.number("rope.scaling.factor")
    strength = 1.0 if factor <= 1 else 1.0 + 0.1 * math.log(factor)
    # As the converter writes it; llama.cpp works it out anew.
    written = keys.number("rope.scaling.yarn_attn_factor", strength)
    if not math.isclose(written, strength, rel_tol=1e-5):
        values.unsupported(
            f"{keys.prefix}rope.scaling.yarn_attn_factor", written, strength
        )
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=strength * keys.number("rope.scaling.attn_factor", 1.0),
    )


def _numbers(header: Header, name: str, count: int) -> tuple[float, ...]:
    """Return the divisors of the rotary frequencies that a tensor holds."""
    tensor = header.tensors[name]
    if (tensor.shape, tensor.type) != ((count,), "F32"):
        raise CheckpointError(
            f"tensor {name} must have shape {(count,)} and type F32, found "
            f"{tensor.shape} and {tensor.type}."
        )
    stored = np.fromfile(header.path, "<f4", count=count, offset=tensor.offset).tolist()
    if not all(0 < factor < float("inf") for factor in stored):
        raise CheckpointError(
            f"tensor {name} must hold positive numbers, found {values.shown(stored)}."
        )
    return tuple(stored)
