"""What `generation_config.json` says: what ends a text, and how tokens are drawn."""

import math
from pathlib import Path
from typing import Any

from jaxkv.models.checkpoint import CheckpointError, read_json

FILE = "generation_config.json"

# What draws a token here, with the ranges that it has.
_DRAWING = {
    "temperature": "a number of at least 0",
    "top_k": "a whole number of at least 0",
    "top_p": "a number above 0 and at most 1",
    "min_p": "a number of at least 0 and at most 1",
    "repetition_penalty": "a number above 0",
}
_TOP_K = 50  # of transformers, where a checkpoint draws and names none
# Keys that choose no token.
_INERT = frozenset(
    "_from_model_config assistant_early_exit bos_token_id cache_implementation "
    "chat_format decoder_start_token_id do_sample early_stopping eos_token_id "
    "length_penalty max_length max_new_tokens max_time max_window_size "
    "num_return_sequences output_attentions output_hidden_states output_logits "
    "output_scores pad_token_id return_dict_in_generate transformers_version "
    "trust_remote_code use_cache".split()
)
# Values with which other keys choose no token either.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "typical_p": (1,),
    "encoder_repetition_penalty": (1,),
    "guidance_scale": (1,),
}


def stop_ids(folder: str | Path) -> tuple[int, ...]:
    """Return the token ids that end a text, in the checkpoint's order.

    They are `eos_token_id` of `generation_config.json`, or of `config.json` where the
    former is absent or silent; empty if neither names one.

    Raises:
      CheckpointError: if a file is damaged, or an id is no whole number that int32
        holds and not below 0.
    """
    for name in (FILE, "config.json"):
        path = Path(folder) / name
        if not path.exists():
            continue
        value = read_json(path).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        ids = [_whole(i) for i in ids]
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise CheckpointError(
                f"{path}: eos_token_id must be a token id or a list of them, "
                f"found {value!r}."
            )
        return tuple(dict.fromkeys(ids))
    return ()


def drawing(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return how the checkpoint's makers draw tokens.

    As in transformers, nothing is drawn without `do_sample`, and with it from the 50
    likeliest tokens where `top_k` is absent.

    Args:
      folder: of the checkpoint.

    Returns:
      temperature (0 where nothing is drawn), top_k, top_p, min_p and
      repetition_penalty, as far as they are named; and the keys that choose tokens in
      another way, which jaxkv does not.

    Raises:
      CheckpointError: the file is missing or damaged, or a value is out of its range.
    """
    path = Path(folder) / FILE
    raw = {name: value for name, value in read_json(path).items() if value is not None}
    named = {name: _whole(raw[name]) for name in _DRAWING if name in raw}
    for name, value in named.items():
        if not _in_range(name, value):
            raise CheckpointError(
                f"{path}: {name} must be {_DRAWING[name]}, found {value!r}."
            )
    if raw.get("do_sample") is not True:
        penalty = named.get("repetition_penalty", 1.0)
        named = {"temperature": 0.0, "repetition_penalty": penalty}
    else:
        named = {"temperature": 1.0, "top_k": _TOP_K} | named
    others = {
        name: value
        for name, value in raw.items()
        if name not in _DRAWING
        and name not in _INERT
        and value not in _NEUTRAL.get(name, (0, False, [], {}))
    }
    return named, others


def _in_range(name: str, value: Any) -> bool:
    if type(value) not in (int, float) or not math.isfinite(value):
        return False
    if name == "top_k":
        return type(value) is int and value >= 0
    if name == "repetition_penalty":
        return value > 0
    if name == "temperature":
        return value >= 0
    return 0 <= value <= 1 and (value > 0 or name == "min_p")


def _whole(value: Any) -> Any:
    """Return an integer that a tool has written as 5.0; other values as they are."""
    return int(value) if type(value) is float and value.is_integer() else value
