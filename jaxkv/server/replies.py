"""Answers as OpenAI's API has them, whole and in chunks."""

import abc
import time
import uuid
from collections.abc import Sequence
from typing import Any

from jaxkv.serving.pieces import Piece

_LEAST = -9999.0  # in place of minus infinity, which JSON lacks


class Reply(abc.ABC):
    """The answers to one request.

    Attributes:
      usage: tokens that were read and written, as the API says it.
    """

    prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self, tokenizer: Any, model: str, prompt_tokens: int, top: int | None):
        """Begin answers that say nothing yet.

        Args:
          tokenizer: of the model.
          model: as the server calls it.
          prompt_tokens: of all prompts.
          top: alternatives to each token that are told; None for no logprobs.
        """
        self._tokenizer, self._top = tokenizer, top
        self._prompt_tokens, self._written = prompt_tokens, 0
        self._begin = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    @property
    def usage(self) -> dict[str, int]:
        """Return tokens of prompts and of answers."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._written,
            "total_tokens": self._prompt_tokens + self._written,
        }

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return all answers, of all their pieces."""
        by_index: dict[int, list[Piece]] = {}
        for piece in pieces:
            self._count(piece)
            by_index.setdefault(piece.index, []).append(piece)
        choices = [self._whole(index, by_index[index]) for index in sorted(by_index)]
        return {
            **self._begin,
            "object": self.whole_object,
            "choices": choices,
            "usage": self.usage,
        }

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """Return what is to be streamed of a piece."""
        self._count(piece)
        return [self._chunk([choice]) for choice in self._parts(piece)]

    def opening(self, answers: int) -> list[dict[str, Any]]:
        """Return what a stream begins with."""
        return []

    def closing(self) -> dict[str, Any]:
        """Return what a stream ends with where it tells its usage."""
        return self._chunk([]) | {"usage": self.usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._begin, "object": self.chunk_object, "choices": choices}

    def _count(self, piece: Piece) -> None:
        self._written += 0 if piece.given else len(piece.tokens)

    @abc.abstractmethod
    def _whole(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return one answer, of its pieces."""

    @abc.abstractmethod
    def _parts(self, piece: Piece) -> list[dict[str, Any]]:
        """Return what a chunk says of an answer; none if a piece says nothing."""

    def _name(self, token: int) -> str:
        """Return a token's text, or its name where it is a part of a character."""
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        if "\N{REPLACEMENT CHARACTER}" in text:
            return str(self._tokenizer.convert_ids_to_tokens(token))
        return text

    def _rows(self, piece: Piece) -> list[tuple[int, float | None, dict[int, float]]]:
        """Return token, logprob and alternatives, cut to what was asked for."""
        if self._top is None or piece.logprobs is None or piece.top_logprobs is None:
            return []
        columns = zip(piece.tokens, piece.logprobs, piece.top_logprobs, strict=True)
        return [
            (token, own, dict(list((top or {}).items())[: self._top]))
            for token, own, top in columns
        ]


class CompletionReply(Reply):
    """Of `/v1/completions`."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, *arguments: Any):
        """See `Reply`."""
        super().__init__(*arguments)
        self._offsets: dict[int, int] = {}

    def _whole(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        noted = self._noted(index, pieces)
        return self._choice(index, pieces, noted)

    def _parts(self, piece: Piece) -> list[dict[str, Any]]:
        noted = self._noted(piece.index, [piece])
        if not (piece.text or piece.reason or noted):
            return []
        return [self._choice(piece.index, [piece], noted)]

    def _choice(self, index: int, pieces: Sequence[Piece], noted: Any) -> dict:
        return {
            "index": index,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": noted,
            "finish_reason": pieces[-1].reason,
        }

    def _noted(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        rows = [row for piece in pieces for row in self._rows(piece)]
        if not rows:
            return None
        names = [self._name(token) for token, *_ in rows]
        offsets = []
        for (token, *_), name in zip(rows, names, strict=True):
            offsets.append(self._offsets.setdefault(index, 0))
            special = token in self._tokenizer.all_special_ids  # the text lacks them
            self._offsets[index] += 0 if special else len(name)
        # The chosen token is among its alternatives, however unlikely it was.
        top = [
            None
            if own is None
            else {self._name(t): _number(x) for t, x in (others | {token: own}).items()}
            for token, own, others in rows
        ]
        return {
            "tokens": names,
            "token_logprobs": [_number(own) for _, own, _ in rows],
            "top_logprobs": top,
            "text_offset": offsets,
        }


class ChatReply(Reply):
    """Of `/v1/chat/completions`."""

    prefix = "chatcmpl"
    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def opening(self, answers: int) -> list[dict[str, Any]]:
        """Return who speaks, of each answer."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": i, "delta": delta, "finish_reason": None}])
            for i in range(answers)
        ]

    def _whole(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text},
            "logprobs": self._noted(pieces),
            "finish_reason": pieces[-1].reason,
        }

    def _parts(self, piece: Piece) -> list[dict[str, Any]]:
        noted = self._noted([piece])
        base: dict[str, Any] = {"index": piece.index, "finish_reason": None}
        parts = []
        if piece.text or (noted and noted["content"]):
            delta = {"content": piece.text}
            parts.append(base | {"delta": delta, "logprobs": noted})
        if piece.reason:
            parts.append(base | {"delta": {}, "finish_reason": piece.reason})
        return parts

    def _noted(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if self._top is None:
            return None
        rows = [row for piece in pieces for row in self._rows(piece)]
        content = [
            self._entry(token, own)
            | {"top_logprobs": [self._entry(t, x) for t, x in others.items()]}
            for token, own, others in rows
        ]
        return {"content": content}

    def _entry(self, token: int, own: float | None) -> dict[str, Any]:
        name = self._name(token)
        return {
            "token": name,
            "logprob": _number(own),
            "bytes": list(name.encode("utf-8")),
        }


def _number(value: float | None) -> float | None:
    return None if value is None else max(value, _LEAST)
