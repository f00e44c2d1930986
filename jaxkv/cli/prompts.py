"""Prompts from the command line's flags, from files, and from standard input."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxkv.language_model import LanguageModel

Prompt = str | list[int]

# Ours, and the one of RULER's data files.
_KEYS = ("prompt", "input")


def read(texts: Sequence[str], files: Sequence[Path]) -> list[Prompt]:
    """Return the prompts of `--prompt`, then of files; of stdin if there are none.

    A file is one prompt, its text; one final line break is dropped, because editors
    and `echo` add it and a model would go on behind it. A `.jsonl` file has a prompt
    per line: an object whose "prompt" (or RULER's "input") is a text or token ids.

    Raises:
      ValueError: a prompt is empty, or a file is not what its name says.
      OSError: a file cannot be read.
    """
    named: list[tuple[str, Prompt]] = [
        (f"--prompt {number}", text) for number, text in enumerate(texts, 1)
    ]
    for file in files:
        text = _decode(file.read_bytes(), str(file))
        if file.suffix.lower() == ".jsonl":
            named += _lines(text, file)
        else:
            named.append((str(file), _without_last_break(text)))
    if not texts and not files:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError(
                "no prompt; pass --prompt, --prompt-file, or text on standard input."
            )
        text = _decode(sys.stdin.buffer.read(), "standard input")
        named.append(("standard input", _without_last_break(text)))
    for name, prompt in named:
        if not (prompt.strip() if isinstance(prompt, str) else prompt):
            raise ValueError(f"{name}: the prompt is empty.")
    return [prompt for _, prompt in named]


def as_chat(lm: LanguageModel, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return each prompt as a user's turn in the model's chat template, in token ids.

    Raises:
      ValueError: the model has no chat template, or a prompt is no text.
    """
    import jinja2  # transformers renders templates with it

    if lm.tokenizer is None or not lm.tokenizer.chat_template:
        raise ValueError(f"--chat: {lm.name} has no chat template; leave --chat out.")
    rows = []
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError("--chat takes prompts of text, not of token ids.")
        try:
            row = lm.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_dict=False,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"--chat: the template of {lm.name}: {error}") from error
        rows.append(row)
    return rows


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text (byte {error.start} is "
            f"0x{content[error.start]:02x}); convert it."
        ) from error


def _lines(text: str, file: Path) -> list[tuple[str, Prompt]]:
    found: list[tuple[str, Prompt]] = []
    # Not splitlines: JSON strings may hold separators that Python splits at.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from error
        keys = [key for key in _KEYS if isinstance(record, dict) and key in record]
        prompt: Any = record[keys[0]] if keys else None
        is_ids = isinstance(prompt, list) and all(type(i) is int for i in prompt)
        if not (isinstance(prompt, str) or is_ids):
            raise ValueError(
                f'{where}: expected an object with "prompt" (or "input"), a text or a '
                "list of token ids."
            )
        found.append((where, prompt))
    if not found:
        raise ValueError(f"{file}: holds no prompt.")
    return found


def _without_last_break(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")
