"""Whose each row is."""

from collections.abc import Sequence

import numpy as np

from jaxkv.serving.board import Board
from jaxkv.serving.requests import Handle


class Places:
    """The requests that have rows.

    A row is given away as soon as its output is bound to reach its limit by what was
    launched, whether or not anybody has read it.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._handles: list[Handle | None] = [None] * board.rows
        # Tokens that an output has at least, if no stop id ends it.
        self._sure = np.zeros(board.rows, np.int64)

    def live(self) -> list[tuple[int, Handle]]:
        """Return the rows that are not free, and whose they are."""
        return [(row, h) for row, h in enumerate(self._handles) if h is not None]

    def free(self) -> list[int]:
        """Return the rows that are free."""
        return [row for row, handle in enumerate(self._handles) if handle is None]

    def give(self, rows: Sequence[int], handles: Sequence[Handle]) -> None:
        """Give rows to requests that have been read and put there."""
        for row, handle in zip(rows, handles, strict=True):
            self._handles[row], self._sure[row] = handle, 1
        self._release()

    def launched(self) -> None:
        """Note that a block was launched."""
        self._sure += self._board.sure
        self._release()

    def leave(self, handle: Handle) -> None:
        """Free the row of a request, if it has one."""
        if handle in self._handles:
            self._free(self._handles.index(handle))

    def _release(self) -> None:
        for row, handle in self.live():
            if self._sure[row] >= handle.request.max_new_tokens:
                self._free(row)

    def _free(self, row: int) -> None:
        self._handles[row] = None
        self._board.free(row)
