"""Requests that wait for a row, first come first served; threads share them."""

import collections
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from jaxkv.expected import check_kind
from jaxkv.serving.requests import Handle, Request
from jaxkv.text.planning import bucket


class Queue:
    """Waiting requests, and what has been cancelled but not ended.

    Attributes:
      lock: is held while anything here, or the result of a handle, changes.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._number = 0
        self._waiting: collections.deque[Handle] = collections.deque()
        self._dropped: list[Handle] = []  # cancelled before they were read
        self._cancelled: set[Handle] = set()

    def __len__(self) -> int:
        """Return how many wait, or have to be told that they no longer do."""
        return len(self._waiting) + len(self._dropped)

    @property
    def waiting(self) -> int:
        """Return how many wait."""
        return len(self._waiting)

    def put(self, request: Request, prompt_tokens: int) -> Handle:
        """Let a request wait behind all others."""
        with self.lock:
            handle = Handle(self._number, request, prompt_tokens, self)
            self._number += 1
            self._waiting.append(handle)
        return handle

    def put_back(self, handles: Sequence[Handle]) -> None:
        """Let requests that were taken wait again, before all others."""
        with self.lock:
            for handle in reversed(handles):
                if handle in self._cancelled:
                    self._cancelled.discard(handle)
                    self._dropped.append(handle)
                else:
                    self._waiting.appendleft(handle)

    def take(
        self, most: int | None, *, rows: int, together: Callable[[int], int]
    ) -> tuple[list[Handle], int] | None:
        """Return the first request and the tokens that are read for it, or None.

        Where as many as are read together are among the first `rows` that wait, with
        prompts of one padded length, all of these are returned.

        Args:
          most: tokens, padding included, that may be read; None is any number.
          rows: that are free.
          together: says how many prompts of a padded length are read together.
        """
        with self.lock:
            if not self._waiting:
                return None
            size = _size(self._waiting[0])
            if most is not None and size > most:
                return None
            taken, number = [self._waiting[0]], together(size)
            fits = most is None or number * size <= most
            if number > 1 and fits and _plain(self._waiting[0]):
                first = itertools.islice(self._waiting, rows)
                alike = (h for h in first if _size(h) == size and _plain(h))
                group = list(itertools.islice(alike, number))
                taken = group if len(group) == number else taken
            for handle in taken:
                self._waiting.remove(handle)
            return taken, size * len(taken)

    def check(self, handle: Any) -> None:
        """Raise ValueError for what is no request that was put here.

        What another engine's handles are told here, that engine would tell them, too.
        """
        check_kind("Engine", "handle", handle, Handle, "what Engine.submit returns")
        if handle.queue is not self:
            raise ValueError(
                f"Engine: {handle!r} is no request of this engine, but of another one; "
                "hand it to the engine that it was submitted to."
            )

    def cancel(self, handle: Handle) -> bool:
        """Note that a request is not wanted any more, unless it has ended.

        Raises:
          ValueError: it is no request that was put here.
        """
        self.check(handle)
        with self.lock:
            if handle.result is not None or handle in self._dropped:
                return False
            if handle in self._waiting:
                self._waiting.remove(handle)
                self._dropped.append(handle)
            else:
                self._cancelled.add(handle)
            return True

    def unwanted(self) -> tuple[list[Handle], list[Handle]]:
        """Return, once, those cancelled while they waited, and those with a row."""
        with self.lock:
            dropped, self._dropped = self._dropped, []
            return dropped, list(self._cancelled)

    def forget(self, handle: Handle) -> None:
        """Forget that a request was cancelled, because it ends; with the lock held."""
        self._cancelled.discard(handle)


def _size(handle: Handle) -> int:
    """Return the tokens that are read for a request, padding included."""
    return bucket(len(handle.request.ids))


def _plain(handle: Handle) -> bool:
    return handle.request.context is None
