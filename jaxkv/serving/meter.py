"""How busy an engine's rows are, and how long the device waits for the host."""

import dataclasses
import time
from typing import Any

from jaxkv.serving.rows import Report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What an engine has done.

    Attributes:
      blocks: that were launched.
      rows: in use at their launch, summed up over blocks.
      tokens: of outputs, the first ones left out, which come with the prompts.
      steps: of blocks; with drafts they are tokens of the row that got most.
      gap: seconds between blocks in which the host had the results of one and had not
        launched what follows. Where the host came late, they begin when it came.
      late: blocks whose results were there before the host asked for them.
    """

    blocks: int = 0
    rows: int = 0
    tokens: int = 0
    steps: int = 0
    gap: float = 0.0
    late: int = 0


class Meter:
    """Counts what an engine does.

    Attributes:
      counts: so far.
    """

    def __init__(self) -> None:
        self.counts = Counts()
        self._arrived: float | None = None

    def asked(self, flight: Report) -> None:
        """Note whether a block is over that the host is about to wait for."""
        lengths: Any = flight.lengths
        if lengths.is_ready():
            self._add(late=1)
            self._arrived = time.perf_counter()

    def came(self, tokens: list[int]) -> None:
        """Note that the results of a block are there: new tokens of each row."""
        self._add(tokens=sum(tokens), steps=max(tokens, default=0))
        if self._arrived is None:
            self._arrived = time.perf_counter()

    def busy(self) -> None:
        """Note that the device has something to do."""
        if self._arrived is not None:
            self._add(gap=time.perf_counter() - self._arrived)
        self._arrived = None

    def rests(self) -> None:
        """Note that there is nothing to be done."""
        self._arrived = None

    def launched(self, rows: int) -> None:
        """Note that a block was launched with so many rows in use."""
        self.busy()
        self._add(blocks=1, rows=rows)

    def _add(self, **more: float) -> None:
        now = {name: getattr(self.counts, name) + x for name, x in more.items()}
        self.counts = dataclasses.replace(self.counts, **now)
