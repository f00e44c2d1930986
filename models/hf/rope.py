"""The rotation of a network's layers out of a Hugging Face configuration."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jaxkv.models.checkpoint import CheckpointError
from jaxkv.models.checkpoint_values import integer, number, unsupported
from jaxkv.models.config import LayerKind
from jaxkv.models.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    Scaling,
    YarnScaling,
)

_ORIGINAL = "original_max_position_embeddings"
_PARTIAL = "partial_rotary_factor"
# What each scaling reads; the default's keys may stand beside those of any other.
_KEYS: dict[str, set[str]] = {
    "default": {"rope_type", "type", "rope_theta", _PARTIAL, "factor", _ORIGINAL},
    "linear": set(),
    "dynamic": set(),
    "yarn": {
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        "attention_factor",
    },
    "longrope": {"short_factor", "long_factor", "attention_factor"},
    "llama3": {"low_freq_factor", "high_freq_factor"},
}
NO_ROPE = frozenset(("no_rope_layers", "no_rope_layer_interval"))
LAYER_TYPES = "full_attention", "sliding_attention"


def read_ropes(
    raw: dict[str, Any],
    default: dict[str, Any],
    *,
    max_positions: int,
    head_dim: int,
    by_type: bool = False,
    partial: bool = False,
    longrope: Sequence[str] = (),
) -> dict[str, Rope]:
    """Return the rotation of each type of layer; see `read_rope`.

    Args:
      raw: of `config.json`.
      default: what transformers takes for absent keys.
      max_positions: of the network, in tokens.
      head_dim: of the network.
      by_type: whether the settings are an object for each type of layer.
      partial: whether the family may rotate a part of each head.
      longrope: other names of that scaling in the family.
    """

    def read(layer_type: str | None) -> Rope:
        return read_rope(
            *(raw, default),
            max_positions=max_positions,
            head_dim=head_dim,
            partial=partial,
            longrope=longrope,
            layer_type=layer_type,
        )

    if by_type:
        return {layer_type: read(layer_type) for layer_type in LAYER_TYPES}
    return dict.fromkeys(LAYER_TYPES, read(None))


def without_rope(
    kinds: tuple[LayerKind, ...], raw: dict[str, Any], default: dict[str, Any]
) -> tuple[LayerKind, ...]:
    """Return the kinds of layers, of which some have no rotation (SmolLM3).

    Args:
      kinds: of all layers, as if each had one.
      raw: of `config.json`; 1 in `no_rope_layers` is a layer with rotation.
      default: what transformers takes for absent keys.

    Raises:
      CheckpointError: a key is damaged.
    """
    usual = default["no_rope_layer_interval"]
    interval = integer(raw, "no_rope_layer_interval", usual)
    rotated = raw.get("no_rope_layers")
    if rotated is None:
        rotated = [int(layer % interval != 0) for layer in range(1, len(kinds) + 1)]
    if (
        not isinstance(rotated, list)
        or len(rotated) != len(kinds)
        or any(type(one) is not int or one not in (0, 1) for one in rotated)
    ):
        unsupported("no_rope_layers", rotated, f"a list of {len(kinds)} ones and zeros")
    return tuple(
        kind if one else dataclasses.replace(kind, rope=None)
        for kind, one in zip(kinds, rotated, strict=True)
    )


def read_rope(
    raw: dict[str, Any],
    default: dict[str, Any],
    *,
    max_positions: int,
    head_dim: int,
    partial: bool = False,
    longrope: Sequence[str] = (),
    layer_type: str | None = None,
) -> Rope:
    """Return a rotation, from either spelling of its settings.

    `rope_theta` with `rope_scaling` is transformers 4, `rope_parameters` 5.

    Args:
      raw: of `config.json`.
      default: what transformers takes for absent keys.
      max_positions: of the network, in tokens.
      head_dim: of the network.
      partial: whether the family may rotate a part of each head.
      longrope: other names of that scaling in the family.
      layer_type: whose settings to read, in a family where they are an object for each
        type of layer; None where there is one for all.

    Raises:
      CheckpointError: a setting is damaged, or the network does not compute it.
    """
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    usual = default.get("rope_parameters") or {}
    # What is said outside of the object is stronger than what is usual inside.
    inner = {k: v for k, v in usual.items() if k not in ("rope_theta", _PARTIAL)}
    rope = raw.get(key) or inner
    if layer_type is not None:
        usual = usual.get(layer_type, usual)
        key, rope = _of_type(key, rope, layer_type)
    if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
        unsupported(key, rope, "one flat object for all layers")
    given = {name: value for name, value in rope.items() if value is not None}
    theta = number(raw | given, "rope_theta", usual.get("rope_theta", 10_000.0))
    kind = given.get("rope_type", given.get("type", "default"))
    kind = "longrope" if kind in longrope else kind
    if not isinstance(kind, str) or kind not in _KEYS:
        unsupported(f"{key}.rope_type", kind, *_KEYS)
    for name in given.keys() - _KEYS[kind] - _KEYS["default"]:
        unsupported(f"{key}.{name}", rope[name])
    rotary_dim = None
    if (share := (raw | given).get(_PARTIAL, usual.get(_PARTIAL, 1))) not in (None, 1):
        rotary_dim = (
            _part(share, head_dim) if partial else unsupported(_PARTIAL, share, 1)
        )
    # As in transformers, the key outside the object is the stronger one.
    outer = default | {k: v for k, v in raw.items() if v is not None}
    original = integer(
        outer if outer.get(_ORIGINAL) is not None else given, _ORIGINAL, max_positions
    )
    sizes = original, max_positions, (rotary_dim or head_dim) // 2
    try:
        scaling = _scaling(kind, given, *sizes)
    except CheckpointError as error:
        raise CheckpointError(f"{key}.{error}") from None
    if isinstance(scaling, YarnScaling) and theta <= 1:
        raise CheckpointError(f"rope_theta must be above 1 for YaRN, found {theta}.")
    return Rope(theta=theta, scaling=scaling, rotary_dim=rotary_dim)


def _of_type(key: str, rope: Any, layer_type: str) -> tuple[str, Any]:
    """Return the settings of one type of layer."""
    if not isinstance(rope, dict) or not isinstance(rope.get(layer_type), dict):
        unsupported(key, rope, f"an object of objects, with {layer_type!r}")
    key, rope = f"{key}.{layer_type}", rope[layer_type]
    if rope.get("truncate") is False:  # transformers looks for it outside
        unsupported(f"{key}.truncate", False, True)
    return key, rope


def _part(share: Any, head_dim: int) -> int:
    """Return how many dimensions of a head are rotated."""
    rotated = int(head_dim * share) if type(share) is float and 0 < share < 1 else 0
    if rotated < 2 or rotated % 2:
        raise CheckpointError(
            f"{_PARTIAL}={share!r} must leave an even number of the {head_dim} "
            "dimensions of a head to be rotated."
        )
    return rotated


def _scaling(
    kind: str, rope: dict[str, Any], original: int, max_positions: int, frequencies: int
) -> Scaling | None:
    """Return the scaling; one by a factor of 1, which changes no number, is none."""
    if kind == "default":
        if rope.get("factor", 1) != 1:
            unsupported("factor", rope["factor"], 1)
        return None
    if kind == "longrope":
        return _longrope(rope, original, max_positions, frequencies)
    factor = number(
        rope, "factor", max_positions / original if kind == "yarn" else None
    )
    if kind == "dynamic":  # acts beyond the positions that the checkpoint has
        return None
    if kind == "linear":
        return None if factor == 1 else LinearScaling(factor=factor)
    if kind == "yarn":
        return _yarn(rope, factor, original)
    low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
    if high <= low:
        raise CheckpointError(
            f"high_freq_factor={high} must be greater than low_freq_factor={low}."
        )
    return Llama3Scaling(
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=original,
    )


def _yarn(rope: dict[str, Any], factor: float, original: int) -> YarnScaling | None:
    def strength(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    attention = strength(1.0)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = strength(number(rope, "mscale"))
        attention /= strength(number(rope, "mscale_all_dim"))
    truncate = rope.get("truncate", True)
    if type(truncate) is not bool:
        unsupported("truncate", truncate, True, False)
    scaling = YarnScaling(
        factor=factor,
        original_max_positions=original,
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
        truncate=truncate,
        attention_factor=number(rope, "attention_factor", attention),
    )
    if scaling.beta_fast < scaling.beta_slow:
        raise CheckpointError(
            f"beta_fast={scaling.beta_fast} must be at least "
            f"beta_slow={scaling.beta_slow}."
        )
    return None if factor == scaling.attention_factor == 1 else scaling


def _longrope(
    rope: dict[str, Any], original: int, max_positions: int, frequencies: int
) -> LongRopeScaling:
    factor = number(rope, "factor", max_positions / original)
    attention = 1.0
    if factor > 1 and original > 1:
        attention = math.sqrt(1 + math.log(factor) / math.log(original))
    sets = []
    for key in ("short_factor", "long_factor"):
        divisors = rope.get(key)
        if not isinstance(divisors, list) or len(divisors) != frequencies:
            unsupported(key, divisors, f"a list of {frequencies} numbers")
        sets.append(tuple(number({key: x}, key) for x in divisors))
    short, long = sets
    return LongRopeScaling(
        short_factors=short,
        long_factors=long,
        original_max_positions=original,
        attention_factor=number(rope, "attention_factor", attention),
    )
