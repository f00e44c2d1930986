"""Packed tensors of a checkpoint, made whole when they are read.

Weights are multiplied out one tensor at a time. Activations stay as they are, where the
checkpoint's own runtime may round them, too. Axis letters: `E` experts, `O` outputs,
`I` inputs.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from jaxkv.models.checkpoint import CheckpointError
from jaxkv.models.hf.quantised import Scheme
from jaxkv.models.parameter_plan import some

FP8 = "F8_E4M3"
# The column of each nibble of AWQ's words.
_INTERLEAVED = np.array([0, 2, 4, 6, 1, 3, 5, 7])


class Tensor(Protocol):
    """One tensor of a checkpoint."""

    name: str
    path: Any
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it

    def read(self, start: int | None = None, stop: int | None = None) -> np.ndarray:
        """Return the values, or those of some rows."""
        ...


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
    packed, ending, read = _KINDS[scheme.method]
    left, made = dict(tensors), {}
    for name, tensor in tensors.items():
        if name.endswith(packed) and (tensor.dtype == FP8 or read is not _float8):
            module = name.removesuffix(packed)
            shape, parts, make = read(module, tensors, scheme)
            for part in parts:
                left.pop(part)
            whole = f"{module}{ending}"
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


def _float8(module: str, tensors, scheme: Scheme):
    """Return shape, names of the parts and a maker of a matrix of float8."""
    weight = tensors[f"{module}.weight"]
    rows, columns = weight.shape if len(weight.shape) == 2 else (0, 0)
    if scheme.block is None:
        shapes: tuple[tuple[int, ...], ...] = ((), (1,), (1, 1))
        block = rows, columns
    elif scheme.block == (1, 0):
        shapes, block = ((rows, 1), (rows,)), (1, columns)
    else:
        block = (
            max(1, min(rows, scheme.block[0])),
            max(1, min(columns, scheme.block[1])),
        )
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
    size = scheme.group or max(1, inputs)  # none is refused later, by its shape
    groups = -(-inputs // size)
    zeros = _part(
        tensors, f"{module}.qzeros", ((groups, -(-outputs // in_word)),), "I32"
    )
    scales = _part(tensors, f"{module}.scales", ((groups, outputs),), *_SCALES)
    parts = [packed, zeros, scales]
    index = None
    if gptq and (scheme.reordered or f"{module}.g_idx" in tensors):
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


# The float of each four bits: a sign, two bits of exponent, one of mantissa.
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])


def _mxfp4(name: str, tensors, scheme: Scheme):
    """Return shape, names of the parts and a maker of gpt-oss's matrices `[E, I, O]`.

    Bytes `[E, O, I / 32, 16]` hold two numbers each, the lower four bits first, and
    `[E, O, I / 32]` the exponents of two, with 127 added.
    """
    blocks = tensors[f"{name}_blocks"]
    if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[3] != 16:
        raise CheckpointError(
            f"{blocks.path}: tensor {blocks.name} must be bytes [E, O, I / 32, 16], "
            f"found {blocks.shape} and {blocks.dtype}."
        )
    scales = _part(tensors, f"{name}_scales", (blocks.shape[:3],), "U8")
    count, outputs, groups, _ = blocks.shape

    def make(dtype):
        def read():
            whole = np.empty((count, 32 * groups, outputs), _DTYPES[dtype])
            for expert in range(count):  # one at a time, for float32 takes 8 times more
                here = slice(expert, expert + 1)
                packed = blocks.read(here.start, here.stop)[0]
                pairs = np.stack([packed & 15, packed >> 4], axis=-1)
                numbers = _FP4[pairs].reshape(outputs, groups, 32)
                exponents = scales.read(here.start, here.stop)[0].astype(np.int32) - 127
                numbers = np.ldexp(numbers, exponents[..., None])
                whole[expert] = numbers.reshape(outputs, -1).T
            return whole

        return read

    return (count, 32 * groups, outputs), (blocks.name, scales.name), make


# By method: the end of the name of what is packed, that of what it means, and what
# reads it.
_KINDS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "fp8": (".weight", ".weight", _float8),
    "compressed-tensors": (".weight", ".weight", _float8),
    "gptq": (".qweight", ".weight", _integers),
    "awq": (".qweight", ".weight", _integers),
    "mxfp4": ("_blocks", "", _mxfp4),
}
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    return array.astype(_DTYPES[dtype], copy=False)
