"""What `quantization_config` says of how the tensors of a checkpoint are packed.

What is read (`packed` makes them whole):

* `fp8`: float8 (e4m3) with a scale for each block of a matrix, or for all of it;
* `compressed-tensors`: the same, or a scale for each row;
* `gptq`: integers of 4 or 8 bits with scales and zeros for groups of inputs, also in
  another order (`desc_act`);
* `awq`: integers of 4 bits, the eight of a word interleaved;
* `mxfp4`: floats of 4 bits in blocks of 32 with a power of two (gpt-oss).
"""

import dataclasses
from typing import Any

from jaxkv.models.checkpoint import CheckpointError
from jaxkv.models.checkpoint_values import integer, unsupported


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the quantised tensors of a checkpoint are packed.

    Attributes:
      method: as `quantization_config` names it.
      bits: of an integer.
      group: inputs that share a scale; None is all.
      block: rows and columns that share a scale, where 0 columns are all of a row;
        None is the whole matrix.
      zero_offset: what is added to the stored zeros.
      reordered: whether a tensor must say which group an input belongs to.
      scale: name of the tensor with the scales of float8.
    """

    method: str
    bits: int = 8
    group: int | None = None
    block: tuple[int, int] | None = None
    zero_offset: int = 0
    reordered: bool = False
    scale: str = "weight_scale_inv"


# By method: keys that must have one of these values, if they are there.
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "fp8": {
        "activation_scheme": ("dynamic",),
        "expert_dtype": ("fp8",),
        "fmt": ("e4m3",),
        "scale_fmt": ("float",),
    },
    "compressed-tensors": {
        "format": ("float-quantized", "naive-quantized"),
        "kv_cache_scheme": (),
        "quantization_status": ("compressed",),
        "sparsity_config": ({},),
        "transform_config": ({},),
    },
    "gptq": {
        "bits": (4, 8),
        "checkpoint_format": ("gptq", "gptq_v2"),
        "desc_act": (True, False),
        "format": ("gptq", "gptq_v2"),
        "pack_dtype": ("int32",),
    },
    "awq": {
        "bits": (4,),
        "checkpoint_format": ("gemm",),
        "format": ("gemm",),
        "version": ("gemm", "GEMM"),
        "zero_point": (True,),
    },
    "mxfp4": {},
}
# Keys that are read, and those that say how the checkpoint was made or is best run.
_FREE: dict[str, str] = {
    "fp8": "ignored_layers modules_to_not_convert weight_block_size",
    "mxfp4": "modules_to_not_convert",
    "compressed-tensors": "config_groups global_compression_ratio ignore version",
    "gptq": "backend batch_size block_name_to_quantize cache_block_outputs "
    "damp_percent dataset disable_exllama exllama_config group_size lm_head "
    "max_input_length meta model_file_base_name model_name_or_path model_seqlen "
    "module_name_preceding_first_block modules_in_block_to_quantize pad_token_id "
    "quantizer static_groups sym tokenizer true_sequential use_cuda_fp16 use_exllama",
}
_FREE["awq"] = f"{_FREE['gptq']} desc_act do_fuse fuse_max_seq_len modules_to_fuse " + (
    "modules_to_not_convert"
)


def read_scheme(settings: Any) -> Scheme | None:
    """Return how a checkpoint is packed, or None if it is not.

    Args:
      settings: the value of `quantization_config`.

    Raises:
      CheckpointError: anything else than what is read here; it is named.
    """
    key = "quantization_config"
    if settings is None or settings == {}:
        return None
    if not isinstance(settings, dict):
        unsupported(key, settings, "one object")
    method = settings.get("quant_method")
    if method not in tuple(_FIXED):
        unsupported(f"{key}.quant_method", method, *_FIXED)
    fixed, free = _FIXED[method], _FREE[method].split()
    for name, value in settings.items():
        if value is None or name in free or name == "quant_method":
            continue
        if name not in fixed:
            raise CheckpointError(
                f"{key}.{name}={value!r} is not known to jaxkv for {method}, and may "
                "change what the weights are."
            )
        if value not in fixed[name]:
            unsupported(f"{key}.{name}", value, *fixed[name])
    if method == "fp8":
        block = settings.get("weight_block_size", [128, 128])
        return Scheme(method=method, block=_block(f"{key}.weight_block_size", block))
    if method == "compressed-tensors":
        return _compressed(settings.get("config_groups"))
    if method == "mxfp4":
        return Scheme(method=method, bits=4)
    group = settings.get("group_size", 128)
    group = None if group == -1 else integer({"group_size": group}, "group_size")
    bits = integer(settings, "bits")
    names = (settings.get(name) for name in ("checkpoint_format", "format"))
    formats = {name for name in names if name is not None}
    if len(formats) > 1:
        unsupported(f"{key}.format", settings["format"], settings["checkpoint_format"])
    offset = 1 if method == "gptq" and "gptq_v2" not in formats else 0
    return Scheme(
        method=method,
        bits=bits,
        group=group,
        zero_offset=offset,
        reordered=method == "gptq" and bool(settings.get("desc_act")),
    )


def _compressed(groups: Any) -> Scheme:
    """Return the scheme of `compressed-tensors`, whose groups must be alike."""
    key = "quantization_config.config_groups"
    if not isinstance(groups, dict) or not groups:
        unsupported(key, groups, "an object of groups")
    found = set()
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            unsupported(f"{key}.{name}", group, "a group with weights")
        wanted = {"num_bits": 8, "type": "float", "symmetric": True}
        for entry, value in wanted.items():
            if weights.get(entry) != value:
                unsupported(f"{key}.{name}.weights.{entry}", weights.get(entry), value)
        for entry in ("input_activations", "output_activations"):
            activations = group.get(entry)
            known = isinstance(activations, dict) and activations.get("dynamic")
            if activations and not known:
                unsupported(f"{key}.{name}.{entry}", activations, "dynamic ones")
        strategy, block = weights.get("strategy"), weights.get("block_structure")
        if strategy == "block":
            found.add(_block(f"{key}.{name}.weights.block_structure", block))
        elif strategy in ("channel", "tensor"):
            found.add(None if strategy == "tensor" else (1, 0))
        else:
            kinds = "tensor", "channel", "block"
            unsupported(f"{key}.{name}.weights.strategy", strategy, *kinds)
    if len(found) > 1:
        unsupported(key, groups, "groups with one strategy")
    return Scheme(method="compressed-tensors", block=found.pop(), scale="weight_scale")


def _block(key: str, value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, list | tuple) and len(value) == 2:
        rows, columns = (integer({key: size}, key) for size in value)
        return rows, columns
    unsupported(key, value, None, "rows and columns")
