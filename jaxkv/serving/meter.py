"""How busy an engine's rows are, and how long the device waits for the host."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from jaxkv.serving.rows import Report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What an engine has done.

    Attributes:
      blocks: that were launched.
      rows: in use at their launch, summed up over blocks.
      tokens: of outputs, the first ones left out, which come with the prompts.
      steps: of blocks; where they have no fixed number, and with drafts, they are
        tokens of the row that got most.
      gap: seconds in which the device may have had nothing to do while there was
        something: from when it was last known to work until the host launched more.
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
        self._newest: Any = None  # an array of what was launched last
        self._worked = 0.0  # when the device is known to have worked last

    def asked(self, report: Report) -> bool:
        """Return whether what the host is about to wait for is there already."""
        lengths: Any = report.lengths
        return lengths.is_ready()

    def came(self, *, late: bool) -> None:
        """Note that what the host has asked for is there."""
        if not late or not self._over():
            self._worked = time.perf_counter()

    def block(self, tokens: Sequence[int], steps: int | None, *, late: bool) -> None:
        """Note what a block has brought to each row, and its steps if fixed."""
        steps = max(tokens, default=0) if steps is None else steps
        self._add(tokens=sum(tokens), steps=steps, late=int(late))

    def launches(self) -> None:
        """Note that the device is about to get something to do."""
        now = time.perf_counter()
        if self._newest is not None and self._over():
            self._add(gap=now - self._worked)
        self._worked = now

    def launched(self, report: Report, rows: int | None = None) -> None:
        """Note what was launched; of a block, with how many rows in use."""
        self._newest = report.lengths
        if rows is not None:
            self._add(blocks=1, rows=rows)

    def rests(self) -> None:
        """Note that there is nothing to be done."""
        self._newest = None

    def _over(self) -> bool:
        return self._newest is None or self._newest.is_ready()

    def _add(self, **more: float) -> None:
        now = {name: getattr(self.counts, name) + x for name, x in more.items()}
        self.counts = dataclasses.replace(self.counts, **now)
