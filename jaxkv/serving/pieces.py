"""What requests have brought, as text that ends where a stop string begins."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

from jaxkv.serving.requests import Event
from jaxkv.serving.worker import Group, StoppedError, Worker
from jaxkv.text.terminal import TextStream


class FailedError(Exception):
    """An engine has ended a request as "error"."""


class StoppedText:
    """Turns tokens into text up to the first of some strings.

    It is the one that ends first; of several that end there, the longest.

    Attributes:
      stopped: whether one of them was found; nothing comes behind it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        """Begin an empty text.

        Args:
          tokenizer: of the model.
          stops: strings that end it, none of them empty.
        """
        self.stopped = False
        self._stops = stops
        self._held = ""
        self._stream = TextStream(tokenizer, self._write)

    def push(self, token: int) -> str:
        """Take one more token, and return the text that is certain by now."""
        self._stream([[token]])
        return self._release(end=False)

    def finish(self, text: str) -> str:
        """Return what is left to be said of the whole text."""
        if not self.stopped:
            self._stream.finish(text)
        return self._release(end=True)

    def _write(self, text: str) -> None:
        self._held += text

    def _release(self, *, end: bool) -> str:
        found = [
            (at + len(stop), at)
            for stop in self._stops
            if (at := self._held.find(stop)) >= 0
        ]
        if self.stopped or found:
            # The one that is whole first ends the text, however many tokens came.
            known = "" if self.stopped else self._held[: min(found)[1]]
            self.stopped, self._held = True, ""
            return known
        keep = 0 if end else max(map(self._begun, self._stops), default=0)
        at = len(self._held) - keep
        known, self._held = self._held[:at], self._held[at:]
        return known

    def _begun(self, stop: str) -> int:
        """Return how many characters at the end may be the beginning of a string."""
        most = min(len(stop) - 1, len(self._held))
        lengths = range(most, 0, -1)
        return next((n for n in lengths if self._held.endswith(stop[:n])), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """More of one answer.

    Attributes:
      index: of the answer.
      text: that is new; it may lag behind the tokens.
      tokens: that are new, up to the one that completed a stop string.
      logprobs: of these; None unless they are noted, or in place of one that nothing
        stands before.
      top_logprobs: likewise.
      reason: "stop" or "length" if this was the last piece of the answer.
      given: whether this repeats the prompt.
    """

    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: Sequence[float | None] | None
    top_logprobs: Sequence[dict[int, float] | None] | None
    reason: str | None
    given: bool = False


async def pieces(
    worker: Worker, group: Group, tokenizer: Any, stops: Sequence[str]
) -> AsyncIterator[Piece]:
    """Yield pieces of the answers of a group until all have ended.

    Args:
      worker: that works on them.
      group: of the requests. Who leaves early cancels it.
      tokenizer: of the model.
      stops: strings that end an answer.

    Raises:
      FailedError: one of them failed.
      StoppedError: the worker did.
    """
    texts = [StoppedText(tokenizer, stops) for _ in group.handles]
    open_answers = set(range(len(texts)))
    while open_answers:
        news = await group.events.get()
        if news is None:
            raise StoppedError
        index, event = news
        if index not in open_answers:
            continue  # tokens that came behind a stop string
        piece = _piece(index, event, texts[index])
        if piece.reason:
            open_answers.discard(index)
            worker.cancel_one(group, index)
        yield piece
        await asyncio.sleep(0)  # others wait, too


def _piece(index: int, event: Event, text: StoppedText) -> Piece:
    """Return what an event says of an answer."""
    new, used, result = "", 0, event.result
    for token in event.tokens:
        new, used = new + text.push(token), used + 1
        if text.stopped:
            break
    reason = None
    if not text.stopped and result is not None:
        if result.finish_reason == "cancelled":
            raise StoppedError  # by nobody who reads this
        if result.finish_reason == "error":
            raise FailedError(result.error)
        new += text.finish(result.text or "")
        reason = result.finish_reason
    return Piece(
        index=index,
        text=new,
        tokens=event.tokens[:used],
        logprobs=event.logprobs and event.logprobs[:used],
        top_logprobs=event.top_logprobs and event.top_logprobs[:used],
        reason="stop" if text.stopped else reason,
    )
