"""A checkpoint in memory, and how it gets there."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.models import checkpoint, hf_config, hf_weights, orbax_copy
from jaxkv.models.decoder import Config, Decoder

NEEDLE = "needle"  # the word that names the shipped checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModel:
    """A network, its parameters and its tokenizer.

    Attributes:
      name: what it was loaded as, for reports.
      folder: where its files lie.
      network: the linen module; hashes by value.
      params: its parameters.
      tokenizer: the transformers tokenizer, or None if the folder has none; then
        prompts must be token ids.
      stop_ids: token ids that end a sequence.
    """

    name: str
    folder: Path
    network: Decoder
    params: Any
    tokenizer: Any
    stop_ids: tuple[int, ...]

    @property
    def config(self) -> Config:
        """Sizes of the network."""
        return self.network.config

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the parameters and of the cache."""
        return self.params["embedding"].dtype


def load(
    name: str | os.PathLike[str] = NEEDLE,
    *,
    dtype: str | None = None,
    revision: str | None = None,
) -> LanguageModel:
    """Load the shipped checkpoint, a Hugging Face folder or id, or an Orbax copy.

    Args:
      name: "needle", a folder, or a hub id such as "Qwen/Qwen3-0.6B".
      dtype: "float32", "bfloat16" or "float16"; None is the checkpoint's own, but
        float32 on CPU, which has no fast 16-bit arithmetic.
      revision: branch, tag or commit of a hub id.

    Returns:
      The model, its parameters on the default device.

    Raises:
      CheckpointError: the checkpoint is missing, damaged, or of an unsupported kind;
        the message names the file, tensor or key.
    """
    if not isinstance(name, str | os.PathLike):
        raise checkpoint.CheckpointError(
            f"load takes the name of a checkpoint, a folder or a Hub id, got {name!r}."
        )
    if str(name) == NEEDLE and revision is not None:
        raise checkpoint.CheckpointError(
            f"{revision=} selects a version of a Hub model, but {NEEDLE} comes with "
            "the package; leave the revision out."
        )
    folder = needle_folder() if str(name) == NEEDLE else None
    folder = folder or checkpoint.resolve(name, revision=revision)
    if dtype is None and jax.default_backend() == "cpu":
        dtype = "float32"
    if orbax_copy.is_orbax_copy(folder):
        config, params = orbax_copy.load_orbax(folder, dtype=dtype)
    else:
        config = hf_config.read_config(folder)
        params = hf_weights.read_weights(folder, config, dtype=dtype)
    return LanguageModel(
        name=str(name),
        folder=folder,
        network=Decoder(config),
        params=params,
        tokenizer=_read_tokenizer(folder),
        stop_ids=hf_config.stop_ids(folder),
    )


def save(lm: LanguageModel, folder: str | os.PathLike[str], **options: Any) -> None:
    """Save an Orbax copy of the converted weights, which `load` reads back.

    Args:
      lm: the model.
      folder: a new folder; nothing appears under this name until all is written.
      **options: of `jaxkv.models.orbax_copy.save_orbax`.
    """
    orbax_copy.save_orbax(lm.params, lm.config, folder, source=lm.folder, **options)


def needle_folder() -> Path:
    """Return the folder of the checkpoint that ships with the package."""
    import jaxkv.models

    # `jaxkv.models` is a folder of the wheel, or `models/` in an editable install.
    return Path(jaxkv.models.__file__).parent / NEEDLE


def _read_tokenizer(folder: Path) -> Any:
    if not any((folder / f).exists() for f in ("tokenizer.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise checkpoint.CheckpointError(
            f"{folder}: the tokenizer cannot be read ({error}); fetch its files again."
        ) from error
