"""What was launched and has not been read, in the order in which a device does it."""

import collections
from typing import Any, NamedTuple

import jax

from jaxkv.serving.meter import Meter
from jaxkv.serving.requests import Handle
from jaxkv.serving.rows import Report

Owners = list[tuple[int, Handle]]


class Lists(NamedTuple):
    """A report on the host; see `rows.Report`."""

    tokens: list[list[int]]
    lengths: list[int]
    done: list[bool]
    finite: list[bool]
    logprobs: Any


class Flight(NamedTuple):
    """Something that was launched.

    Attributes:
      report: of it.
      rows: the places in it, and whose they are.
      block: whether it is a block; else it is the first tokens of prompts.
    """

    report: Report
    rows: Owners
    block: bool


class Flights:
    """Blocks, and first tokens of prompts, that are under way.

    Attributes:
      blocks: how many of them are blocks.
      meter: of what they have brought.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._under_way: collections.deque[Flight] = collections.deque()
        self.blocks = 0

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._under_way)

    def add(self, report: Report, rows: Owners, *, block: bool) -> None:
        """Note what was launched, and have its report sent as soon as it is there."""
        for leaf in jax.tree.leaves(report):
            leaf.copy_to_host_async()
        self._under_way.append(Flight(report, rows, block))
        self.blocks += block
        self.meter.launched(report, len(rows) if block else None)

    def land(self) -> tuple[Flight, Lists, bool]:
        """Wait for what was launched first.

        Returns:
          It, its report, and whether that was there before anybody asked.

        Raises:
          Exception: the device has failed; then it is still under way.
        """
        flight = self._under_way[0]
        late = self.meter.asked(flight.report)
        report: Any = jax.device_get(flight.report)
        self.meter.came(late=late)
        self._under_way.popleft()
        self.blocks -= flight.block
        tokens, lengths, done, finite = (x.tolist() for x in report[:4])
        return flight, Lists(tokens, lengths, done, finite, report.logprobs), late

    def owners(self) -> list[Handle]:
        """Return the requests that took part in any of them."""
        return [handle for flight in self._under_way for _, handle in flight.rows]

    def clear(self) -> None:
        """Forget all of them."""
        self._under_way.clear()
        self.blocks = 0
