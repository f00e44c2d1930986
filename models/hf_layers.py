"""What tells the layers of a Hugging Face configuration apart."""

from typing import Any

from jaxkv.models.checkpoint_values import integer, unsupported

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def refuse_windows(
    raw: dict[str, Any],
    model_type: str,
    default: dict[str, Any],
    max_positions: int,
    layers: int,
) -> None:
    """Raise if any layer attends to a window that is shorter than a sequence may be.

    Args:
      raw: of `config.json`.
      model_type: of the family.
      default: what transformers takes for absent keys.
      max_positions: of the network, in tokens.
      layers: of the network.

    Raises:
      CheckpointError: it names the key and its value.
    """
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or not set(map(str, kinds)) <= _LAYER_TYPES:
        unsupported("layer_types", kinds, "'full_attention' for every layer")
    window = raw.get("sliding_window", default.get("sliding_window"))
    switched_on = raw.get("use_sliding_window") or False
    if type(switched_on) is not bool:
        unsupported("use_sliding_window", switched_on, False)
    if window is not None and (
        integer({"sliding_window": window}, "sliding_window") >= max_positions
    ):
        return
    if model_type == "mistral":  # has no switch, and one kind of layer
        if window is not None:
            unsupported(
                "sliding_window",
                window,
                None,
                f"max_position_embeddings={max_positions}",
            )
    elif "sliding_attention" in kinds:
        unsupported("layer_types", kinds, "'full_attention' for every layer")
    elif switched_on and not kinds and window is not None:
        first = raw.get("max_window_layers", default.get("max_window_layers", 0))
        if type(first) not in (int, float) or first < layers:
            unsupported("use_sliding_window", True, False)
