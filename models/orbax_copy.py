"""A copy of a checkpoint with the weights converted once, in Orbax's format.

The copy is a folder like the Hugging Face one, tokenizer files included; a marker file
with the network's configuration tells it apart, and a subfolder holds the parameters.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax

from jaxkv.kernels.experts import Gate
from jaxkv.models import layout
from jaxkv.models.checkpoint import TEXT_FILES, CheckpointError, read_json
from jaxkv.models.config import Config, Experts, LayerKind
from jaxkv.models.decoder import parameter_shapes
from jaxkv.models.gguf import tokenizer as gguf_tokenizer
from jaxkv.models.gguf.header import read_header
from jaxkv.models.hf.weights import DTYPES, check_dtype
from jaxkv.models.orbax_folder import check_target, checkpointer, written_whole
from jaxkv.models.rope import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    YarnScaling,
)

# What a configuration is made of, by the names that stand in the marker.
_PARTS: dict[str, Any] = {
    part.__name__: part
    for part in (
        *(Config, LayerKind, Rope, LinearScaling, Llama3Scaling, YarnScaling),
        *(LongRopeScaling, FrequencyFactors, Experts, Gate),
    )
}
_NAME = "is"
_MARKER = "jaxkv.json"
_PARAMS = "params"
_FORMAT = 2

# The index describes files that the copy does not have.
_NOT_COPIED = ("*.safetensors.index.json", "*.bin.index.json", _MARKER)


def is_orbax_copy(folder: str | Path) -> bool:
    """Return whether a folder was written by `save_orbax`."""
    return (Path(folder) / _MARKER).is_file()


def save_orbax(
    params: dict[str, Any],
    config: Config,
    folder: str | os.PathLike[str],
    *,
    source: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the parameters beside `folder`, then rename, so it is whole or absent.

    Args:
      params: the parameter tree of `Decoder(config)`, every leaf of one dtype.
      config: the network.
      folder: the folder to make; its parent exists.
      source: the checkpoint's folder, whose tokenizer and configuration files are
        copied along, or its GGUF file, whose tokenizer is written as such files;
        without it the copy holds the network only.
      overwrite: whether an older copy at `folder` is replaced. Nothing else is.

    Raises:
      CheckpointError: if `folder` holds anything that must not be replaced, its
        parent is missing, or `params` is not a tree of `config` in one dtype.
      NotImplementedError: if several processes run; gather the parameters in one.
    """
    if jax.process_count() > 1:
        raise NotImplementedError(
            f"save_orbax writes from one process, found {jax.process_count()}; gather "
            "the parameters and save them in a process of its own."
        )
    folder = Path(folder).absolute()
    dtype = _check_params(params, config)
    check_target(folder, _MARKER, "a copy of a checkpoint", overwrite=overwrite)
    with written_whole(folder) as partial:
        if source is not None:
            _copy_text(Path(source), partial, config)
        with checkpointer() as orbax:
            orbax.save(partial / _PARAMS, params)
        marker = {
            "format": _FORMAT,
            "dtype": dtype,
            "config": _written(config),
        }
        (partial / _MARKER).write_text(json.dumps(marker, indent=2) + "\n", "utf-8")


def read_orbax_config(folder: str | Path) -> Config:
    """Return the network's configuration of a copy.

    Raises:
      CheckpointError: if the folder's marker is of another format, or damaged.
    """
    return _read_marker(Path(folder) / _MARKER)[0]


def load_orbax(
    folder: str | Path,
    *,
    dtype: str | None = None,
    shardings: Any = None,
    shards: tuple[int, int] = (1, 1),
) -> tuple[Config, dict[str, Any]]:
    """Read a copy back.

    Args:
      folder: a folder written by `save_orbax`.
      dtype: "float32", "bfloat16" or "float16"; None keeps the saved type.
      shardings: a tree like the parameters with a `jax.sharding.Sharding` at every
        leaf; None puts everything on the default device. Each device reads its part.
      shards: how fused columns lie, see `layout`; devices exchange columns for it.

    Returns:
      The network's configuration and its parameter tree.

    Raises:
      CheckpointError: if the folder is no such copy, of another format, or damaged.
      ValueError: if `dtype` is none of the four.
    """
    check_dtype(dtype)
    folder = Path(folder).absolute()
    if not is_orbax_copy(folder):
        raise CheckpointError(
            f"{folder} has no {_MARKER}, so save_orbax did not write it; load it as a "
            "Hugging Face checkpoint."
        )
    config, saved = _read_marker(folder / _MARKER)
    shapes = parameter_shapes(config)
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: here, shapes)
    wanted = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, dtype or saved, sharding=sharding
        ),
        shapes,
        shardings,
    )
    try:
        with checkpointer() as orbax:
            found = orbax.restore(folder / _PARAMS, wanted)
    # Orbax and TensorStore raise several unrelated classes for damaged files.
    except Exception as error:
        raise CheckpointError(
            f"{folder / _PARAMS} is damaged or does not fit {_MARKER} "
            f"({str(error)[:300]}); save the copy again."
        ) from error

    def lay_out(path, leaf, sharding):
        columns = layout.order(config, path[-1].key, shards)
        if columns is None:
            return leaf
        return jax.jit(lambda x: x[..., columns], out_shardings=sharding)(leaf)

    return config, jax.tree_util.tree_map_with_path(lay_out, found, shardings)


def _check_params(params: dict[str, Any], config: Config) -> str:
    """Return the one dtype of a parameter tree that fits the network."""
    expected = jax.tree.map(lambda leaf: leaf.shape, parameter_shapes(config))
    found = jax.tree.map(lambda leaf: tuple(leaf.shape), params)
    if found != expected:
        raise CheckpointError(
            "params must be the parameter tree of the config, as parameter_shapes "
            f"gives it; expected {expected}, found {found}."
        )
    dtypes = sorted({leaf.dtype.name for leaf in jax.tree.leaves(params)})
    if len(dtypes) != 1 or dtypes[0] not in DTYPES:
        raise CheckpointError(
            f"params must all have one dtype of {DTYPES}, found {dtypes}."
        )
    return dtypes[0]


def _copy_text(source: Path, target: Path, config: Config) -> None:
    """Copy the small files that a tokenizer and `stop_ids` need."""
    if source.is_file():
        gguf_tokenizer.write_files(read_header(source), target, config.vocab_size)
        return
    if not source.is_dir():
        raise CheckpointError(f"source={str(source)!r} is no folder and no file.")
    for pattern in (*TEXT_FILES, "additional_chat_templates/*.jinja"):
        for path in source.glob(pattern):
            if path.is_file() and not any(path.match(skip) for skip in _NOT_COPIED):
                copy = target / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)


def _read_marker(path: Path) -> tuple[Config, str]:
    """Return the configuration and the saved dtype."""
    marker = read_json(path)
    if marker.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: format must be {_FORMAT}, found {marker.get('format')!r}; save "
            "the copy again with this version."
        )
    try:
        config = _read(marker["config"])
        if not isinstance(config, Config):
            raise TypeError(f"config is no Config: {config!r}"[:300])
        dtype = marker["dtype"]
        check_dtype(dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); save the copy again."
        ) from error
    return config, dtype


def _written(value: Any) -> Any:
    """Return a part of a configuration as JSON has it, with its name."""
    if isinstance(value, tuple):
        return [_written(entry) for entry in value]
    if not dataclasses.is_dataclass(value):
        return value
    fields = {
        field.name: _written(getattr(value, field.name))
        for field in dataclasses.fields(value)
    }
    return {_NAME: type(value).__name__, **fields}


def _read(value: Any) -> Any:
    """Return the part of a configuration that `_written` wrote."""
    if isinstance(value, list):
        return tuple(_read(entry) for entry in value)
    if not isinstance(value, dict):
        return value
    fields = {name: _read(field) for name, field in value.items() if name != _NAME}
    return _PARTS[value[_NAME]](**fields)
