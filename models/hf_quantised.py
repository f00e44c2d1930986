"""Quantised checkpoints in the Hugging Face layout, made whole as they are read.

`quantization_config` says how the tensors of a checkpoint are packed. What is read:

* `fp8`: float8 (e4m3) with a scale for each block of a matrix, or for all of it;
* `compressed-tensors`: the same, or a scale for each row;
* `gptq`: integers of 4 or 8 bits with scales and zeros for groups of inputs, also in
  another order (`desc_act`);
* `awq`: integers of 4 bits, the eight of a word interleaved.

Weights are multiplied out one tensor at a time. Activations stay as they are, where the
checkpoint's own runtime may round them, too. Axis letters: `O` outputs, `I` inputs, `G`
groups of inputs.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from jaxkv.models.checkpoint import CheckpointError
from jaxkv.models.checkpoint_values import integer, unsupported
from jaxkv.models.parameter_plan import some


class Tensor(Protocol):
    """One tensor of a checkpoint."""

    name: str
    path: Any
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it

    def read(self, start: int | None = None, stop: int | None = None) -> np.ndarray:
        """Return the values, or those of some rows."""
        ...


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
      scale: name of the tensor with the scales of float8.
    """

    method: str
    bits: int = 8
    group: int | None = None
    block: tuple[int, int] | None = None
    zero_offset: int = 0
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
}
# Keys that are read, and those that say how the checkpoint was made or is best run.
_FREE: dict[str, str] = {
    "fp8": "ignored_layers modules_to_not_convert weight_block_size",
    "compressed-tensors": "config_groups global_compression_ratio ignore version",
    "gptq": "backend batch_size block_name_to_quantize cache_block_outputs "
    "damp_percent dataset desc_act disable_exllama exllama_config group_size lm_head "
    "max_input_length meta model_file_base_name model_name_or_path model_seqlen "
    "module_name_preceding_first_block modules_in_block_to_quantize pad_token_id "
    "quantizer static_groups sym tokenizer true_sequential use_cuda_fp16 use_exllama",
}
_FREE["awq"] = f"{_FREE['gptq']} do_fuse fuse_max_seq_len modules_to_fuse " + (
    "modules_to_not_convert"
)
FP8 = "F8_E4M3"
_INTERLEAVED = np.array(
    [0, 2, 4, 6, 1, 3, 5, 7]
)  # column of each nibble of AWQ's words


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
    group = settings.get("group_size", 128)
    group = None if group == -1 else integer({"group_size": group}, "group_size")
    bits = integer(settings, "bits")
    old = settings.get("checkpoint_format", settings.get("format")) != "gptq_v2"
    offset = 1 if method == "gptq" and old else 0
    return Scheme(method=method, bits=bits, group=group, zero_offset=offset)


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
            if activations and not activations.get("dynamic"):
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


@dataclasses.dataclass(frozen=True)
class Dequantised:
    """A tensor that is made of others when it is read."""

    name: str
    path: Any
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], np.ndarray]

    def read(self, start: int | None = None, stop: int | None = None) -> np.ndarray:
        """Return the values, or those of some rows."""
        return self.make()[start:stop]


def dequantised(
    tensors: Mapping[str, Any], scheme: Scheme, dtype: str
) -> dict[str, Any]:
    """Return the tensors with those that are packed replaced by what they mean.

    Args:
      tensors: of the checkpoint, by name.
      scheme: how they are packed.
      dtype: in which what was packed is handed out, as safetensors names it.

    Raises:
      CheckpointError: a part of a packed tensor is missing or misshapen, or nothing is
        packed.
    """
    floats = scheme.method in ("fp8", "compressed-tensors")
    find = _floats if floats else _integers
    left, made = dict(tensors), {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        packed = (
            kind == "weight" and tensor.dtype == FP8 if floats else kind == "qweight"
        )
        if packed:
            shape, parts, make = find(module, tensors, scheme)
            for part in parts:
                left.pop(part)
            whole = f"{module}.weight"
            made[whole] = Dequantised(whole, tensor.path, shape, dtype, make(dtype))
    if not made:
        raise CheckpointError(
            f"quantization_config says {scheme.method}, but no tensor is packed so: "
            f"found {some(tensors)}; take the key out if the weights are whole."
        )
    return left | made


def _part(tensors, name: str, shapes: tuple[tuple[int, ...], ...], *dtypes: str):
    """Return a part of a packed tensor, after a look at its header."""
    if name not in tensors:
        raise CheckpointError(f"tensor {name} is missing.")
    tensor = tensors[name]
    if tensor.shape not in shapes or (dtypes and tensor.dtype not in dtypes):
        wanted = " or ".join(map(str, shapes))
        raise CheckpointError(
            f"{tensor.path}: tensor {name} must have shape {wanted}"
            f"{' and a type of ' + ', '.join(dtypes) if dtypes else ''}, found "
            f"{tensor.shape} and {tensor.dtype}."
        )
    return tensor


_SCALES = "F32", "BF16", "F16"


def _floats(module: str, tensors, scheme: Scheme):
    """Return shape, names of the parts and a maker of a matrix of float8."""
    weight = tensors[f"{module}.weight"]
    rows, columns = weight.shape if len(weight.shape) == 2 else (0, 0)
    if scheme.block is None:
        shapes: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))
        block = rows, columns
    elif scheme.block == (1, 0):
        shapes, block = ((rows, 1), (rows,)), (1, columns)
    else:
        block = scheme.block
        shapes = ((-(-rows // block[0]), -(-columns // block[1])),)
    scale = _part(tensors, f"{module}.{scheme.scale}", shapes, *_SCALES)

    def make(dtype):
        def read():
            numbers = weight.read().view(jnp.float8_e4m3fn).astype(np.float32)
            factors = scale.read().astype(np.float32)
            factors = factors.reshape(-(-rows // block[0]), -1)
            for axis in (0, 1):
                factors = factors.repeat(block[axis], axis)
            return _cast(numbers * factors[:rows, :columns], dtype)

        return read

    return weight.shape, (weight.name, scale.name), make


def _integers(module: str, tensors, scheme: Scheme):
    """Return shape, names of the parts and a maker of a matrix of GPTQ or AWQ."""
    packed = tensors[f"{module}.qweight"]
    in_word = 32 // scheme.bits
    if packed.dtype != "I32" or len(packed.shape) != 2:
        raise CheckpointError(
            f"{packed.path}: tensor {packed.name} must be a matrix of I32, found "
            f"{packed.shape} and {packed.dtype}."
        )
    gptq = scheme.method == "gptq"
    inputs = packed.shape[0] * (in_word if gptq else 1)
    outputs = packed.shape[1] * (1 if gptq else in_word)
    size = scheme.group or inputs
    groups = -(-inputs // size)
    zeros = _part(
        tensors, f"{module}.qzeros", ((groups, -(-outputs // in_word)),), "I32"
    )
    scales = _part(tensors, f"{module}.scales", ((groups, outputs),), *_SCALES)
    parts = [packed, zeros, scales]
    index = None
    if gptq and f"{module}.g_idx" in tensors:
        index = _part(tensors, f"{module}.g_idx", ((inputs,),), "I32")
        parts.append(index)

    def make(dtype):
        def read():
            order = None if gptq else _INTERLEAVED
            numbers = unpacked(packed.read(), scheme.bits, axis=0 if gptq else 1)
            zero = unpacked(zeros.read(), scheme.bits, axis=1)[:, :outputs]
            if order is not None:
                numbers, zero = _in_order(numbers), _in_order(zero)
            # A zero of 0 is stored as the largest number where one was taken off.
            zero = (zero + scheme.zero_offset) % 2**scheme.bits
            group = np.arange(inputs) // size if index is None else index.read()
            if group.min() < 0 or group.max() >= groups:
                raise CheckpointError(
                    f"{packed.path}: tensor {module}.g_idx must name one of {groups} "
                    f"groups, found {group.min()} to {group.max()}."
                )
            whole = (numbers - zero[group]).astype(np.float32)
            whole *= scales.read().astype(np.float32)[group]
            return _cast(whole.T, dtype)

        return read

    return (outputs, inputs), [part.name for part in parts], make


def unpacked(words: np.ndarray, bits: int, *, axis: int) -> np.ndarray:
    """Return the unsigned integers of 32-bit words, the lowest bits first, in int32.

    Args:
      words: int32 `[R, C]`.
      bits: of an integer.
      axis: along which the integers of a word follow one another.
    """
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    words = np.expand_dims(words.view(np.uint32), axis + 1)
    shifts = shifts.reshape((-1, 1) if axis == 0 else (-1,))
    numbers = (words >> shifts) & np.uint32(2**bits - 1)
    rows, columns = words.shape[0], words.shape[2 - axis]
    shape = (-1, columns) if axis == 0 else (rows, -1)
    return numbers.astype(np.int32).reshape(shape)


def _in_order(numbers: np.ndarray) -> np.ndarray:
    """Put the eight columns of each of AWQ's words where they belong."""
    words = numbers.reshape(len(numbers), -1, 8)
    whole = np.empty_like(words)
    whole[..., _INTERLEAVED] = words
    return whole.reshape(numbers.shape)


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    return array.astype(
        {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}[dtype], copy=False
    )
