"""Prompts are read one after the other, each in parts that rows can wait for."""

from collections.abc import Iterator
from typing import NamedTuple

from jaxkv.generation import Running
from jaxkv.serving import requests
from jaxkv.serving.board import Board
from jaxkv.serving.queue import Queue
from jaxkv.serving.requests import Handle
from jaxkv.serving.rows import Report

Found = tuple[Running, Report]


class Read(NamedTuple):
    """What has been read.

    Attributes:
      handle: whose prompt.
      tokens: that were read, padding included; of a part, its share of them.
      found: the row, and a report of the first token; None if there are parts left.
      error: what has gone wrong; then the prompt is given up.
    """

    handle: Handle
    tokens: int
    found: Found | None
    error: Exception | None = None


class Reader:
    """Takes prompts from a queue and reads them, first come first served.

    Attributes:
      current: whose prompt is being read, or None.
    """

    def __init__(self, queue: Queue, board: Board, stall: int | None):
        self._queue, self._board, self._stall = queue, board, stall
        self.current: Handle | None = None
        self._parts: Iterator[Found | None] = iter(())
        self._size = 0

    def read(self, *, spent: int, busy: bool) -> Read | None:
        """Read a prompt, or its next part; None if there is none that may be.

        Args:
          spent: tokens that were read since the last block.
          busy: whether rows wait meanwhile; else a prompt is read as a whole.
        """
        bounded = self._stall is not None and busy
        left = self._stall - spent if bounded and self._stall and spent else None
        if self.current is None:
            taken = self._queue.take(left)
            if taken is None:
                return None
            self.current, self._size = taken
            requests.read(self.current)
            self._parts = self._board.parts(self.current.request, self._stall)
        elif left is not None:
            return None  # its next part is one that rows have to wait for
        handle = self.current
        try:
            found = next(self._parts)
            while found is None and not bounded:
                found = next(self._parts)
        except Exception as error:
            self.current = None
            return Read(handle, 0, None, error)
        if found is not None:
            self.current = None
        return Read(handle, min(self._size, self._stall or self._size), found)
