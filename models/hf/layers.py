"""What tells the layers of a Hugging Face configuration apart: windows, rotations."""

from collections.abc import Mapping
from typing import Any

from jaxkv.models.checkpoint_values import integer, number, unsupported
from jaxkv.models.config import LayerKind
from jaxkv.models.hf.rope import LAYER_TYPES
from jaxkv.models.rope import Rope

_FULL, _SLIDING = LAYER_TYPES
# Families whose layers have windows, as transformers implements them: every so many
# layers one has none; 0 is never.
_PERIODS = dict(
    mistral=0, mixtral=0, phi3=0, gemma2=2, gemma3_text=6, gpt_oss=2, olmo3=4
)
_PERIOD_KEYS = ("sliding_window_pattern", "_sliding_window_pattern")  # of Gemma 3
# Those in which a switch turns windows on, from some layer on.
_SWITCHED = ("qwen2", "qwen3")


def read_kinds(
    raw: dict[str, Any],
    model_type: str,
    default: dict[str, Any],
    max_positions: int,
    layers: int,
    ropes: Mapping[str, Rope],
) -> tuple[LayerKind, ...]:
    """Return what each layer's attention does.

    Args:
      raw: of `config.json`.
      model_type: of the family.
      default: what transformers takes for absent keys.
      max_positions: of the network, in tokens. A window that is not shorter is none.
      layers: of the network.
      ropes: of each type of layer.

    Raises:
      CheckpointError: it names the key and its value.
    """
    window = raw.get("sliding_window", default.get("sliding_window"))
    if window is not None:
        window = integer({"sliding_window": window}, "sliding_window")
        window = None if window >= max_positions else window
    types = _types(raw, model_type, default, window, layers)
    windows = {_FULL: None, _SLIDING: window}
    return tuple(LayerKind(rope=ropes[kind], window=windows[kind]) for kind in types)


def spelled_by_type(raw: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with rotary settings for each type of layer.

    Older ones have `rope_theta` and `rope_scaling` for the layers without a window, and
    `rope_local_base_freq` for the others.

    Args:
      raw: of `config.json`.
      default: what transformers takes for absent keys.
    """
    if raw.get("rope_parameters") is not None:
        return raw
    usual = default["rope_parameters"]
    scaling = raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        unsupported("rope_scaling", scaling, "an object")
    bases = {_FULL: "rope_theta", _SLIDING: "rope_local_base_freq"}
    spelled = {
        kind: {"rope_theta": number(raw, key, usual[kind]["rope_theta"])}
        for kind, key in bases.items()
    }
    spelled[_FULL] |= scaling
    older = (*bases.values(), "rope_scaling")
    kept = {key: value for key, value in raw.items() if key not in older}
    return kept | {"rope_parameters": spelled}


def _types(
    raw: dict[str, Any],
    model_type: str,
    default: dict[str, Any],
    window: int | None,
    layers: int,
) -> list[str]:
    """Return each layer's type as transformers names it: by key, or as the family has.

    Raises:
      CheckpointError: a layer that would have a window in a family that has none.
    """
    given = raw.get("layer_types") or []
    if not isinstance(given, list) or not set(map(str, given)) <= {_FULL, _SLIDING}:
        unsupported("layer_types", given, _FULL, _SLIDING)
    if given and len(given) != layers:
        unsupported("layer_types", given, f"one for each of {layers} layers")
    switched_on = raw.get("use_sliding_window") or False
    if type(switched_on) is not bool:
        unsupported("use_sliding_window", switched_on, False)
    if model_type in _PERIODS:
        period = _PERIODS[model_type]
        for key in _PERIOD_KEYS if model_type == "gemma3_text" else ():
            period = integer(raw, key, period)
        if given and period:
            return given
        # Others have one kind of layer, whatever a list says.
        period = period or layers + 1
        return [_SLIDING if i % period else _FULL for i in range(1, layers + 1)]
    if window is None:
        return [_FULL] * layers
    if model_type in _SWITCHED:
        if not switched_on and _SLIDING in given:
            unsupported("layer_types", given, f"{_FULL} without use_sliding_window")
        first: Any = raw.get("max_window_layers", default.get("max_window_layers"))
        if not given and switched_on and (type(first) is not int or first < 0):
            unsupported("max_window_layers", first, "a number of layers")
        return given or [
            _SLIDING if switched_on and layer >= first else _FULL
            for layer in range(layers)
        ]
    if _SLIDING in given:
        unsupported("layer_types", given, _FULL)
    if switched_on:
        unsupported("use_sliding_window", switched_on, False)
    return [_FULL] * layers
