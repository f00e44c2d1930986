"""The network's configuration out of a Hugging Face checkpoint folder.

Only what the network computes exactly is let through: a key that would change the
numbers and is not supported is an error, never ignored.
"""

from pathlib import Path
from typing import Any

from jaxkv.models.checkpoint import CheckpointError, read_json
from jaxkv.models.checkpoint_values import MOST_LAYERS, integer, number, unsupported
from jaxkv.models.config import Config, LayerKind
from jaxkv.models.hf.experts import KEYS as EXPERT_KEYS
from jaxkv.models.hf.experts import read_experts
from jaxkv.models.hf.families import FAMILIES, Family
from jaxkv.models.hf.layers import read_kinds, spelled_by_type
from jaxkv.models.hf.quantised import read_scheme
from jaxkv.models.hf.rope import NO_ROPE, read_ropes, without_rope
from jaxkv.models.quiet import quiet_transformers
from jaxkv.models.rope import reach

# Keys that change what the network computes, and the values that leave it alone.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    # of Phi-3's own code
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "lm_head_bias": (False,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
_READ = frozenset(
    "architectures attention_bias head_dim hidden_size intermediate_size layer_types "
    "max_position_embeddings model_type num_attention_heads num_hidden_layers "
    "num_key_value_heads original_max_position_embeddings partial_rotary_factor "
    "quantization_config "
    "rms_norm_eps "
    "rope_parameters rope_scaling rope_theta sliding_window tie_word_embeddings "
    "use_sliding_window vocab_size".split()
)
# Keys that no number of the network depends on: tokens, training, sampling, records.
_INERT = frozenset(
    "_attn_implementation _attn_implementation_autoset _commit_hash "
    "_flash_attn_2_enabled _name_or_path _remove_final_layer_norm attention_dropout "
    "attn_implementation auto_map bos_token_id custom_pipelines do_sample dtype "
    "embd_pdrop eos_token_id finetuning_task hidden_dropout id2label initializer_range "
    "is_decoder is_llama_config label2id language max_length max_new_tokens "
    "max_sequence_length max_window_layers min_length model_max_length "
    "output_attentions output_hidden_states output_router_logits pad_token_id prefix "
    "pretraining_tp problem_type repetition_penalty resid_pdrop return_dict "
    "router_aux_loss_coef router_jitter_noise sep_token_id "
    "task_specific_params temperature tokenizer_class top_k top_p torch_dtype "
    "torchscript transformers.js_config transformers_version unsloth_fixed "
    "unsloth_version use_cache".split()
)


def read_config(folder: str | Path) -> Config:
    """Read `config.json` of a checkpoint of a family that the network computes.

    Both spellings of the rotary settings are understood: `rope_theta` with
    `rope_scaling` (transformers 4) and `rope_parameters` (transformers 5).

    Args:
      folder: a folder with `config.json`.

    Returns:
      The network's configuration.

    Raises:
      CheckpointError: if the file is missing or damaged, or a key has a value that the
        network does not compute; the message names key and value.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    try:
        return _convert(raw)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def family_name(raw: dict[str, Any]) -> str:
    """Return the name of a checkpoint's family, as its makers write it.

    Args:
      raw: of its `config.json`, which `read_config` has read.
    """
    return _family(raw)[1].name


def has_neighbouring_pairs(raw: dict[str, Any]) -> bool:
    """Return whether a checkpoint holds the two halves of a rotary pair side by side.

    Args:
      raw: of its `config.json`, which `read_config` has read.
    """
    return _family(raw)[1].interleaved


def _convert(raw: dict[str, Any]) -> Config:
    model_type, family = _family(raw)
    hidden_size = integer(raw, "hidden_size")
    num_heads = integer(raw, "num_attention_heads")
    layers = _layers(raw)
    default = _defaults(model_type, hidden_size, num_heads)
    _check_keys(raw, model_type, family, default)
    switches = dict(family.switches)
    if family.read is not None:
        switches |= family.read(raw, default, model_type, hidden_size)
    max_positions = integer(
        raw, "max_position_embeddings", default["max_position_embeddings"]
    )
    head_dim = integer(
        raw, "head_dim", default.get("head_dim") or hidden_size // num_heads
    )
    if head_dim % 2:
        raise CheckpointError(f"{head_dim=} must be even for rotary positions.")
    qkv_bias, output_bias = _biases(raw, default, family)
    ropes = read_ropes(
        *(spelled_by_type(raw, default) if "by_type" in family.rope else raw, default),
        max_positions=max_positions,
        head_dim=head_dim,
        **family.rope,
    )
    rope = ropes["full_attention"]
    max_positions = max(reach(how, max_positions) for how in ropes.values())
    kinds = read_kinds(raw, model_type, default, max_positions, layers, ropes)
    if family.keys >= NO_ROPE:
        kinds = without_rope(kinds, raw, default)
    return Config(
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=integer(raw, "intermediate_size"),
        num_layers=layers,
        num_heads=num_heads,
        num_kv_heads=_kv_heads(raw, default, num_heads),
        head_dim=head_dim,
        rms_norm_eps=number(raw, "rms_norm_eps", default["rms_norm_eps"]),
        rope=rope,
        kinds=() if set(kinds) == {LayerKind(rope=rope)} else kinds,
        max_positions=max_positions,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        tied=_boolean(default | raw, "tie_word_embeddings"),
        experts=read_experts(raw, model_type, default, layers)
        if family.experts
        else None,
        **switches,
    )


def _kv_heads(raw: dict[str, Any], default: dict[str, Any], num_heads: int) -> int:
    usual = default["num_key_value_heads"] or num_heads
    if raw.get("num_key_value_heads", 0) is None:  # null: as many as query heads
        usual = num_heads
    num_kv_heads = integer(raw, "num_key_value_heads", usual)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"num_attention_heads={num_heads} must be a multiple of "
            f"num_key_value_heads={num_kv_heads}."
        )
    return num_kv_heads


def _defaults(model_type: str, hidden_size: int, num_heads: int) -> dict[str, Any]:
    """Return what transformers takes for absent keys at these sizes."""
    try:
        with quiet_transformers() as transformers:
            config = transformers.CONFIG_MAPPING[model_type](
                hidden_size=hidden_size, num_attention_heads=num_heads
            )
    except Exception as error:  # what transformers raises differs between versions
        message = " ".join(str(error).split())
        raise CheckpointError(
            f"transformers takes no {hidden_size=} with "
            f"num_attention_heads={num_heads}: {message}"
        ) from error
    return config.to_dict()


def _biases(
    raw: dict[str, Any], default: dict[str, Any], family: Family
) -> tuple[bool, bool]:
    """Return whether the projections to heads and from them have biases."""
    if family.bias != "by attention_bias":
        return family.bias == "qkv", False
    known = default | raw
    key = family.output_bias
    output = key is not None and _boolean(known, key)
    return _boolean(known, "attention_bias"), output


def _check_keys(
    raw: dict[str, Any], model_type: str, family: Family, default: dict[str, Any]
) -> None:
    """Raise for a key that somebody should read and nobody does."""
    own = family.keys | EXPERT_KEYS.get(model_type, frozenset())
    for key, value in raw.items():
        if key not in own:
            _refuse_unknown(key, value, default)
    read_scheme(raw.get("quantization_config"))


def _refuse_unknown(key: str, value: Any, default: dict[str, Any]) -> None:
    """Raise for a key that is neither read nor known to leave the network alone."""
    if value is None or key in _READ or key in _INERT:
        return
    if key in _NEUTRAL:
        if value not in _NEUTRAL[key]:
            unsupported(key, value, *_NEUTRAL[key])
    elif key in default:
        if value != default[key]:
            unsupported(key, value, default[key])
    else:
        raise CheckpointError(
            f"{key}={value!r} is not known to jaxkv, and may change what the network "
            "computes; take the key out if you know that it does not."
        )


def _family(raw: dict[str, Any]) -> tuple[str, Family]:
    """Return the model type and its family, from `model_type` or `architectures`."""
    names = {family.architecture: key for key, family in FAMILIES.items()}
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list):
        unsupported("architectures", architectures, [next(iter(names))])
    model_type = raw.get("model_type")
    if model_type is None and architectures:
        model_type = names.get(str(architectures[0]))
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        key = "model_type" if raw.get("model_type") is not None else "architectures"
        unsupported(key, raw.get(key), *(FAMILIES if key == "model_type" else names))
    family = FAMILIES[model_type]
    # A reward model or a bare encoder has the same model_type but another head.
    if architectures and family.architecture not in architectures:
        unsupported("architectures", architectures, [family.architecture])
    return model_type, family


def _layers(raw: dict[str, Any]) -> int:
    layers = integer(raw, "num_hidden_layers")
    if layers > MOST_LAYERS:
        raise CheckpointError(
            f"num_hidden_layers must be at most {MOST_LAYERS}, found {layers}."
        )
    return layers


def _boolean(raw: dict[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is None:
        return False
    if type(value) is not bool:
        raise CheckpointError(f"{key} must be true or false, found {value!r}.")
    return value
