"""The network's parameters out of the tensors of a GGUF file.

All entries are checked before the first tensor is read. Then the parameters are made
one at a time: some rows are dequantised, cast and put where they belong, and the whole
is on its device before the next is touched. So the host holds one parameter, and never
a second copy of the weights.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.models import placing
from jaxkv.models.checkpoint import CheckpointError
from jaxkv.models.config import Config
from jaxkv.models.gguf.config import EMBEDDING, FAMILIES
from jaxkv.models.gguf.header import Header, Tensor
from jaxkv.models.gguf.rope import TENSORS
from jaxkv.models.hf.weights import check_dtype
from jaxkv.models.layout import checkpoint_spans
from jaxkv.models.layout import order as columns_in_order
from jaxkv.models.parameter_plan import (
    Parts,
    arranged,
    at,
    plan_of,
    row_orders,
    some,
)

# The types that JAX has, too; all others are quantised.
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_CHUNK = 2**18  # numbers that are dequantised at once: they stay in the caches

# Names of modules: in a Hugging Face checkpoint, and in a GGUF file.
_OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_INNER = {
    "input_layernorm": "attn_norm",
    "mlp.down_proj": "ffn_down",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.k_proj": "attn_k",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.v_proj": "attn_v",
}
_FUSED = ("self_attn.qkv_proj", "mlp.gate_up_proj")
# Where norms stand behind attention and feed-forward.
_BEHIND = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "pre_feedforward_layernorm": "ffn_norm",
}


def read_weights(
    header: Header,
    config: Config,
    *,
    dtype: str | None,
    shardings: Any = None,
    shards: tuple[int, int] = (1, 1),
) -> dict[str, Any]:
    """Read the weights of a GGUF file into the parameter tree of `Decoder(config)`.

    Args:
      header: of the file.
      config: the network, from `config.read_config`.
      dtype: "float32", "bfloat16" or "float16" for every parameter; None is the type
        of the embedding; if that is quantised, float32 on CPU and bfloat16 elsewhere.
      shardings: a tree like the result with a `jax.sharding.Sharding` or a device at
        every leaf; None puts everything on the default device. Of a matrix that is cut
        over a mesh, each device's rows are read alone, and of columns all rows, some at
        a time; experts are read a layer at a time.
      shards: how fused columns lie; see `layout`.

    Returns:
      The parameter tree, as `parameter_shapes(config)` describes it.

    Raises:
      CheckpointError: if a tensor is missing, superfluous, misshapen, or of a type that
        package `gguf` does not dequantise.
      ValueError: if `dtype` is none of the four.
    """
    check_dtype(dtype)
    family = FAMILIES[header.metadata["general.architecture"]]
    plan = {
        path: {_gguf_name(name, config): shape for name, shape in parts.items()}
        for path, parts in plan_of(config, _stored(config, fused=family.fused)).items()
    }
    _check(header, plan)
    target_dtype = jnp.dtype(dtype or _own_dtype(header))
    file = np.memmap(header.path, np.uint8, mode="r")
    orders = row_orders(config, interleaved=family.interleaved)
    params: dict[str, Any] = {}
    for path, parts in plan.items():
        tensors = [header.tensors[name] for name in parts]
        turned = len(tensors[0].shape) == 2 and path != ("embedding",)
        where, order = at(shardings, path), orders.get(path)
        try:
            if placing.is_cut(where) and len(tensors[0].shape) == 2:
                spans = functools.partial(checkpoint_spans, config, path[-1], shards)
                read = functools.partial(_rows, file, tensors, order, target_dtype)
                shape = sum(t.shape[0] for t in tensors), tensors[0].shape[1]
                shape = shape[::-1] if turned else shape
                placed = placing.place(shape, where, read, spans, turned=turned)
            else:
                # Of 1 + weight, 16 bits would hold little of the weight.
                offset = config.norm_offset and path[-1].endswith("norm")
                read_dtype = jnp.dtype("float32") if offset else target_dtype
                array = _join(file, tensors, order, read_dtype, turned=turned)
                array = (array - 1).astype(target_dtype) if offset else array
                if not turned:
                    array = arranged(path, array, config)
                columns = columns_in_order(config, path[-1], shards)
                placed = placing.put(array, where, columns)
                del array
        except CheckpointError as error:
            raise header.error(str(error)) from None
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        # Wait, or host copies pile up.
        node[path[-1]] = placed.block_until_ready()
        del placed
    return params


def _stored(config: Config, *, fused: bool) -> set[str]:
    """Return the names of Hugging Face's that a file has instead of others."""
    modules = ["mlp.experts.gate_proj"]  # all experts of a layer
    if fused:
        modules += _FUSED
    layers = range(config.num_layers)
    return {f"model.layers.{i}.{name}.weight" for i in layers for name in modules}


def _gguf_name(name: str, config: Config) -> str:
    """Translate the name of a tensor of a Hugging Face checkpoint."""
    module, _, kind = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{kind}"
    layer, _, inner = module.removeprefix("model.layers.").partition(".")
    inner = (_BEHIND if config.post_norm else {}).get(inner) or _INNER[inner]
    return f"blk.{layer}.{inner}.{kind}"


def _own_dtype(header: Header) -> str:
    quantised = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return _FLOATS.get(header.tensors[EMBEDDING].type, quantised)


def _check(header: Header, plan: dict[tuple[str, ...], Parts]) -> None:
    """Compare the entries with the plan, before anything large is read."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    shapes = {name: shape for parts in plan.values() for name, shape in parts.items()}
    found = header.tensors
    missing, extra = shapes.keys() - found.keys(), found.keys() - shapes - TENSORS
    if missing or extra:
        raise header.error(
            f"the tensors do not fit the metadata: missing {some(missing)}, "
            f"superfluous {some(extra)}."
        )
    known = set()
    for name, shape in shapes.items():
        tensor = found[name]
        if tensor.shape != shape:
            raise header.error(
                f"tensor {name} must have shape {shape} by the metadata, found "
                f"{tensor.shape}."
            )
        if tensor.type in known:
            continue
        row = np.zeros((1, tensor.row_bytes), np.uint8)
        try:
            dequantize(row, GGMLQuantizationType[tensor.type])
        except NotImplementedError:
            raise header.error(
                f"tensor {name} is of type {tensor.type}, which package gguf does not "
                "dequantise."
            ) from None
        known.add(tensor.type)


def _join(
    file: np.ndarray,
    tensors: list[Tensor],
    order: np.ndarray | None,
    dtype: np.dtype,
    *,
    turned: bool,
) -> np.ndarray:
    """Read the tensors of one parameter, `[in, out]` if `turned`, else `[out, in]`.

    `order` says where each row belongs; None is where it is.
    """
    lengths = [tensor.shape[0] for tensor in tensors]
    shape = (sum(lengths), *tensors[0].shape[1:])
    array = np.empty(shape[::-1] if turned else shape, dtype)
    rows = array.T if turned else array
    flat = rows.reshape(-1, shape[-1]) if rows.ndim == 3 else rows
    start = 0
    for tensor, length in zip(tensors, lengths, strict=True):
        for first, chunk in _chunks(file, tensor):
            places: Any = slice(start + first, start + first + len(chunk))
            flat[places if order is None else order[places]] = chunk
        start += tensor.rows if rows.ndim == 3 else length
    return array


def _rows(file, tensors, order, dtype, span, columns) -> np.ndarray:
    """Read some rows of the matrices of one parameter, and some of their columns."""
    wanted = np.arange(*span) if order is None else np.argsort(order)[slice(*span)]
    found = np.empty((len(wanted), columns[1] - columns[0]), dtype)
    begin = 0
    for tensor in tensors:
        count = tensor.shape[0]
        (mine,) = np.nonzero((wanted >= begin) & (wanted < begin + count))
        table = file[tensor.offset :][: count * tensor.row_bytes].reshape(count, -1)
        size = max(1, _CHUNK // tensor.shape[-1])
        for some_rows in (mine[i : i + size] for i in range(0, len(mine), size)):
            numbers = _numbers(table[wanted[some_rows] - begin], tensor)
            found[some_rows] = numbers[:, slice(*columns)]
        begin += count
    return found


def _chunks(file: np.ndarray, tensor: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the numbers along the first axis in float32, and the index of each part."""
    size = max(1, _CHUNK // tensor.shape[-1])
    for first in range(0, tensor.rows, size):
        count = min(size, tensor.rows - first)
        start = tensor.offset + first * tensor.row_bytes
        raw = np.asarray(file[start : start + count * tensor.row_bytes])
        rows = _numbers(raw.reshape(count, -1), tensor)
        yield first, rows if len(tensor.shape) > 1 else rows[0]


def _numbers(raw: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Return the numbers of some rows in float32, or raise CheckpointError."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    # Blocks know nothing of rows, and the package takes few rows at a time.
    with np.errstate(all="ignore"):
        rows = dequantize(raw.reshape(1, -1), GGMLQuantizationType[tensor.type])
    rows = rows.reshape(len(raw), -1)
    if not np.isfinite(rows).all():
        raise CheckpointError(
            f"tensor {tensor.name} is damaged, it holds NaN or infinite numbers; "
            "fetch the file again."
        )
    return rows
