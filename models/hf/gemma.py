"""What Gemma's configurations say beyond those of other families.

Norms multiply by one more than their weight, and stand before and behind attention and
feed-forward. Embeddings are scaled, queries as a key says, and logits may be bounded.
"""

from collections.abc import Mapping
from typing import Any

from jaxkv.models.checkpoint_values import number, unsupported

KEYS = frozenset(
    "attn_logit_softcapping cache_implementation final_logit_softcapping hidden_act "
    "hidden_activation query_pre_attn_scalar use_bidirectional_attention "
    "rope_local_base_freq sliding_window_pattern _sliding_window_pattern".split()
)
SWITCHES: Mapping[str, Any] = dict(
    pre_norm=True, post_norm=True, norm_offset=True, activation="gelu_tanh"
)
_GELU = "gelu_pytorch_tanh"


def read_gemma(
    raw: dict[str, Any], default: dict[str, Any], model_type: str, hidden_size: int
) -> dict[str, Any]:
    """Return the switches of `Config` that the keys of a Gemma decide.

    Args:
      raw: of `config.json`.
      default: what transformers takes for absent keys.
      model_type: of the family.
      hidden_size: of the network.

    Raises:
      CheckpointError: a value is damaged, or the network does not compute it.
    """
    for key in ("hidden_act", "hidden_activation"):
        if raw.get(key) not in (None, _GELU):
            unsupported(key, raw[key], _GELU)
    if raw.get("use_bidirectional_attention") not in (None, False):
        unsupported("use_bidirectional_attention", True, False)
    caps = {}
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap = raw.get(key, default.get(key))
        caps[key] = None if cap is None else number({key: cap}, key)
    # transformers reads it in Gemma 2 alone.
    if model_type != "gemma2" and caps["attn_logit_softcapping"] is not None:
        unsupported("attn_logit_softcapping", raw["attn_logit_softcapping"], None)
    scale = number(raw, "query_pre_attn_scalar", default["query_pre_attn_scalar"])
    return dict(
        embedding_scale=hidden_size**0.5,
        query_scale=scale**-0.5,
        attention_cap=caps["attn_logit_softcapping"],
        logit_cap=caps["final_logit_softcapping"],
    )
