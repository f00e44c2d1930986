"""The experts of a Hugging Face configuration."""

from typing import Any

from jaxkv.kernels.experts import Gate
from jaxkv.models.checkpoint_values import integer, number, unsupported
from jaxkv.models.config import Experts

_COMMON = "num_experts num_experts_per_tok num_local_experts"
# Keys that are read here, by model type.
KEYS: dict[str, frozenset[str]] = {
    "mixtral": frozenset(_COMMON.split()),
    "olmoe": frozenset(f"{_COMMON} norm_topk_prob".split()),
    "qwen3_moe": frozenset(
        f"{_COMMON} decoder_sparse_step mlp_only_layers moe_intermediate_size "
        "norm_topk_prob".split()
    ),
    "gpt_oss": frozenset(
        f"{_COMMON} experts_per_token swiglu_alpha swiglu_limit".split()
    ),
}


def read_experts(
    raw: dict[str, Any], model_type: str, default: dict[str, Any], layers: int
) -> Experts:
    """Return what a configuration says of its experts.

    Args:
      raw: of `config.json`.
      model_type: of a family with experts.
      default: what transformers takes for absent keys.
      layers: of the network.

    Raises:
      CheckpointError: a value is none that the network computes; it is named.
    """
    count = _same(raw, default, "num_experts", "num_local_experts")
    per_token = _same(raw, default, "num_experts_per_tok", "experts_per_token")
    if per_token > count:
        unsupported("num_experts_per_tok", per_token, f"at most num_experts={count}")
    if model_type == "mixtral":
        return Experts(
            count=count, per_token=per_token, size=integer(raw, "intermediate_size")
        )
    if model_type == "gpt_oss":
        gate = Gate(
            alpha=number(raw, "swiglu_alpha", default["swiglu_alpha"]),
            limit=number(raw, "swiglu_limit", default["swiglu_limit"]),
            shift=1.0,
        )
        return Experts(
            count=count,
            per_token=per_token,
            size=integer(raw, "intermediate_size"),
            bias=True,
            gate=gate,
        )
    dense: tuple[int, ...] = ()
    size = "intermediate_size"
    if model_type == "qwen3_moe":
        dense, size = _dense_layers(raw, layers), "moe_intermediate_size"
        if raw.get("use_sliding_window"):  # of all layers, whatever else is said
            unsupported("use_sliding_window", True, False)
    normalize = raw.get("norm_topk_prob", default["norm_topk_prob"])
    if type(normalize) is not bool:
        unsupported("norm_topk_prob", normalize, True, False)
    return Experts(
        count=count,
        per_token=per_token,
        size=integer(raw, size, default[size]),
        normalize=normalize,
        dense_layers=dense,
    )


def _same(raw: dict[str, Any], default: dict[str, Any], *names: str) -> int:
    """Return an integer that has several names, which must agree."""
    found = {name: integer(raw, name) for name in names if raw.get(name) is not None}
    if len(set(found.values())) > 1:
        first, second = found
        unsupported(first, found[first], f"{second}={found[second]}")
    usual = (default[name] for name in names if default.get(name) is not None)
    return next(iter(found.values())) if found else next(usual)


def _dense_layers(raw: dict[str, Any], layers: int) -> tuple[int, ...]:
    """Return the layers without experts: those named, and all but each `step`-th."""
    step = integer(raw, "decoder_sparse_step", 1)
    named = raw.get("mlp_only_layers") or []
    if not isinstance(named, list) or not all(type(i) is int for i in named):
        unsupported("mlp_only_layers", named, "a list of layers")
    return tuple(i for i in range(layers) if i in named or (i + 1) % step)
