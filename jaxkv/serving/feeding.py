"""An engine that is fed from an iterator, with a bounded number of requests in hand."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from jaxkv.serving.engine import Engine
from jaxkv.serving.requests import Handle, Result

Key = TypeVar("Key")
Outcome = Result | ValueError

_TRIES = 3  # of a request at which the device fails


@dataclasses.dataclass(kw_only=True, eq=False)
class _Entry(Generic[Key]):
    """A request in hand."""

    key: Key
    asked: Mapping[str, Any] | ValueError
    outcome: Outcome | None = None
    tries: int = 0


def answers(
    engine: Engine,
    asked: Iterator[tuple[Key, Mapping[str, Any] | ValueError]],
    *,
    window: int,
    ordered: bool,
) -> Iterator[tuple[Key, Outcome]]:
    """Yield what becomes of requests, as they end or in their order.

    Args:
      engine: that answers; nobody else asks it.
      asked: what tells a request from others, and the arguments of `Engine.submit`, or
        what is wrong with it. It is read when there is room.
      window: requests in hand, at most; with `ordered` those included that have ended
        and wait for earlier ones.
      ordered: whether to yield them in their order.

    Raises:
      ValueError: the device fails at a request, again and again.
    """
    entries: list[_Entry[Key]] = []
    of_handle: dict[Handle, _Entry[Key]] = {}

    def submit(entry: _Entry[Key]) -> None:
        try:
            if isinstance(entry.asked, ValueError):
                raise entry.asked
            of_handle[engine.submit(**entry.asked)] = entry
        except ValueError as error:
            entry.outcome = error

    more = True
    while more or entries:
        while more and len(entries) < window and engine.waiting < engine.rows:
            following = next(asked, None)
            if following is None:
                more = False
                break
            entry = _Entry(key=following[0], asked=following[1])
            entries.append(entry)
            submit(entry)
        for event in engine.step():
            if event.result is None:
                continue
            entry = of_handle.pop(event.handle)
            entry.outcome, entry.tries = event.result, entry.tries + 1
            if event.result.may_retry:
                if entry.tries == _TRIES:
                    raise ValueError(f"the device has failed: {event.result.error}")
                entry.outcome = None
                submit(entry)
        ready: list[_Entry[Key]] = []
        left: list[_Entry[Key]] = []
        for entry in entries:
            waits = entry.outcome is None or (ordered and left)
            (left if waits else ready).append(entry)
        entries = left
        for entry in ready:
            if entry.outcome is not None:
                yield entry.key, entry.outcome
