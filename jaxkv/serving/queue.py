"""Requests that wait for a row, first come first served; threads share them."""

import collections
import threading

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
            handle = Handle(self._number, request, prompt_tokens)
            self._number += 1
            self._waiting.append(handle)
        return handle

    def take(self, most: int | None) -> tuple[Handle, int] | None:
        """Return the first request and the tokens that are read for it, or None.

        Args:
          most: tokens, padding included, that may be read; None is any number.
        """
        with self.lock:
            if not self._waiting:
                return None
            size = bucket(len(self._waiting[0].request.ids))
            if most is not None and size > most:
                return None
            return self._waiting.popleft(), size

    def cancel(self, handle: Handle) -> bool:
        """Note that a request is not wanted any more, unless it has ended."""
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
