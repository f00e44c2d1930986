"""Compares a transformers tokenizer with what its files say."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxkv.models.checkpoint import CheckpointError

PROBES = (
    "the cat and 12 hats, then the end.",
    "  two  spaces\n\n\tdef f(x):\n    return 'e'  # 12345 \r\n",
    "na\u00efve Stra\u00dfe, e\u0301, \u5317\u4eac, \u00a0, \u2581, "
    "\U0001f642\U0001f469\u200d\U0001f467.",
)
# How vocabularies write a space, a line break, and bytes; no text of ours holds them.
_MARKS = ("\u2581", "\u0120", "\u010a", "<0x")

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]


def check(
    tokenizer: Any,
    where: str | Path,
    *,
    vocabulary: Mapping[str, int] | None = None,
    encode: Encode | None = None,
    decode: Decode | None = None,
) -> None:
    """Compare a transformers tokenizer with what its files say, on probe texts.

    Args:
      tokenizer: of transformers.
      where: file or folder, for messages.
      vocabulary: the id of each token, as far as the files list them.
      encode: what the token ids of a text must be, without those put around it.
      decode: what the text of token ids must be.

    Raises:
      CheckpointError: they differ; or words come back joined, or with the marks by
        which vocabularies write spaces.
    """
    if vocabulary is not None:
        known = tokenizer.get_vocab()
        wrong = [t for t, i in vocabulary.items() if known.get(t) != i]
        if wrong:
            raise CheckpointError(
                f"{where}: transformers ({type(tokenizer).__name__}) gives the token "
                f"{wrong[0]!r} the id {known.get(wrong[0])}, but the file "
                f"{vocabulary[wrong[0]]} ({len(wrong)} tokens differ); put a "
                "tokenizer.json beside it."
            )
    for text in PROBES:
        probe(tokenizer, where, text, encode=encode, decode=decode)


def probe(
    tokenizer: Any,
    where: str | Path,
    text: str,
    *,
    encode: Encode | None = None,
    decode: Decode | None = None,
) -> None:
    """Make the comparison of `check` on one text."""
    try:
        expected = None if encode is None else encode(text)
    except Exception:  # the tokenizers library raises no narrower one
        return  # a vocabulary without a token for the unknown has no ids for this text
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    found = tokenizer.decode(ids)
    name = f"{where}: transformers ({type(tokenizer).__name__})"
    if expected is not None and ids != expected:
        raise CheckpointError(
            f"{name} makes {ids[:8]} of {text[:16]!r}, but the file says "
            f"{expected[:8]}; use the newest transformers."
        )
    if decode is not None and found != decode(ids):
        raise CheckpointError(
            f"{name} decodes {decode(ids)[:24]!r} as {found[:24]!r}; use the newest "
            "transformers."
        )
    if encode is not None or tokenizer.unk_token_id in ids:
        return
    marks = [mark for mark in _MARKS if mark in found and mark not in text]
    spaces = "".join(text.split()) == "".join(found.split()) != ""
    if not ids or marks or (spaces and text.split() != found.split()):
        raise CheckpointError(
            f"{name} reads {text[:24]!r} as {found[:24]!r}, so these are no files for "
            "that class; put a tokenizer.json beside them, or name the right "
            "tokenizer_class in tokenizer_config.json."
        )


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what the libraries of tokenizers raise into a CheckpointError.

    The panics of tokenizers, which is written in Rust, are no `Exception`s.
    """
    try:
        yield
    except BaseException as error:
        panics = type(error).__name__ == "PanicException"
        if isinstance(error, CheckpointError) or not (
            panics or isinstance(error, Exception)
        ):
            raise
        raise CheckpointError(
            f"{path}: the tokenizer cannot be read ({one_line(error)}); fetch it again."
        ) from error


def one_line(error: BaseException) -> str:
    """Return the message of an error of another library, short and in one line."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 200 else f"{said[:200]} ..."
