"""Prompts are read, some of them together, each in parts that rows can wait for."""

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
      handles: whose prompts.
      tokens: that were read, padding included; of a part, its share of them.
      found: the rows, and a report of their first tokens; None if there are parts left.
      error: what has gone wrong; then the prompts are given up.
    """

    handles: list[Handle]
    tokens: int
    found: Found | None
    error: Exception | None = None


class Reader:
    """Takes prompts from a queue and reads them, first come first served.

    Attributes:
      current: whose prompt is being read in parts, or None.
    """

    def __init__(self, queue: Queue, board: Board, stall: int | None):
        self._queue, self._board, self._stall = queue, board, stall
        self.current: Handle | None = None
        self._parts: Iterator[Found | None] = iter(())
        self._size = 0

    def read(self, *, spent: int, busy: bool, rows: int) -> Read | None:
        """Read prompts, or the next part of one; None if there is none that may be.

        Args:
          spent: tokens that were read since the last block.
          busy: whether rows wait meanwhile; else a prompt is read as a whole.
          rows: that are free, at least one.
        """
        bounded = self._stall is not None and busy
        left = self._stall - spent if bounded and self._stall and spent else None
        if self.current is not None:
            if left is not None:
                return None  # its next part is one that rows have to wait for
            handles = [self.current]
        else:
            taken = self._queue.take(left, rows=rows, together=self._board.together)
            if taken is None:
                return None
            handles, self._size = taken
            for handle in handles:
                requests.read(handle)
            asked = [handle.request for handle in handles]
            self._parts = self._board.parts(asked)
        self.current = None
        try:
            found = next(self._parts)
            while found is None and not bounded:
                found = next(self._parts)
        except Exception as error:
            return Read(handles, 0, None, error)
        except BaseException:  # Ctrl-C, which may come while a program is compiled
            self._queue.put_back(handles)
            raise
        if found is None:
            (self.current,) = handles
        return Read(handles, min(self._size, self._stall or self._size), found)
