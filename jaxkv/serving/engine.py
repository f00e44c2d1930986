"""`jaxkv.Engine`: requests come and go; the rows that serve them stay what they are.

    step:  wait for the block in flight       its tokens, and who has ended
           free the rows of those, and of what was cancelled
           read waiting prompts into free rows, first come first served
           launch a block                     the device is busy from here on
           hand out tokens and results

What is done between two steps is done while a block runs.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxkv import soundness
from jaxkv.contexts.context import Context
from jaxkv.kernels import decode as decode_kernels
from jaxkv.kernels import prefill as prefill_kernels
from jaxkv.kernels import window_scores
from jaxkv.language_model import LanguageModel
from jaxkv.policies.base import DecodePolicy, PrefillPolicy
from jaxkv.sampling import Categorical, Greedy
from jaxkv.serving import checks, requests
from jaxkv.serving.board import Board
from jaxkv.serving.meter import Counts, Meter
from jaxkv.serving.queue import Queue
from jaxkv.serving.reader import Reader
from jaxkv.serving.requests import Event, Handle, Reason, Result
from jaxkv.serving.rows import Report
from jaxkv.speculation.drafters import Drafter
from jaxkv.speculation.rules import Rule
from jaxkv.text import arguments


class Engine:
    """Generates for any number of requests on a fixed number of rows.

    Each request gets the tokens that `jaxkv.generate` gives it alone, whatever comes
    beside it and in what order (float32). A row that has ended is refilled at the next
    step. `submit`, `cancel` and what is read of handles may be called from any thread;
    `step`, `run` and `stream` from one at a time.

    Attributes:
      lm: the model.
      rows: how many there are.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        rows: int = 8,
        max_prompt: int = 1024,
        max_new_tokens: int = 256,
        budget: int | None = None,
        prefill: PrefillPolicy | None = None,
        decode: DecodePolicy | None = None,
        speculate: Drafter | None = None,
        accept: Rule | None = None,
        block: int = 16,
        stall: int | None = 2048,
        most_stop_ids: int = 8,
        repetition_penalties: bool = False,
        top_logprobs: int | None = None,
        prefill_implementation: prefill_kernels.Implementation | None = None,
        decode_implementation: decode_kernels.Implementation | None = None,
        scores_implementation: window_scores.Implementation | None = None,
    ):
        """Make the rows, all of them free. Nothing is compiled yet; see `warm_up`.

        Args:
          lm: from `jaxkv.load`.
          rows: requests that are decoded together.
          max_prompt: the longest prompt, in tokens; with a context, document and
            question together.
          max_new_tokens: the longest output.
          budget: as in `jaxkv.generate`, the most of any request.
          prefill: see `jaxkv.generate`.
          decode: see `jaxkv.generate`.
          speculate: see `jaxkv.generate`.
          accept: see `jaxkv.generate`.
          block: decode steps between two looks at who has ended.
          stall: prompt tokens, padding included, that are read between two blocks while
            rows run: how long these may have to wait. Of a longer prompt some layers
            are read at a time, at least one. None fills all free rows.
          most_stop_ids: that a request may have.
          repetition_penalties: whether requests may have them; costs a byte per row and
            entry of the vocabulary.
          top_logprobs: how many alternatives to each token have their
            log-probabilities noted, beside its own; None notes none.
          prefill_implementation: see `jaxkv.kernels.prefill`.
          decode_implementation: see `jaxkv.kernels.decode`.
          scores_implementation: see `jaxkv.kernels.window_scores`.

        Raises:
          ValueError: options of wrong types, or at odds with each other.
        """
        options = arguments.static_options(
            prefill=prefill,
            decode=decode,
            speculate=speculate,
            accept=accept,
            prefill_implementation=prefill_implementation,
            decode_implementation=decode_implementation,
            scores_implementation=scores_implementation,
            top_logprobs=None
            if top_logprobs is None
            else arguments.alternatives(lm, True, top_logprobs),
        )
        self.lm, self.rows, self._stall = lm, rows, stall
        self._limits = checks.Limits(
            max_prompt=max_prompt,
            max_new_tokens=max_new_tokens,
            budget=budget,
            most_stop_ids=most_stop_ids,
            repetition_penalties=repetition_penalties,
        )
        numbers = dict(rows=rows, block=block, stall=stall)
        self._meter = Meter()
        self._board = Board(
            lm,
            checks.shape(lm, options, self._limits, **numbers),
            rows=rows,
            block=block,
            most_stop_ids=most_stop_ids,
            penalties=repetition_penalties,
        )
        self._queue = Queue()
        self._reader = Reader(self._queue, self._board, stall)
        self._handles: list[Handle | None] = [None] * rows
        self._flight: Report | None = None

    def warm_up(self) -> None:
        """Compile all that requests without contexts need, while there are none.

        Where drafts are on, what steps with them take is measured, too.

        Raises:
          ValueError: there are requests.
        """
        if not self.idle:
            raise ValueError("Engine.warm_up: there are requests; call it before them.")
        with jax.transfer_guard("allow"):
            self._board.warm_up(self._limits.max_prompt, self._stall)

    @property
    def waiting(self) -> int:
        """Return how many requests wait for a row."""
        return self._queue.waiting

    @property
    def running(self) -> int:
        """Return how many requests have a row."""
        return len(self._live())

    @property
    def counts(self) -> Counts:
        """Return what has been done so far."""
        return self._meter.counts

    @property
    def idle(self) -> bool:
        """Return whether there is nothing to be done."""
        return not (len(self._queue) or self._reader.current or self.running)

    def submit(
        self,
        prompt: str | Sequence[int] | np.ndarray,
        *,
        sampler: Greedy | Categorical | None = None,
        stop_ids: Sequence[int] | None = None,
        max_new_tokens: int | None = None,
        seed: int = 0,
        budget: int | None = None,
        context: Context | None = None,
        document: int = 0,
    ) -> Handle:
        """Ask for a continuation; it waits for a free row, first come first served.

        Args:
          prompt: a text, or token ids.
          sampler: how tokens are chosen; None is `Greedy()`.
          stop_ids: token ids that end the output; None takes the checkpoint's.
          max_new_tokens: the longest output; None is the engine's.
          seed: of its draws, as in `jaxkv.generate`.
          budget: tokens of the prompt that may be kept, at most the engine's; None is
            all of those. Only where the decode policy does not evict.
          context: from `jaxkv.compress`: the prompt is a question about a document of
            it. Contexts of new sizes compile.
          document: which one.

        Returns:
          What tokens and result can be read of.

        Raises:
          ValueError: a bad prompt or options, or more than a row holds.
        """
        request = checks.request(
            self.lm,
            self._board.shape,
            self._limits,
            prompt,
            sampler=Greedy() if sampler is None else sampler,
            stop_ids=stop_ids,
            max_new_tokens=max_new_tokens,
            seed=seed,
            budget=budget,
            context=context,
            document=document,
        )
        return self._queue.put(request, checks.prompt_tokens(request))

    def cancel(self, handle: Handle) -> bool:
        """End a request; its row is free at the next step.

        Returns:
          Whether it had not ended yet.
        """
        return self._queue.cancel(handle)

    def step(self) -> list[Event]:
        """Do what there is to be done next, and return what has become of requests.

        What a device fails at ends the requests that it was done for, as "error".

        Returns:
          New tokens and ends, each once. With nothing to do the list is empty.
        """
        # Prompts and tokens are the host's: these transfers are meant.
        with jax.transfer_guard("allow"):
            events = self._collect() + self._release()
            read, failed = self._admit()
            failed += self._launch()
            return events + failed + self._first_tokens(read)

    def run(self) -> Iterator[Event]:
        """Yield what becomes of requests until there are none."""
        while not self.idle:
            yield from self.step()

    def stream(self, handle: Handle) -> Iterator[tuple[int, ...]]:
        """Yield a request's new tokens until it ends; all others go on meanwhile."""
        shown = 0
        while True:
            ended, tokens = handle.result is not None, handle.tokens
            if len(tokens) > shown:
                yield tokens[shown:]
                shown = len(tokens)
            if ended:
                return
            self.step()

    def wait(self, handle: Handle) -> Result:
        """Return how a request ends, after as many steps as it takes."""
        while handle.result is None:
            self.step()
        return handle.result

    def _collect(self) -> list[Event]:
        """Wait for the block in flight, and note what it has brought."""
        if self._flight is None:
            return []
        self._meter.asked(self._flight)
        try:
            report: Report = jax.device_get(self._flight)
        except Exception as error:
            return self._lose(error)
        self._flight = None
        events = [self._noted(row, h, row, report) for row, h in self._live()]
        self._meter.came([len(event.tokens) for event in events])
        return events

    def _live(self) -> list[tuple[int, Handle]]:
        """Return the rows that are not free, and whose they are."""
        return [(row, h) for row, h in enumerate(self._handles) if h is not None]

    def _noted(self, row: int, handle: Handle, at: int, report: Report) -> Event:
        """Note what a report says of a row at one of its places, and if it ended."""
        length = int(report.lengths[at])
        new = report.tokens[at, : length - len(handle.tokens)].tolist()
        noted = report.logprobs and jax.tree.map(lambda x: x[at], report.logprobs)
        event = requests.told(handle, new, noted)
        if not report.finite[at]:
            said = f"the logits are NaN or infinite; {self._cause}"
            return self._end(event, "error", said, row)
        if report.done[at]:
            return self._end(event, "stop", None, row)
        if length >= self._board.limit(row):
            return self._end(event, "length", None, row)
        return event

    @functools.cached_property
    def _cause(self) -> str:
        return soundness.cause(self.lm.params)  # reads all weights

    def _end(
        self,
        event: Event,
        reason: Reason,
        error: str | None,
        row: int | None,
        *,
        may_retry: bool = False,
    ) -> Event:
        """End a request, and free its row if it has one."""
        if row is not None:
            self._handles[row] = None
            self._board.free(row)
        with self._queue.lock:
            self._queue.forget(event.handle)
            return requests.ended(
                event, reason, self.lm.tokenizer, error, may_retry=may_retry
            )

    def _release(self) -> list[Event]:
        """End what has been cancelled."""
        dropped, cancelled = self._queue.unwanted()
        at = {handle: row for row, handle in self._live()}
        ends: list[tuple[Handle, int | None]] = [(handle, None) for handle in dropped]
        ends += [(handle, at[handle]) for handle in cancelled if handle in at]
        if self._reader.current in cancelled:
            ends.append((self._reader.current, None))
            self._reader.current = None
        return [
            self._end(requests.told(handle, [], None), "cancelled", None, row)
            for handle, row in ends
        ]

    def _admit(self) -> tuple[list[tuple[int, Handle, Any]], list[Event]]:
        """Read waiting prompts into free rows, as many as the others can wait for.

        Returns:
          Row, handle and first token of each, and the ends of those that failed.
        """
        read: list[tuple[int, Handle, Any]] = []
        failed: list[Event] = []
        tokens, busy = 0, self.running > 0
        for row in (r for r, handle in enumerate(self._handles) if handle is None):
            part = self._reader.read(spent=tokens, busy=busy)
            if part is None:
                break
            handle, tokens = part.handle, tokens + part.tokens
            if part.error is not None:
                failed.append(self._failed(handle, part.error, None))
                continue
            if part.found is None:
                break  # the rest of it after the next block
            new, first = part.found
            self._meter.busy()
            self._handles[row] = handle
            try:
                self._board.place(row, handle.request, new)
            except Exception as error:
                failed += self._lose(error)
                break
            read.append((row, handle, first))
        return read, failed

    def _launch(self) -> list[Event]:
        """Let the device decode a block, and do not wait for it."""
        if not self.running:
            self._meter.rests()
            return []
        try:
            self._flight = self._board.launch()
        except Exception as error:
            return self._lose(error)
        self._meter.launched(self.running)
        return []

    def _first_tokens(self, read: Sequence[tuple[int, Handle, Any]]) -> list[Event]:
        """Wait for the first tokens of what has been read; the block goes on."""
        events: list[Event] = []
        for row, handle, first in read:
            if self._handles[row] is not handle:
                continue  # lost
            try:
                report = jax.device_get(first)
            except Exception as error:
                return events + self._lose(error)
            events.append(self._noted(row, handle, 0, report))
        return events

    def _failed(self, handle: Handle, error: Exception, row: int | None) -> Event:
        said = f"{type(error).__name__}: {error}"
        event = requests.told(handle, [], None)
        return self._end(event, "error", said, row, may_retry=True)

    def _lose(self, error: Exception) -> list[Event]:
        """End all requests that have a row, and make the rows anew."""
        events = [self._failed(handle, error, row) for row, handle in self._live()]
        self._flight = None
        self._board.clear()
        return events
