"""Tokenizers that are older than `tokenizer.json`, as transformers reads them.

What transformers makes of the files is checked against them.
"""

import codecs
import contextlib
import importlib.util
import itertools
import tempfile
from pathlib import Path
from typing import Any

from jaxkv.models.checkpoint import TEXT_FILES, CheckpointError, read_json
from jaxkv.models.quiet import quiet_transformers
from jaxkv.models.tokenizer_checks import Encode, check, damage_named, one_line

_PIECES = "tokenizer.model"
_WORDS = "vocab.json"
# What holds a vocabulary.
_FILES = ("*.model", f"{_PIECES}.v*", _WORDS, "vocab.txt", "tekken.json", "*.tiktoken")


def is_older_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a vocabulary in one of the older files."""
    return any(any(folder.glob(pattern)) for pattern in _FILES)


def read_older_tokenizer(folder: Path, config: dict[str, Any]) -> Any:
    """Return what transformers makes of older files, if they agree with it.

    Args:
      folder: of the checkpoint.
      config: what `tokenizer_config.json` holds.

    Returns:
      A transformers tokenizer that warns of no length and tidies no decoded text.

    Raises:
      CheckpointError: transformers cannot read the files, or makes something else of
        them, or a package is missing.
    """
    path, ids, vocabulary = folder, None, None
    around: dict[str, Any] = {}
    pieces = (folder / _PIECES).exists() and not _is_tiktoken(folder / _PIECES)
    if pieces:
        path = folder / _PIECES
        vocabulary, ids, around = _read_pieces(path, config)
    elif (folder / _WORDS).exists():
        path = folder / _WORDS
        vocabulary = read_json(path)
    with contextlib.ExitStack() as stack:
        transformers = stack.enter_context(quiet_transformers())
        # A sentencepiece model says itself how texts are split; a list of words leaves
        # it to the class.
        kind = "PreTrainedTokenizerFast" if pieces else "AutoTokenizer"
        try:
            tokenizer = getattr(transformers, kind).from_pretrained(
                _without_marks(folder, stack), trust_remote_code=False, **around
            )
            tokenizer.model_max_length = int(1e30)  # or it warns of long texts
            tokenizer.clean_up_tokenization_spaces = False
            check(tokenizer, path, vocabulary=vocabulary, encode=ids)
        except CheckpointError:
            raise
        except Exception as error:  # of the class that transformers took
            raise CheckpointError(
                f"{folder}: transformers cannot read the tokenizer; put a "
                "tokenizer.json into the folder, or name the right tokenizer_class in "
                f"tokenizer_config.json ({one_line(error)})."
            ) from error
    return tokenizer


def _without_marks(folder: Path, stack: contextlib.ExitStack) -> Path:
    """Return the folder, or a copy for readers that stumble over byte order marks."""
    marked = [p for p in folder.glob("*.json") if _first(p, 3) == codecs.BOM_UTF8]
    if not marked:
        return folder
    copy = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for path in itertools.chain.from_iterable(map(folder.glob, TEXT_FILES)):
        if path.is_file():
            content = path.read_bytes()
            (copy / path.name).write_bytes(content.removeprefix(codecs.BOM_UTF8))
    return copy


def _first(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _is_tiktoken(path: Path) -> bool:
    """Return whether a file lists a token in base64 and its rank on each line."""
    words = _first(path, 256).split(b"\n")[0].split(b" ")
    return len(words) == 2 and words[1].strip().isdigit()


def _read_pieces(
    path: Path, config: dict[str, Any]
) -> tuple[dict[str, int], Encode, dict[str, Any]]:
    """Return the vocabulary of a sentencepiece model, and what it makes of a text.

    The third value says which tokens stand around a text. As in transformers 4, that is
    BOS unless the configuration denies it.
    """
    if importlib.util.find_spec("sentencepiece") is None:
        raise CheckpointError(
            f"{path} is read by the package sentencepiece, which is not here; pip "
            "install sentencepiece protobuf, or put a tokenizer.json beside the file."
        )
    import sentencepiece

    with damage_named(path):
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocabulary = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    around = {
        "add_bos_token": config.get("add_bos_token", model.bos_id() >= 0),
        "add_eos_token": config.get("add_eos_token", False),
    }
    return vocabulary, model.encode, around
