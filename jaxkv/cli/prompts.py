"""Prompts from the command line's flags, from files, and from standard input."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxkv.cli import flags
from jaxkv.contexts.context import Context
from jaxkv.language_model import LanguageModel
from jaxkv.tasks.records import Message, Record, decode_text, read_records
from jaxkv.text import prompts as library
from jaxkv.text.chat import encode_chat
from jaxkv.text.documents import encode_questions

_LINES = (".jsonl", ".ndjson")


def read(texts: Sequence[str], files: Sequence[Path]) -> list[Record]:
    """Return the prompts of `--prompt`, then of files; of stdin if there are none.

    A file of the name "-" is standard input, too.

    A file is one prompt, its text; one final line break is dropped, because editors
    and `echo` add it and a model would go on behind it. A `.jsonl` file has a prompt
    per line, in one of the formats of `jaxkv.tasks.records`.

    Raises:
      ValueError: a prompt is empty, or a file is not what its name says.
      OSError: a file cannot be read.
    """
    found = [_whole(f"--prompt {number}", text) for number, text in enumerate(texts, 1)]
    files = files if texts or files else [Path("-")]
    for file in files:
        if str(file) == "-":
            name = "standard input"
            found.append(_whole(name, _text(_standard_input(), name)))
            continue
        content = file.read_bytes()
        if file.suffix.lower() in _LINES:
            found += read_records(content, str(file))
        else:
            found.append(_whole(str(file), _text(content, str(file))))
    return found


def _standard_input() -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError(
            "no prompt; pass --prompt, --prompt-file, or text on standard input."
        )
    return sys.stdin.buffer.read()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt, ready for a model.

    Attributes:
      record: where it comes from.
      number: among all prompts, from 0.
      ids: its token ids.
      messages: the conversation so far; () if it is none.
      turn: of the conversation, from 0.
    """

    record: Record
    number: int
    ids: Sequence[int]
    messages: tuple[Message, ...] = ()
    turn: int = 0

    @property
    def turns(self) -> int:
        """How many answers are asked for."""
        return 1 + len(self.record.later_turns)


def encode(
    lm: LanguageModel,
    records: Sequence[Record],
    options: Mapping[str, Any],
    *,
    chat: bool,
    system: str | None = None,
) -> list[Asked]:
    """Tokenise prompts, and check them all before one of them costs anything.

    Args:
      lm: the model.
      records: the prompts; conversations always go through the chat template.
      options: arguments of `jaxkv.generate`.
      chat: put the others through it too, each as a user's message.
      system: what the system says first in each conversation, if not None.

    Raises:
      ValueError: a prompt is bad, does not fit the model or the options, or there is no
        template for it, or no place for `system`; the message names where it comes
        from.
    """
    found = []
    for number, record in enumerate(records):
        with _named(record.where):
            messages = record.messages
            if chat and not messages:
                if not isinstance(record.body, str):
                    raise ValueError("--chat takes prompts of text, not of token ids.")
                messages = ({"role": "user", "content": record.body},)
            if system is not None:
                messages = _with_system(system, messages)
            ids = _ids(lm, messages, record)
            asked = Asked(record=record, number=number, ids=ids, messages=messages)
            flags.check_fit(lm, ids, options)
            _check_turns(lm, asked, options["max_new_tokens"])
        found.append(asked)
    return found


def encode_behind(
    lm: LanguageModel,
    context: Context,
    records: Sequence[Record],
    options: Mapping[str, Any],
) -> list[Asked]:
    """Tokenise questions about a document, and check them all.

    Args:
      lm: the model.
      context: of one document.
      records: the questions.
      options: arguments of `jaxkv.generate`.

    Raises:
      ValueError: a question is bad, or does not fit behind the document; the message
        names where it comes from.
    """
    found = []
    for number, record in enumerate(records):
        with _named(record.where):
            if record.messages:
                raise ValueError(
                    "a context is asked by prompts, not by conversations; see jaxkv "
                    "chat --context."
                )
            (ids,) = encode_questions(lm, [record.prompt], chat=context.chat)
            flags.check_question(lm, context, ids, options)
        found.append(Asked(record=record, number=number, ids=ids))
    return found


def _with_system(system: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not messages:
        raise ValueError("--system goes with --chat, or with files of conversations.")
    if messages[0]["role"] == "system":
        raise ValueError("the conversation has a system's message; leave --system out.")
    return ({"role": "system", "content": system}, *messages)


def next_turns(
    lm: LanguageModel,
    batch: Sequence[Asked],
    answers: Sequence[str] | None,
    options: Mapping[str, Any],
    failures: list[ValueError],
) -> list[Asked]:
    """Return what is asked behind the answers of a batch, in its conversations.

    Args:
      lm: the model.
      batch: what was asked.
      answers: their texts.
      options: arguments of `jaxkv.generate`.
      failures: takes what is said of conversations that have become too long.
    """
    found = []
    for asked, answer in zip(batch, answers or (), strict=answers is not None):
        if asked.turn + 1 == asked.turns:
            continue
        turn = asked.record.later_turns[asked.turn]
        said = (*asked.messages, *_exchange(answer, turn))
        try:
            with _named(f"{asked.record.where}: turn {asked.turn + 2}"):
                ids = _ids(lm, said, asked.record)
                flags.check_fit(lm, ids, options)
        except ValueError as error:
            failures.append(error)
            continue
        found.append(
            dataclasses.replace(asked, ids=ids, messages=said, turn=asked.turn + 1)
        )
    return found


def _exchange(answer: str, turn: str) -> tuple[Message, Message]:
    return (
        {"role": "assistant", "content": answer},
        {"role": "user", "content": turn},
    )


def _check_turns(lm: LanguageModel, asked: Asked, max_new_tokens: int) -> None:
    """Raise ValueError for a conversation whose last turn may not fit the model."""
    if asked.turns == 1:
        return
    said = asked.messages
    for turn in asked.record.later_turns:
        said += _exchange("", turn)
    needed = len(encode_chat(lm, said)) + asked.turns * max_new_tokens
    if needed > lm.config.max_positions:
        raise ValueError(
            f"{asked.turns} turns with answers of --max-new-tokens {max_new_tokens} "
            f"need {needed} positions, but {lm.name} was made for "
            f"{lm.config.max_positions}; shorten one of them."
        )


def _ids(
    lm: LanguageModel, messages: Sequence[Message], record: Record
) -> Sequence[int]:
    prompt = (
        encode_chat(lm, messages, answer_prefix=record.answer_prefix)
        if messages
        else record.prompt
    )
    return library.encode(lm, [prompt])[0]


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Put the name of a prompt in front of what is said of it."""
    try:
        yield
    except ValueError as error:
        said = str(error).removeprefix("generate: ").removeprefix("prompt 0 ")
        said = said.replace("prompts[0]", "the prompt")
        raise ValueError(f"{where}: {said}") from error


def _whole(where: str, text: str) -> Record:
    if not text.strip():
        raise ValueError(f"{where}: the prompt is empty.")
    return Record(where=where, body=text)


def _text(content: bytes, name: str) -> str:
    return decode_text(content, name).removesuffix("\n").removesuffix("\r")
