"""The rotation of a network's layers out of a Hugging Face configuration."""

from typing import Any

from jaxkv.models.checkpoint import CheckpointError
from jaxkv.models.checkpoint_values import integer, number, unsupported
from jaxkv.models.rope import Llama3Scaling, Rope

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
_ORIGINAL = "original_max_position_embeddings"
# What each scaling reads; the default's keys may stand beside those of any other.
_ROPE_KEYS: dict[str, set[str]] = {
    "default": {
        *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"),
        _ORIGINAL,
    },
    "linear": set(),
    "dynamic": set(),
    "yarn": {
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        "attention_factor",
    },
    "llama3": {"low_freq_factor", "high_freq_factor"},
}


def read_rope(raw: dict[str, Any], max_positions: int) -> Rope:
    """Return the rotation of all layers, from either spelling of its settings.

    `rope_theta` with `rope_scaling` is transformers 4, `rope_parameters` 5.

    Args:
      raw: of `config.json`.
      max_positions: of the network, in tokens.

    Raises:
      CheckpointError: a setting is damaged, or the network does not compute it.
    """
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(key) or {}
    if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
        unsupported(key, rope, "one flat object for all layers")
    theta = number(raw | rope, "rope_theta", 10_000.0)
    if rope.get("partial_rotary_factor") not in (None, 1):
        unsupported("partial_rotary_factor", rope["partial_rotary_factor"], 1)
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        unsupported(f"{key}.rope_type", kind, "default", "llama3")
    given = {name: value for name, value in rope.items() if value is not None}
    for name in given.keys() - _ROPE_KEYS[kind] - _ROPE_KEYS["default"]:
        unsupported(f"{key}.{name}", rope[name])
    # As in transformers, the key outside the object is the stronger one.
    original = integer(
        raw if raw.get(_ORIGINAL) is not None else rope, _ORIGINAL, max_positions
    )
    if kind != "llama3":
        _refuse_acting(key, kind, given, original == max_positions)
        return Rope(theta=theta)
    scaling = Llama3Scaling(
        **{name: number(rope, name) for name in _LLAMA3},
        original_max_positions=original,
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise CheckpointError(
            f"high_freq_factor={scaling.high_freq_factor} must be greater than "
            f"low_freq_factor={scaling.low_freq_factor}."
        )
    return Rope(theta=theta, scaling=scaling)


def _refuse_acting(key: str, kind: str, rope: dict[str, Any], unscaled: bool) -> None:
    """Raise for a scaling that changes a number; by a factor of 1 it changes none."""
    if kind == "default":
        if rope.get("factor", 1) != 1:
            unsupported(f"{key}.factor", rope["factor"], 1)
    elif kind == "dynamic":  # acts beyond the positions that the checkpoint has
        number(rope, "factor")
    elif rope.get("factor") != 1 or rope.get("attention_factor", 1) != 1:
        supported = ("default", "llama3", f"{kind} with a factor of 1")
        unsupported(f"{key}.rope_type", kind, *supported)
    elif kind == "yarn" and not unscaled:  # from which some versions take the factor
        unsupported(f"{key}.{_ORIGINAL}", rope.get(_ORIGINAL), "no other context")
