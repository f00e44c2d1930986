"""One thread that runs an engine's loop, for callers in an event loop.

    event loop                       the worker's thread
    submit, cancel  ──────────────►  engine.step(), one job between two steps
    Group.events    ◄──────────────  new tokens and ends, one call a step

The methods of `Worker` are called in the event loop. What waits is bounded: by the
places that requests take until the engine has ended them, and by their longest outputs.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from jaxkv.serving.engine import Engine
from jaxkv.serving.requests import Event, Handle

R = TypeVar("R")


class FullError(Exception):
    """There is no place for one more request."""


class StoppedError(Exception):
    """The worker takes no more requests, or can work on none."""


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Requests that are answered together.

    Attributes:
      handles: of the engine, in the order in which they were asked for.
      events: what becomes of them: the index of a handle and its news. None says that
        the worker has failed.
    """

    handles: list[Handle]
    events: asyncio.Queue[tuple[int, Event] | None]


class Worker:
    """Runs an engine in a thread of its own.

    Attributes:
      engine: that it runs.
      most: requests that may have a row or wait.
      taken: places of them that are taken.
      failed: whether the engine's loop has ended by an error.
    """

    def __init__(self, engine: Engine, *, queue: int):
        """Start nothing yet.

        Args:
          engine: nobody else may call its `step`.
          queue: requests that may wait for a row.
        """
        self.engine, self.most = engine, engine.rows + queue
        self.taken, self.failed = 0, False
        self._groups: dict[Handle, tuple[Group, int]] = {}
        self._jobs: collections.deque[_Job] = collections.deque()
        self._wake, self._stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="jaxkv-engine")
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin to work for the event loop that runs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Take no more requests, cancel those that there are, and end the thread."""
        self._stopping = True
        for handle in list(self._groups):
            self.engine.cancel(handle)
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    def submit(self, wanted: Sequence[Mapping[str, Any]]) -> Group:
        """Ask for continuations, all of them or none.

        Args:
          wanted: arguments of `Engine.submit` for each.

        Raises:
          ValueError: see `Engine.submit`.
          FullError: there are no places for them.
          StoppedError: the worker ends, or has failed.
        """
        self._check(len(wanted))
        group = Group([], asyncio.Queue())
        try:
            for arguments in wanted:
                handle = self.engine.submit(**arguments)
                self._groups[handle] = group, len(group.handles)
                group.handles.append(handle)
                self.taken += 1
        except ValueError:
            self.cancel(group)
            raise
        finally:
            self._wake.set()
        return group

    def cancel(self, group: Group) -> None:
        """End what has not ended of a group; its rows are free after a block."""
        for number in range(len(group.handles)):
            self.cancel_one(group, number)

    def cancel_one(self, group: Group, number: int) -> None:
        """End one request of a group if it has not ended."""
        if self.engine.cancel(group.handles[number]):
            self._wake.set()

    async def run(self, function: Callable[[], R]) -> R:
        """Return what a function returns, run between two steps of the engine.

        Raises:
          FullError: there is no place for it.
          StoppedError: the worker ends, or has failed.
        """
        self._check(1)
        job = _Job(function, concurrent.futures.Future())
        self.taken += 1
        try:
            self._jobs.append(job)
            self._wake.set()
            return await asyncio.wrap_future(job.future)
        finally:
            self.taken -= 1

    def _check(self, places: int) -> None:
        if self._stopping or self.failed:
            raise StoppedError
        if self.taken + places > self.most:
            raise FullError

    def _run(self) -> None:
        """Work until there is nothing to do and `stop` was called."""
        try:
            while True:
                self._wake.wait()
                self._wake.clear()
                while self._jobs or not self.engine.idle:
                    self._job()
                    events = self.engine.step()
                    if events:
                        self._call(self._deliver, events)
                if self._stopping:
                    return
        except Exception as error:
            # Its text may quote what was asked; the name says enough to begin with.
            name = type(error).__name__
            logging.getLogger(__name__).error(f"jaxkv: the engine failed: {name}")
            self._call(self._fail, None)

    def _job(self) -> None:
        if not self._jobs:
            return
        job = self._jobs.popleft()
        if job.future.set_running_or_notify_cancel():
            try:
                job.future.set_result(job.function())
            except Exception as error:
                job.future.set_exception(error)

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        """Call a function in the event loop, if that is still there."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # closed: nobody waits any more
            self._stopping = True

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            group, number = self._groups[event.handle]
            group.events.put_nowait((number, event))
            if event.result is not None:
                del self._groups[event.handle]
                self.taken -= 1

    def _fail(self, _: None) -> None:
        self.failed = True
        for group, _number in self._groups.values():
            group.events.put_nowait(None)
        self.taken -= len(self._groups)
        self._groups.clear()
        while self._jobs:
            self._jobs.popleft().future.set_exception(StoppedError())


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """A function to be run between two steps."""

    function: Callable[[], Any]
    future: concurrent.futures.Future[Any]
