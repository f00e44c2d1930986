"""The network's parameters out of the safetensors files of a Hugging Face checkpoint.

All headers are checked before the first tensor is read. Then the tensors are read one
parameter at a time, each placed on its device before the next is touched, so the host
never holds the weights twice. Over a mesh, each device reads its own part.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxkv.models import placing
from jaxkv.models.checkpoint import CheckpointError, read_json
from jaxkv.models.config import Config
from jaxkv.models.hf.config import has_neighbouring_pairs
from jaxkv.models.hf.packed import FP8, Dequantised, Tensor, dequantised
from jaxkv.models.hf.quantised import read_scheme
from jaxkv.models.layout import checkpoint_spans
from jaxkv.models.layout import order as columns_in_order
from jaxkv.models.parameter_plan import (
    EMBEDDING,
    HEAD,
    Plan,
    arranged,
    at,
    plan_of,
    row_orders,
    some,
)

DTYPES = ("float32", "bfloat16", "float16")

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

# The float types of a safetensors header, and what JAX makes of them without x64.
_FLOATS = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def read_weights(
    folder: str | Path,
    config: Config,
    *,
    dtype: str | None,
    shardings: Any = None,
    shards: tuple[int, int] = (1, 1),
    follow_links: bool = False,
) -> dict[str, Any]:
    """Read the weights of a checkpoint into the parameter tree of `Decoder(config)`.

    Query, key and value are joined, and so are gate and up; matrices are transposed
    from Hugging Face's `[out, in]` to `[in, out]`. Quantised tensors are dequantised
    (`packed`).

    Args:
      folder: a folder with `model.safetensors`, or with shards and their index.
      config: the network, from `read_config`.
      dtype: "float32", "bfloat16" or "float16" for every parameter; None keeps the
        type in which the checkpoint stores its embedding.
      shardings: a tree like the result with a `jax.sharding.Sharding` or a device at
        every leaf; None puts everything on the default device. Of what is cut over a
        mesh, each device's part is read alone; what is packed, in another order, or of
        experts, one parameter at a time.
      shards: how fused columns lie; see `layout`.
      follow_links: read files of the folder that are links to somewhere else, not
        only those of the Hub's cache.

    Returns:
      The parameter tree, as `parameter_shapes(config)` describes it.

    Raises:
      CheckpointError: if a file is missing, damaged or lies outside of the folder, or
        a tensor is missing, superfluous, misshapen or not of a float type.
      ValueError: if `dtype` is none of the four.
    """
    check_dtype(dtype)
    params: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        stored = _open(Path(folder), stack, follow_links)
        settings = Path(folder) / "config.json"
        raw = read_json(settings) if settings.exists() else {}
        tensors = _whole(Path(folder), raw, stored, dtype)
        plan = plan_of(config, tensors)
        orders = row_orders(
            config, interleaved=bool(raw) and has_neighbouring_pairs(raw)
        )
        _check(tensors, plan, tied=config.tied)
        if dtype is None:
            dtype = _FLOATS[tensors[EMBEDDING].dtype]
        for path, parts in plan.items():
            needed, order = [tensors[name] for name in parts], orders.get(path)
            target = at(shardings, path)
            cut = placing.is_cut(target) and order is None and _in_parts(needed)
            if cut and not path[-1].startswith("experts_"):
                spans = functools.partial(checkpoint_spans, config, path[-1], shards)
                turned = len(needed[0].shape) == 2 and path != ("embedding",)
                placed = _place(needed, target, spans, turned=turned)
            else:
                array = arranged(path, _join(needed, order), config)
                columns = columns_in_order(config, path[-1], shards)
                placed = placing.put(array, target, columns)
                del array
            node = params
            for key in path[:-1]:
                node = node.setdefault(key, {})
            # Cast where it is fast, on the device; wait, or host copies pile up.
            node[path[-1]] = placed.astype(dtype).block_until_ready()
            del placed
    return params


def check_dtype(dtype: str | None) -> None:
    """Raise ValueError unless `dtype` is one the weights can be loaded in, or None."""
    if dtype is not None and str(dtype) not in DTYPES:  # not ==: it may be an array
        raise ValueError(f"dtype must be one of {DTYPES} or None, found {dtype!r}.")


def _whole(
    folder: Path, raw: dict[str, Any], stored: dict[str, "_Tensor"], dtype: str | None
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, also if they are packed; a line says so."""
    scheme = read_scheme(raw.get("quantization_config"))
    if scheme is None:
        return {**stored}
    kinds = {name: kind for kind, name in _FLOATS.items()}
    own = stored[EMBEDDING].dtype if EMBEDDING in stored else "F32"
    dtype = dtype or _FLOATS.get(own, "float32")
    whole = dequantised(stored, scheme, kinds[dtype])
    made = sum(isinstance(x, Dequantised) for x in whole.values())
    logging.getLogger(__name__).warning(
        f"jaxkv: {folder}: {made} tensors, quantised by {scheme.method}, are "
        f"dequantised to {dtype} as they are read."
    )
    return whole


class _Tensor:
    """One tensor in a file: its header now, its values when asked."""

    def __init__(self, name: str, file: Any, path: Path):
        header = file.get_slice(name)
        self.name = name
        self.path = path
        self.shape = tuple(header.get_shape())
        self.dtype = header.get_dtype()
        self._file = file

    def read(
        self,
        start: int | None = None,
        stop: int | None = None,
        columns: placing.Span | None = None,
    ) -> np.ndarray:
        """Return the values, or those of some rows and columns, in the stored type."""
        try:
            if self.dtype == FP8:
                return _bytes(self.path, self.name).reshape(self.shape)[start:stop]
            if start is None:
                return self._file.get_tensor(self.name)
            part = self._file.get_slice(self.name)
            if columns is None:
                return part[start:stop]
            return part[start:stop, columns[0] : columns[1]]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path}: tensor {self.name} cannot be read ({error}); fetch the "
                "file again."
            ) from error


def _bytes(path: Path, name: str) -> np.ndarray:
    """Return the bytes of a tensor of a type that NumPy lacks, and safetensors refuses.

    A file begins with the length of a JSON object, which says where behind it tensors
    lie.
    """
    first, end = _offsets(path, path.stat().st_mtime_ns)[name]
    return np.fromfile(path, np.uint8, end - first, offset=first)


@functools.lru_cache(maxsize=2)  # shards are read in turn, and some headers are large
def _offsets(path: Path, _: int) -> dict[str, tuple[int, int]]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    start = 8 + size
    return {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1])
        for name, entry in header.items()
    }


def _open(
    folder: Path, stack: contextlib.ExitStack, follow_links: bool
) -> dict[str, _Tensor]:
    """Open the safetensors files of a folder and list their tensors."""
    if (folder / _SINGLE).exists():  # it wins over an index, as in transformers
        return _open_file(folder, _SINGLE, stack, follow_links)
    if not (folder / _INDEX).exists():
        raise CheckpointError(_no_weights(folder))
    index = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(index, Mapping) or not all(
        isinstance(shard, str) and shard.isprintable() for shard in index.values()
    ):
        raise CheckpointError(
            f"{folder / _INDEX}: weight_map must map tensor names to file names, found "
            f"{type(index).__name__}; fetch the file again."
        )
    tensors: dict[str, _Tensor] = {}
    for shard in sorted(set(index.values())):
        found = _open_file(folder, shard, stack, follow_links)
        listed = {name for name, file in index.items() if file == shard}
        if listed != set(found):
            raise CheckpointError(
                f"{folder / shard} does not hold what {_INDEX} says: missing "
                f"{some(listed - set(found))}, not listed {some(set(found) - listed)}"
                "; fetch index and shards from the same revision."
            )
        tensors |= found
    return tensors


def _open_file(
    folder: Path, name: str, stack: contextlib.ExitStack, follow_links: bool
) -> dict[str, _Tensor]:
    path = folder / name
    _refuse_outside(folder, name, follow_links)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, but {_INDEX} names it; fetch it.")
    try:
        file = stack.enter_context(safe_open(path, framework="np"))
        return {key: _Tensor(key, file, path) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or not a safetensors file ({error}); fetch it again."
        ) from error


def _refuse_outside(folder: Path, name: str, follow_links: bool) -> None:
    """Raise if a file named by the checkpoint leaves the folder, also by a link."""
    named = PurePosixPath(name)
    if named.is_absolute() or ".." in named.parts:
        raise CheckpointError(
            f"{folder}: the weights file {name!r} lies outside of the folder; copy it "
            f"into the folder, and correct {_INDEX}."
        )
    if follow_links:
        return
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        # The Hub's cache: files are links into the model's or the whole cache's blobs.
        allowed += [root.parents[1] / "blobs", root.parents[2] / "blobs"]
    target = Path(os.path.realpath(root / name))
    if not any(target.is_relative_to(base) for base in allowed):
        raise CheckpointError(
            f"{folder}: the weights file {name!r} is a link to {target}, outside of "
            "the folder; copy the file into the folder, or allow such links: "
            "follow_links=True of jaxkv.load, --follow-links of the command line."
        )


def _no_weights(folder: Path) -> str:
    """Say what was found in place of safetensors files."""
    wanted = f"{folder} has neither {_SINGLE} nor {_INDEX}"
    torch_files = sorted(p.name for p in folder.glob("*.bin"))
    if torch_files:
        return (
            f"{wanted}, only torch files {some(torch_files)}; convert them with "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        )
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    return f"{wanted}; found {some(found)}."


def _check(tensors: Mapping[str, Tensor], plan: Plan, *, tied: bool) -> None:
    """Compare the headers with the plan, before anything large is read."""
    shapes = {name: shape for parts in plan.values() for name, shape in parts.items()}
    ignored = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    if tied:
        ignored.add(HEAD)
    missing, extra = shapes.keys() - tensors.keys(), tensors.keys() - shapes - ignored
    if missing or extra:
        hint = " (tie_word_embeddings is false)" if HEAD in missing else ""
        raise CheckpointError(
            f"The weights do not fit config.json: missing {some(missing)}{hint}, "
            f"superfluous {some(extra)}."
        )
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.path}: tensor {name} must have shape {shape} by config.json, "
                f"found {tensor.shape}."
            )
        if tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{tensor.path}: tensor {name} must be of a type in {list(_FLOATS)}, "
                f"found {tensor.dtype}; quantised weights need a quantization_config "
                "in config.json that says how they are packed."
            )
    if tied and HEAD in tensors:
        _check_tie(tensors[EMBEDDING], tensors[HEAD])


def _check_tie(embedding: Tensor, head: Tensor) -> None:
    """Raise if a tied checkpoint has an output layer of its own after all.

    transformers 5 then unties them, so silently tying would give other numbers.
    """
    # Some rows at a time, because these are the largest tensors of a checkpoint.
    bounds = [*range(0, embedding.shape[0], 4096), embedding.shape[0]]
    if (embedding.shape, embedding.dtype) != (head.shape, head.dtype) or not all(
        np.array_equal(embedding.read(*rows), head.read(*rows))
        for rows in itertools.pairwise(bounds)
    ):
        raise CheckpointError(
            f"{head.path}: config.json has tie_word_embeddings=true, but {HEAD} "
            f"differs from {EMBEDDING}; set tie_word_embeddings to false."
        )


def _in_parts(parts: Sequence[Tensor]) -> bool:
    """Return whether some rows and columns of tensors can be read alone."""
    return all(isinstance(part, _Tensor) and len(part.shape) < 3 for part in parts)


def _place(parts: Sequence[Any], sharding, spans, *, turned: bool) -> jax.Array:
    """Read the parts of one parameter, each device its own share of it."""
    dtype = _common_dtype(parts)
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def read(rows, columns):
        pieces, begin = [], 0
        for part in parts:
            low = max(rows[0] - begin, 0)
            high = min(rows[1] - begin, part.shape[0])
            if low < high:
                pieces.append(part.read(low, high, columns))
            begin += part.shape[0]
        return np.concatenate(pieces).astype(dtype, copy=False)

    shape = shape[::-1] if turned else shape
    return placing.place(shape, sharding, read, spans, turned=turned)


def _common_dtype(parts: Sequence[Tensor]) -> np.dtype:
    """Return the type of the numbers of a parameter: theirs, or float32."""
    stored = {_FLOATS[part.dtype] for part in parts}
    return jnp.dtype(stored.pop() if len(stored) == 1 else "float32")


def _join(parts: list[Tensor], order: np.ndarray | None) -> np.ndarray:
    """Read the parts of one parameter into one array, `[out, in]` or `[size]`.

    Args:
      parts: its tensors, one behind the other.
      order: where each row belongs; None is where it is.
    """
    dtype = _common_dtype(parts)
    if len(parts) == 1 and order is None:
        return parts[0].read().astype(dtype, copy=False)
    rows = sum(part.shape[0] for part in parts)
    array = np.empty((rows, *parts[0].shape[1:]), dtype)
    start = 0
    for part in parts:
        stop = start + part.shape[0]
        array[slice(start, stop) if order is None else order[start:stop]] = part.read()
        start = stop
    return array
