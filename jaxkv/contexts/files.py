"""Contexts on disk: a folder that is written beside, then renamed."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.contexts.context import Context, check_context
from jaxkv.expected import check_path, check_truth
from jaxkv.identity import Identity, of_arrays
from jaxkv.language_model import LanguageModel, check_model
from jaxkv.models.checkpoint import CheckpointError, read_json
from jaxkv.models.orbax_folder import check_target, checkpointer, written_whole
from jaxkv.state import KVState

_MARKER = "jaxkv-context.json"
_ARRAYS = "arrays"
_FORMAT = 1
_STATE = ("keys", "values", "positions", "target")
_REST = ("tokens", "lengths", "kept", "logits", "likeliest")


def save_context(
    context: Context, folder: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Save a context, which `load_context` reads back.

    Args:
      context: from `compress`.
      folder: to make; its parent exists. Nothing appears under this name until all is
        written.
      overwrite: whether an older context at `folder` is replaced. Nothing else is.

    Raises:
      CheckpointError: `folder` holds something else, or its parent is missing.
      ValueError: there is no context, or no path.
      NotImplementedError: several processes run; gather the arrays in one.
    """
    check_context("save_context", "context", context)
    check_path("save_context", folder=folder)
    check_truth("save_context", overwrite=overwrite)
    if jax.process_count() > 1:
        raise NotImplementedError(
            f"save_context writes from one process, found {jax.process_count()}; "
            "gather the context and save it in a process of its own."
        )
    check_folder(folder, overwrite=overwrite)
    folder = Path(folder).absolute()
    arrays: dict[str, Any] = {
        name: x for name in _REST if (x := getattr(context, name)) is not None
    }
    arrays["cache"] = [
        {name: getattr(state, name) for name in _STATE} for state in context.cache
    ]
    marker = {
        "format": _FORMAT,
        "identity": dataclasses.asdict(context.identity),
        "policy": context.policy,
        "chat": context.chat,
        "windows": [state.window for state in context.cache],
        "arrays": jax.tree.map(lambda x: [x.dtype.name, *x.shape], arrays),
        "digest": of_arrays(arrays),
    }
    with written_whole(folder) as partial:
        with checkpointer() as orbax:
            orbax.save(partial / _ARRAYS, arrays)
        (partial / _MARKER).write_text(json.dumps(marker, indent=2) + "\n", "utf-8")


def check_folder(folder: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raise CheckpointError where no context may be saved; see `save_context`."""
    folder = Path(folder).absolute()
    check_target(folder, _MARKER, "a context", overwrite=overwrite)


def read_identity(folder: str | os.PathLike[str]) -> Identity:
    """Return what is known of the model that a saved context belongs to.

    Raises:
      CheckpointError: the folder holds no context, or a damaged one.
    """
    return _read_marker(Path(folder))[0]


def load_context(folder: str | os.PathLike[str], lm: LanguageModel) -> Context:
    """Read a context back, onto the default device.

    Args:
      folder: from `save_context`.
      lm: the model that it was made with.

    Raises:
      CheckpointError: the folder holds no context, or a damaged one.
      ValueError: another model has made it, or one of another dtype or tokenizer; or
        there is no model, or no path.
    """
    check_path("load_context", folder=folder)
    check_model("load_context", lm)
    folder = Path(folder).absolute()
    identity, marker = _read_marker(folder)
    identity.check(lm.identity)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    damaged = f"{folder} is damaged"
    try:
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                tuple(leaf[1:]), jnp.dtype(leaf[0]), sharding=here
            ),
            marker["arrays"],
            is_leaf=lambda x: isinstance(x, list) and isinstance(x[0], str),
        )
        with checkpointer() as orbax:
            arrays = orbax.restore(folder / _ARRAYS, wanted)
        found = of_arrays(arrays)
        context = Context(
            cache=tuple(
                KVState(**layer, window=window)
                for layer, window in zip(
                    arrays["cache"], lm.config.windows, strict=True
                )
            ),
            **{name: arrays.get(name) for name in _REST},
            identity=identity,
            **_said(marker, lm.config.windows),
        )
    # Orbax and TensorStore raise several unrelated classes for damaged files.
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{damaged} ({said}); compress again.") from error
    if found != marker["digest"]:
        raise CheckpointError(
            f"{damaged}: its arrays are not those that were saved; compress again."
        )
    return context


def _said(marker: dict[str, Any], windows: tuple[int | None, ...]) -> dict[str, Any]:
    """Return the policy and the chat of a context, which no digest covers.

    Raises:
      TypeError: one of them is of another kind.
      ValueError: its layers have other windows than the model's.
    """
    policy, chat = marker["policy"], marker["chat"]
    if type(policy) is not str or type(chat) is not bool:
        raise TypeError(
            f"policy must be a text and chat true or false, found {policy!r}, {chat!r}"
        )
    # What was saved before there were windows names none.
    found = marker.get("windows") or [None] * len(windows)
    if repr(found) != repr(list(windows)):
        raise ValueError(
            f"its layers have windows {found}, those of the model {list(windows)}"
        )
    return {"policy": policy, "chat": chat}


def _read_marker(folder: Path) -> tuple[Identity, dict[str, Any]]:
    """Return the identity of the model, and all that the marker says."""
    path = folder / _MARKER
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no context, since it has no {_MARKER}; make one with "
            "jaxkv compress, or jaxkv.save_context."
        )
    marker = read_json(path)
    if marker.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: format must be {_FORMAT}, found {marker.get('format')!r}; "
            "compress again with this version."
        )
    try:
        return Identity(**marker["identity"]), marker
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); compress again."
        ) from error
