"""What Granite's configurations say beyond those of other families: four scales."""

from typing import Any

from jaxkv.models.checkpoint_values import number

KEYS = frozenset(
    "attention_multiplier embedding_multiplier logits_scaling "
    "residual_multiplier".split()
)


def read_granite(
    raw: dict[str, Any], default: dict[str, Any], model_type: str, hidden_size: int
) -> dict[str, Any]:
    """Return the switches of `Config` that the keys of a Granite decide.

    Args:
      raw: of `config.json`.
      default: what transformers takes for absent keys.
      model_type: of the family.
      hidden_size: of the network.

    Raises:
      CheckpointError: a value is damaged.
    """
    del model_type, hidden_size
    found = {key: number(raw, key, default[key]) for key in KEYS}
    return dict(
        embedding_scale=found["embedding_multiplier"],
        query_scale=found["attention_multiplier"],
        residual_scale=found["residual_multiplier"],
        logit_scale=1 / found["logits_scaling"],
    )
