"""Questions from a file: one per line, in any of the public formats."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxkv.evaluation.questions import OUTPUT, Cell, Question, need_tokenizer, turns
from jaxkv.language_model import LanguageModel
from jaxkv.tasks import Sample
from jaxkv.tasks.records import Record, read_records
from jaxkv.text.chat import encode_chat
from jaxkv.text.prompts import encode


def read_task_file(
    lm: LanguageModel,
    file: Path,
    *,
    max_new_tokens: int | None = None,
    chat: bool = False,
    system: str | None = None,
) -> list[Question]:
    """Read questions and right answers from a JSON-lines file.

    All formats of `jaxkv.tasks.records` are read. The questions make one table, whose
    length is that of the longest prompt: what a file says of lengths is each sample's
    own. A record's task is what it says, else the file's name.

    Args:
      lm: a model with a tokenizer.
      file: the file.
      max_new_tokens: longest output; None takes what each record says, else 128.
      chat: make a user's turn of each prompt that is a text.
      system: what the system says first, in such a conversation.

    Raises:
      ValueError: a line is no question with a right answer, or an index comes twice;
        the message names the line.
      OSError: the file cannot be read.
    """
    need_tokenizer(lm)
    records = read_records(file.read_bytes(), str(file))
    name = os.fsencode(file.stem).decode("utf-8", "replace")
    numbered: dict[tuple[str, int], Record] = {}
    counts: dict[str, int] = {}
    for record in records:
        task = record.task or name
        index = counts.get(task, 0) if record.index is None else record.index
        _check_question(record)
        if (task, index) in numbered:
            raise ValueError(
                f"{record.where}: index {index} has come before; number the lines "
                'differently or leave "index" out.'
            )
        numbered[task, index] = record
        counts[task] = counts.get(task, 0) + 1
    if chat:
        records = [_in_chat(record, system) for record in records]
    rows = _rows(lm, records)
    longest = max(map(len, rows))
    return [
        Question(
            cell=Cell(task=task, length=longest),
            index=index,
            ids=ids,
            sample=Sample(
                task=task,
                segments=((_asked(record), False), ("", True)),
                outputs=record.outputs,
                max_new_tokens=max_new_tokens or record.max_new_tokens or OUTPUT,
                question=record.question,
                answer_prefix=record.answer_prefix,
            ),
            answer_tokens=0,
            by_lines=False,
        )
        for ((task, index), record), ids in zip(numbered.items(), rows, strict=True)
    ]


def _in_chat(record: Record, system: str | None) -> Record:
    if record.messages or not isinstance(record.body, str):
        return record  # it says itself how it is asked
    # What the answer begins with follows the template, not the body.
    return dataclasses.replace(record, messages=tuple(turns(record.body, system)))


def _check_question(record: Record) -> None:
    if not record.outputs:
        raise ValueError(
            f'{record.where}: lacks "outputs", the strings that a right answer has.'
        )
    if record.later_turns:
        raise ValueError(
            f"{record.where}: has {len(record.later_turns)} turns behind the first "
            "answer, but one answer is scored; leave them out."
        )


def _asked(record: Record) -> str:
    """Return a record's prompt as a text, for a sample."""
    if record.messages:
        return "\n".join(message["content"] for message in record.messages)
    return record.prompt if isinstance(record.prompt, str) else ""


def _rows(lm: LanguageModel, records: Sequence[Record]) -> list[np.ndarray]:
    """Return the token ids of records: texts in one call, conversations one by one."""
    whole = [record for record in records if not record.messages]
    try:
        together = iter(
            encode(lm, [record.prompt for record in whole]) if whole else ()
        )
    except ValueError:  # one is bad; alone it is named
        for record in whole:
            _ids(lm, record)
        raise
    return [
        _ids(lm, record) if record.messages else np.array(next(together), np.int32)
        for record in records
    ]


def _ids(lm: LanguageModel, record: Record) -> np.ndarray:
    """Return a record's token ids; a conversation goes through the chat template."""
    try:
        asked: Any = (
            encode_chat(lm, record.messages, answer_prefix=record.answer_prefix)
            if record.messages
            else record.prompt
        )
        return np.array(encode(lm, [asked])[0], np.int32)
    except ValueError as error:
        said = str(error).removeprefix("generate: ").removeprefix("prompt 0 ")
        raise ValueError(f"{record.where}: {said}") from error
