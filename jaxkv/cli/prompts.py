"""Prompts from the command line's flags, from files, and from standard input."""

import sys
from collections.abc import Sequence
from pathlib import Path

from jaxkv import arguments
from jaxkv.chat import encode_chat
from jaxkv.language_model import LanguageModel
from jaxkv.tasks.records import Record, decode_text, read_records

_LINES = (".jsonl", ".ndjson")


def read(texts: Sequence[str], files: Sequence[Path]) -> list[Record]:
    """Return the prompts of `--prompt`, then of files; of stdin if there are none.

    A file is one prompt, its text; one final line break is dropped, because editors
    and `echo` add it and a model would go on behind it. A `.jsonl` file has a prompt
    per line, in one of the formats of `jaxkv.tasks.records`.

    Raises:
      ValueError: a prompt is empty, or a file is not what its name says.
      OSError: a file cannot be read.
    """
    found = [_whole(f"--prompt {number}", text) for number, text in enumerate(texts, 1)]
    for file in files:
        content = file.read_bytes()
        if file.suffix.lower() in _LINES:
            found += read_records(content, str(file))
        else:
            found.append(_whole(str(file), _text(content, str(file))))
    if not texts and not files:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError(
                "no prompt; pass --prompt, --prompt-file, or text on standard input."
            )
        name = "standard input"
        found.append(_whole(name, _text(sys.stdin.buffer.read(), name)))
    return found


def encode(
    lm: LanguageModel, records: Sequence[Record], *, chat: bool
) -> list[list[int]]:
    """Return the token ids of each prompt, or of a conversation's first turn.

    Args:
      lm: the model.
      records: the prompts; conversations always go through the chat template.
      chat: put the others through it too, each as a user's message.

    Raises:
      ValueError: a prompt is bad, or there is no template for it; the message names
        where it comes from.
    """
    rows = []
    for record in records:
        try:
            rows += arguments.encode(lm, [_prompt(lm, record, chat=chat)])
        except ValueError as error:
            said = str(error).removeprefix("generate: ").removeprefix("prompt 0 ")
            raise ValueError(f"{record.where}: {said}") from error
    return rows


def _prompt(
    lm: LanguageModel, record: Record, *, chat: bool
) -> str | tuple[int, ...] | list[int]:
    if not (chat or record.messages):
        return record.prompt
    if not isinstance(record.body, str):
        raise ValueError("--chat takes prompts of text, not of token ids.")
    asked = record.messages or ({"role": "user", "content": record.body},)
    return encode_chat(lm, asked, answer_prefix=record.answer_prefix)


def _whole(where: str, text: str) -> Record:
    if not text.strip():
        raise ValueError(f"{where}: the prompt is empty.")
    return Record(where=where, body=text)


def _text(content: bytes, name: str) -> str:
    return decode_text(content, name).removesuffix("\n").removesuffix("\r")
