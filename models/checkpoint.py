"""Where a checkpoint lies, and the one error for everything that can be wrong with it.

`hf`, `gguf` and `orbax_copy` read what lies in the folder found here, and
the `gguf_*` modules read a file.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

# What a tokenizer and its chat templates may consist of, besides the weights.
TEXT_FILES = ("*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja")

# Some repositories hold the same weights a second time, under their makers' own names.
_DUPLICATES = ("consolidated*.safetensors", "original/*", "onnx/*")


_ADAPTER = "adapter_config.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, is damaged, or is of an unsupported kind."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
      CheckpointError: if the file is missing, unreadable, or holds no JSON object.
    """
    content = _read(path)
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); fetch the file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} must hold a JSON object, found {type(value).__name__}."
        )
    return value


def read_text(path: Path) -> str:
    """Return the text of a file, without the mark that some editors put in front.

    Raises:
      CheckpointError: if the file is missing, unreadable, or not UTF-8.
    """
    content = _read(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not UTF-8 text ({error}); fetch the file again."
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); a checkpoint folder has it."
        ) from error


def resolve(
    path_or_hub_id: str | os.PathLike[str], revision: str | None = None
) -> Path:
    """Return where a checkpoint lies, downloading it from the Hub if need be.

    Args:
      path_or_hub_id: a folder or a GGUF file, which win if they exist, or a model id
        `owner/name`.
      revision: branch, tag or commit of a Hub model; the default branch if None.

    Returns:
      The folder, or the GGUF file, also if it is all that a folder holds. A Hub model
      lies in huggingface_hub's cache and is fetched once; the offline switch of
      huggingface_hub is honoured.

    Raises:
      CheckpointError: if the name is neither, or the Hub does not hand the model out.
    """
    if not str(path_or_hub_id):
        raise CheckpointError(
            "the name of the checkpoint is empty; give a folder, a GGUF file or a Hub "
            "id."
        )
    try:
        folder = Path(path_or_hub_id).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{path_or_hub_id}: {error}") from error
    if folder.exists() and revision is not None:
        raise CheckpointError(
            f"{revision=} selects a version of a Hub model, but {folder} is a "
            f"{'folder' if folder.is_dir() else 'file'}; leave the revision out."
        )
    if folder.is_dir():
        return _gguf_file(folder) or folder
    if folder.exists():
        if folder.suffix.lower() == ".gguf":
            return folder
        raise CheckpointError(
            f"{folder} is a file, but its name does not end in .gguf; give such a "
            "file, or the folder that holds config.json."
        )
    name = str(path_or_hub_id)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise CheckpointError(
            f"{name!r} is neither an existing folder nor a Hub id of the form "
            "'owner/name'; check the spelling."
        ) from error
    try:
        snapshot = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=[*TEXT_FILES, "*.safetensors"],
            ignore_patterns=list(_DUPLICATES),
        )
    # The Hub client lets errors of its HTTP library through, and that library differs
    # between its versions, so no narrower class covers a failed download.
    except Exception as error:
        raise CheckpointError(_hub_failure(name, revision, error)) from error
    return Path(snapshot)


def _gguf_file(folder: Path) -> Path | None:
    """Return the GGUF file of a folder that holds no other weights."""
    files = sorted(p for p in folder.glob("*") if p.suffix.lower() == ".gguf")
    if not files or any(folder.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise CheckpointError(
            f"{folder} holds several GGUF files ({', '.join(p.name for p in files)}); "
            "give the one to load."
        )
    return files[0]


def check_adapter(folder: Path) -> None:
    """Raise if a folder holds only an adapter; say so if one lies beside the weights.

    Args:
      folder: of a checkpoint.

    Raises:
      CheckpointError: there are no weights but an adapter's (LoRA).
    """
    if not (folder / _ADAPTER).exists():
        return
    weights = {path.name for path in folder.glob("*.safetensors")}
    if (folder / "config.json").exists() and weights - {"adapter_model.safetensors"}:
        logging.getLogger(__name__).warning(
            f"jaxkv: {folder} holds a full checkpoint and an adapter ({_ADAPTER}); the "
            "adapter is not applied."
        )
        return
    base = read_json(folder / _ADAPTER).get("base_model_name_or_path")
    raise CheckpointError(
        f"{folder} holds only an adapter{f' of {base}' if base else ''}; merge it with "
        "PeftModel.merge_and_unload(), save_pretrained, and load that folder."
    )


def _hub_failure(name: str, revision: str | None, error: Exception) -> str:
    """Say what the Hub refused and what to do about it."""
    what = f"{name!r} is not a folder here"
    match error:
        case GatedRepoError():  # a subclass of RepositoryNotFoundError, hence first
            return (
                f"{what}, and the Hub model is gated: accept its licence on "
                f"https://huggingface.co/{name} and log in with `hf auth login`."
            )
        case RepositoryNotFoundError():
            return (
                f"{what}, and the Hub has no such model (or it is private: log in with "
                "`hf auth login`); check the spelling."
            )
        case RevisionNotFoundError():
            return f"{what}, and the Hub model has no {revision=}."
        case LocalEntryNotFoundError() | ConnectionError():
            return (
                f"{what}, not in the Hub cache, and the Hub cannot be reached; connect "
                "once, or give the path of a downloaded folder."
            )
    return f"{what}, and the Hub failed: {type(error).__name__}: {error}"
