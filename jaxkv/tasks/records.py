"""Prompts in JSON lines: one reader for the public formats that files come in.

A record's format is told by its keys. Every key is known, either as a part of the
prompt or as something beside it; another one is refused, because what it holds may
belong to the prompt.

| format | the prompt |
|---|---|
| plain | "prompt": a text, or a list of token ids |
| RULER | "input", then "answer_prefix" |
| RULER in columns, as for KV caches | "context", "question", then "answer_prefix" |
| LongBench | "context", then "input" |
| Spec-Bench, MT-Bench | "turns" of a user, each asked after the last one's answer |
| chat | "messages", each with a "role" and its "content" |
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NoReturn

Message = dict[str, str]
"""What chat templates take: a "role" and its "content"."""

_FORMATS: dict[tuple[str, ...], tuple[str, ...]] = {
    # Keys that tell a format, and those it may have besides; the longest come first.
    ("context", "question"): ("answer_prefix",),
    ("context", "input"): (),
    ("messages",): (),
    ("turns",): (),
    ("input",): ("answer_prefix",),
    ("prompt",): (),
}
_GOLD = ("outputs", "answers", "answer")  # RULER, LongBench, RULER in columns
_BESIDE = {  # of any format; none of them is meant for the model
    *("id", "_id", "index", "question_id", "task", "category", "dataset", "language"),
    *("length", "length_w_model_temp", "token_position_answer", "truncation"),
    *("all_classes", "reference", "max_new_tokens", "others"),
}
_ROLES = ("system", "user", "assistant")
_BLANK_LINE = "\n\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A prompt, and what a file says beside it.

    Attributes:
      where: the file and the line, for messages.
      body: the prompt without its end: a text, or token ids; empty in a conversation.
      question: the end of the body that asks; "" where the file does not tell it from
        what it is about.
      answer_prefix: text that the answer goes on from; with a chat template it begins
        the assistant's turn, else it follows the body.
      messages: a conversation that ends with a user's message; () if it is none.
      later_turns: the user's messages after that, each asked behind an answer.
      outputs: strings that a right answer contains; () where the file says none.
      name: its "id", "_id" or "question_id", whichever comes first, or None.
      index: its number, or None.
      task: its name, or None.
      length: tokens or words, as the file counts them, or None.
      max_new_tokens: of the longest answer, or None.
    """

    where: str
    body: str | tuple[int, ...] = ""
    question: str = ""
    answer_prefix: str = ""
    messages: tuple[Message, ...] = ()
    later_turns: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    name: str | int | None = None
    index: int | None = None
    task: str | None = None
    length: int | None = None
    max_new_tokens: int | None = None

    @property
    def prompt(self) -> str | tuple[int, ...]:
        """The prompt as a text or token ids.

        Raises:
          ValueError: it is a conversation, which needs a chat template.
        """
        if self.messages:
            raise ValueError(f"{self.where}: a conversation needs a chat template.")
        if isinstance(self.body, str):
            return self.body + self.answer_prefix
        return self.body


def decode_text(content: bytes, name: str) -> str:
    """Return the text of a file, without a byte order mark.

    Args:
      content: the file's bytes.
      name: the file's, for the message.

    Raises:
      ValueError: it is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text (byte {error.start} is "
            f"0x{content[error.start]:02x}); convert it."
        ) from error


def read_records(content: bytes, name: str) -> list[Record]:
    """Read a file with a JSON object per line; empty lines are left out.

    Args:
      content: the file's bytes.
      name: the file's, for messages.

    Returns:
      The records, in the file's order.

    Raises:
      ValueError: a line is no record of a known format, or there is none; the message
        names the file and the line.
    """
    # Not splitlines: JSON strings may hold separators that Python splits at.
    lines = enumerate(decode_text(content, name).split("\n"), 1)
    found = [read_record(line, f"{name}:{n}") for n, line in lines if line.strip()]
    if not found:
        raise ValueError(f"{name}: holds no prompt; write a JSON object per line.")
    return found


def read_record(line: str, where: str) -> Record:
    """Read one line.

    Args:
      line: a JSON object.
      where: the file and the line, for messages.

    Raises:
      ValueError: it is no record of a known format.
    """
    fields = _Fields(_object(line, where), where)
    keys = next((keys for keys in _FORMATS if fields.given.keys() >= set(keys)), None)
    if keys is None:
        fields.refuse(
            'expected an object with "prompt", "input", "context" and "question", '
            f'"turns" or "messages", got the keys {_listed(fields.given)}.'
        )
    known = {*keys, *_FORMATS[keys], *_GOLD, *_BESIDE}
    unknown = [key for key in fields.given if key not in known]
    if unknown:
        fields.refuse(
            f"unknown {_listed(unknown)} beside {_listed(keys)}; if it belongs to the "
            "prompt put it in there, else leave it out."
        )
    gold = [key for key in _GOLD if fields.given.get(key) is not None]
    if len(gold) > 1:
        fields.refuse(f"{_listed(gold)} are two kinds of right answers; keep one.")
    return Record(
        where=where,
        name=fields.name(),
        **fields.prompt(keys),
        outputs=fields.outputs(gold[0]) if gold else (),
        index=fields.number("index", least=0),
        task=fields.text("task") or None,
        length=fields.number("length", least=1),
        max_new_tokens=fields.number("max_new_tokens", least=1),
    )


class _Fields:
    """The values of one object, each checked when it is asked for."""

    def __init__(self, given: Mapping[str, Any], where: str):
        self.given = given
        self._where = where

    def refuse(self, problem: str) -> NoReturn:
        """Raise ValueError that names the line."""
        raise ValueError(f"{self._where}: {problem}")

    def prompt(self, keys: tuple[str, ...]) -> dict[str, Any]:
        """Return the fields of `Record` that the prompt's keys make."""
        if keys == ("messages",):
            return {"messages": self._messages()}
        if keys == ("turns",):
            first, *later = self._turns()
            message = {"role": "user", "content": first}
            return {"messages": (message,), "later_turns": tuple(later)}
        if keys == ("prompt",) and isinstance(self.given["prompt"], list):
            return {"body": self._ids()}
        prefix = self.text("answer_prefix")
        texts = [self.text(key) for key in keys]
        if not "".join(texts).strip():
            self.refuse("the prompt is empty.")
        if len(texts) == 1:
            return {"body": texts[0], "answer_prefix": prefix}
        body = _joined(texts[0], texts[1], between=_BLANK_LINE)
        # In columns the space of RULER's own prefix may have been lost.
        return {
            "body": body,
            "question": body[len(texts[0]) :],
            "answer_prefix": _joined(body, prefix)[len(body) :],
        }

    def name(self) -> str | int | None:
        """Return what the file calls the record; other values than these are none."""
        values = (self.given.get(key) for key in ("id", "_id", "question_id"))
        return next((v for v in values if type(v) in (str, int)), None)

    def text(self, key: str) -> str:
        """Return a text, an empty one if it is not there."""
        value = self.given.get(key)
        return "" if value is None else self._checked(value, f'"{key}"')

    def number(self, key: str, *, least: int) -> int | None:
        """Return a whole number, or None if it is not there."""
        value = self.given.get(key)
        if type(value) is float and value.is_integer():
            value = int(value)  # tables write numbers of a column with gaps like this
        if value is not None and (type(value) is not int or not least <= value < 2**31):
            self.refuse(
                f'"{key}" must be a whole number from {least} to {2**31 - 1}, got '
                f"{_short(value)}."
            )
        return value

    def outputs(self, key: str) -> tuple[str, ...]:
        """Return the right answers."""
        value = self.given[key]
        values = [value] if key == "answer" and isinstance(value, str) else value
        texts = isinstance(values, list) and all(isinstance(v, str) for v in values)
        if not texts or not values or not all(values):
            self.refuse(
                f'"{key}" must be a list of texts, at least one and none of them '
                f"empty, got {_short(value)}."
            )
        return tuple(self._checked(value, f'"{key}"') for value in values)

    def _checked(self, value: Any, what: str) -> str:
        if not isinstance(value, str):
            self.refuse(f"{what} must be a text, got {_short(value)}.")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            self.refuse(
                f"{what} is no valid Unicode: character {error.start} is half of a "
                "pair (a lone surrogate)."
            )
        return value

    def _ids(self) -> tuple[int, ...]:
        ids = self.given["prompt"]
        if not ids:
            self.refuse("the prompt is empty.")
        for token in ids:
            if type(token) is not int:
                self.refuse(
                    '"prompt" must be a text or a list of token ids, got '
                    f"{_short(token)} in the list."
                )
        return tuple(ids)

    def _turns(self) -> list[str]:
        turns = self.given["turns"]
        if not isinstance(turns, list) or not turns:
            self.refuse(f'"turns" must be a list of texts, got {_short(turns)}.')
        for number, turn in enumerate(turns, 1):
            if not self._checked(turn, f"turn {number}").strip():
                self.refuse(f"turn {number} is empty.")
        return turns

    def _messages(self) -> tuple[Message, ...]:
        messages = self.given["messages"]
        if not isinstance(messages, list) or not messages:
            self.refuse(
                '"messages" must be a list of objects with "role" and "content", got '
                f"{_short(messages)}."
            )
        found = tuple(self._message(m, n) for n, m in enumerate(messages, 1))
        if found[-1]["role"] != "user":
            self.refuse(
                f'the last message is of the role "{found[-1]["role"]}", but a model '
                "answers a user; leave out what follows the user's last message."
            )
        return found

    def _message(self, message: Any, number: int) -> Message:
        what = f"message {number}"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            self.refuse(
                f'{what} must be an object with "role" and "content", got '
                f"{_short(message)}."
            )
        role, content = message["role"], message["content"]
        others = [key for key in message if key not in ("role", "content")]
        others = [key for key in others if message[key] is not None]
        if others:
            self.refuse(f"{what} has {_listed(others)}, which is not read here.")
        if role not in _ROLES:
            self.refuse(
                f"{what} must have a role among {', '.join(_ROLES)}, got "
                f"{_short(role)}."
            )
        if isinstance(content, list):
            content = "".join(self._part(part, what) for part in content)
        content = self._checked(content, f"the content of {what}")
        if role == "user" and not content.strip():
            self.refuse(f"{what} is empty.")
        return {"role": role, "content": content}

    def _part(self, part: Any, what: str) -> str:
        """Return the text of a part of a message, as chat interfaces write it."""
        if not isinstance(part, dict) or part.keys() != {"type", "text"}:
            self.refuse(
                f'{what} may have parts {{"type": "text", "text": ...}} only, got '
                f"{_short(part)}."
            )
        if part["type"] != "text":
            self.refuse(
                f'{what} has a part of type {_short(part["type"])}, not "text".'
            )
        return self._checked(part["text"], f"a part of {what}")


def _object(line: str, where: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f'"{twice}" comes twice in an object')
        return found

    try:
        value = json.loads(line, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(
            f'{where}: expected an object, such as {{"prompt": "..."}}, got '
            f"{_short(value)}."
        )
    return value


def _joined(first: str, second: str, between: str = " ") -> str:
    """Put two texts together, with something between where no white space is."""
    if not (first and second) or first[-1:].isspace() or second[:1].isspace():
        between = ""
    return first + between + second


def _listed(keys: Any) -> str:
    return ", ".join(json.dumps(key)[:60] for key in keys) or "none"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
