"""What somebody asks an engine for, and what becomes of it."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from jaxkv.contexts.context import Context
from jaxkv.sampling import Categorical, Greedy

Reason = Literal["stop", "length", "cancelled", "error"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt and what is wanted of it, checked.

    Attributes:
      ids: int32 `[P]`, the prompt; with a context, the question.
      sampler: how tokens are chosen.
      stop_ids: which end the output.
      max_new_tokens: the longest output.
      seed: of its draws.
      budget: tokens of the prompt that may be kept; None is all, or all that fit.
      context: that the prompt is a question about, or None.
      document: which one of it.
    """

    ids: np.ndarray
    sampler: Greedy | Categorical
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    seed: int
    budget: int | None = None
    context: Context | None = None
    document: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """How a request has ended.

    Attributes:
      tokens: the output's token ids, a stop id included.
      finish_reason: "stop" (a stop id), "length" (`max_new_tokens`), "cancelled", or
        "error".
      error: what went wrong, if that is "error".
      may_retry: whether the device has failed, so that asking again may help.
      prompt_tokens: of the prompt, a context's document included.
      waited: seconds until it was read.
      first_token: seconds until the first token was there; None if none came.
      seconds: until the end. All of them are counted from `submit`.
      logprobs: of the tokens; None unless the engine notes them.
      top_logprobs: for each token the likeliest ones and theirs; None likewise.
      tokenizer: of the model, or None.
    """

    tokens: tuple[int, ...]
    finish_reason: Reason
    error: str | None
    may_retry: bool
    prompt_tokens: int
    waited: float
    first_token: float | None
    seconds: float
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[dict[int, float], ...] | None = None
    tokenizer: Any = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def text(self) -> str | None:
        """Return the output as text, special tokens left out; None if there is none.

        It is decoded here: an engine has no time for it.
        """
        if self.tokenizer is None:
            return None
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True)


class Handle:
    """A request that was submitted; the engine writes here what becomes of it.

    Attributes:
      number: of the request, in the order of submission, from 0.
      request: what was asked.
      prompt_tokens: see `Result`.
      queue: where it waits or has waited, which tells one engine from another.
    """

    def __init__(self, number: int, request: Request, prompt_tokens: int, queue: Any):
        self.number, self.prompt_tokens = number, prompt_tokens
        self.request, self.queue = request, queue
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[dict[int, float]] = []
        self._result: Result | None = None
        self._begin = time.perf_counter()
        self._read: float | None = None
        self._first: float | None = None

    def __repr__(self) -> str:
        """Return a line of number and state, and no prompt."""
        state = f"{len(self._tokens)} tokens so far"
        if self._result is not None:
            state = f"{self._result.finish_reason} after {len(self._tokens)} tokens"
        return f"Handle({self.number}: {self.prompt_tokens} prompt tokens, {state})"

    @property
    def tokens(self) -> tuple[int, ...]:
        """Return the output's token ids so far."""
        return tuple(self._tokens)

    @property
    def result(self) -> Result | None:
        """Return how it has ended, or None."""
        return self._result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """New tokens of a request, or its end, or both.

    Attributes:
      handle: of the request.
      tokens: ids that are new.
      logprobs: of them; None unless the engine notes them.
      top_logprobs: likewise; see `Result`.
      result: how it has ended; None if it goes on.
    """

    handle: Handle
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    top_logprobs: tuple[dict[int, float], ...] | None = None
    result: Result | None = None


def read(handle: Handle) -> None:
    """Note that a request's prompt is being read."""
    handle._read = time.perf_counter()


def check_awaited(handle: Handle, *, idle: bool) -> None:
    """Check that an engine will end a request: one that is idle ends nothing.

    Raises:
      ValueError: nobody would ever.
    """
    if idle:
        raise ValueError(
            f"Engine: {handle!r} was lost in a step that was broken off; submit it "
            "again."
        )


def streamed(
    handle: Handle, go_on: Callable[[Handle], None]
) -> Iterator[tuple[int, ...]]:
    """Yield a request's new tokens until it ends.

    Args:
      handle: of the request.
      go_on: does what there is to be done next.
    """
    shown = 0
    while True:
        ended, tokens = handle.result is not None, handle.tokens
        if len(tokens) > shown:
            yield tokens[shown:]
            shown = len(tokens)
        if ended:
            return
        go_on(handle)


def count(handle: Handle) -> int:
    """Return how many tokens a request has so far."""
    return len(handle._tokens)


def told(handle: Handle, tokens: list[int], noted: Any) -> Event:
    """Note new tokens of a request.

    Args:
      handle: of the request.
      tokens: the new ones.
      noted: `LogProbs` of NumPy, of this row's tokens; None if nobody asked.
    """
    if tokens and handle._first is None:
        handle._first = time.perf_counter()
    handle._tokens += tokens
    if noted is None:
        return Event(handle=handle, tokens=tuple(tokens))
    count = len(tokens)
    chosen = noted.chosen[:count].tolist()
    pairs = zip(noted.tokens[:count], noted.values[:count], strict=True)
    top = [
        dict(zip(ids.tolist(), values.tolist(), strict=True)) for ids, values in pairs
    ]
    handle._logprobs += chosen
    handle._top += top
    return Event(
        handle=handle,
        tokens=tuple(tokens),
        logprobs=tuple(chosen),
        top_logprobs=tuple(top),
    )


def ended(
    event: Event,
    reason: Reason,
    tokenizer: Any,
    error: str | None = None,
    *,
    may_retry: bool = False,
) -> Event:
    """Return the event with how its request has ended, once and for all.

    Args:
      event: of the newest tokens.
      reason: see `Result`.
      tokenizer: of the model, or None.
      error: see `Result`.
      may_retry: see `Result`.
    """
    handle = event.handle
    if handle._result is not None:
        raise RuntimeError(f"{handle!r} ends twice; this is a fault of the engine.")
    begin, now = handle._begin, time.perf_counter()
    noted = event.logprobs is not None or bool(handle._logprobs)
    tokens = tuple(handle._tokens)
    handle._result = Result(
        tokens=tokens,
        finish_reason=reason,
        error=error,
        may_retry=may_retry,
        prompt_tokens=handle.prompt_tokens,
        waited=(handle._read or now) - begin,
        first_token=None if handle._first is None else handle._first - begin,
        seconds=now - begin,
        logprobs=tuple(handle._logprobs) if noted else None,
        top_logprobs=tuple(handle._top) if noted else None,
        tokenizer=tokenizer,
    )
    return dataclasses.replace(event, result=handle._result)
