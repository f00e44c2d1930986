"""`jaxkv.Engine`: requests come and go; the rows that serve them stay what they are.

    step:  end what was cancelled
           wait for what was launched first   its tokens, and who has ended
           free the rows of those
           read waiting prompts into free rows, first come first served
           launch a block
           hand out tokens and results

A block is launched before the one ahead of it has ended (`Board.ahead`), so that the
device does not wait for the host. What is done between two steps is done meanwhile. A
row that ends by a stop id does nothing in the block that was launched already.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxkv import soundness
from jaxkv.contexts.context import Context
from jaxkv.kernels import decode as decode_kernels
from jaxkv.kernels import prefill as prefill_kernels
from jaxkv.kernels import window_scores
from jaxkv.language_model import LanguageModel, check_model
from jaxkv.policies.base import DecodePolicy, PrefillPolicy
from jaxkv.sampling import Categorical, Greedy
from jaxkv.serving import checks, requests
from jaxkv.serving.board import Board
from jaxkv.serving.flights import Flights, Lists
from jaxkv.serving.meter import Counts, Meter
from jaxkv.serving.places import Places
from jaxkv.serving.queue import Queue
from jaxkv.serving.reader import Reader
from jaxkv.serving.requests import Event, Handle, Reason, Result
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
        together: int = 4,
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
          together: prompts of one padded length that are read in one go, where so many
            wait and have rows; of not more than `stall` and 2,048 tokens in all.
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
        check_model("Engine", lm)
        options = arguments.static_options(
            "Engine",
            prefill=prefill,
            decode=decode,
            speculate=speculate,
            accept=accept,
            prefill_implementation=prefill_implementation,
            decode_implementation=decode_implementation,
            scores_implementation=scores_implementation,
            top_logprobs=checks.alternatives(lm, top_logprobs),
        )
        self.lm, self.rows, self._stall = lm, rows, stall
        self._limits = checks.Limits(
            max_prompt=max_prompt,
            max_new_tokens=max_new_tokens,
            budget=budget,
            most_stop_ids=most_stop_ids,
            repetition_penalties=repetition_penalties,
        )
        numbers: dict[str, Any] = dict(
            rows=rows, block=block, stall=stall, together=together
        )
        self._board = Board(
            lm,
            checks.shape(lm, options, self._limits, **numbers),
            **numbers,
            most_stop_ids=most_stop_ids,
            penalties=repetition_penalties,
        )
        self._queue, self._places = Queue(), Places(self._board)
        self._reader = Reader(self._queue, self._board, stall)
        self._flights = Flights(Meter())

    def warm_up(
        self, *, prompts: Iterable[int] | None = None, draws: bool = True
    ) -> None:
        """Compile what requests without contexts need, and measure what drafts take.

        Args:
          prompts: their lengths, in tokens; None is all up to `max_prompt`.
          draws: whether requests will draw; GPUs have programs for that.

        Raises:
          ValueError: there are requests, or prompts of such lengths cannot be.
        """
        lengths = checks.lengths(prompts, self._limits, draws=draws, idle=self.idle)
        with jax.transfer_guard("allow"):
            self._board.warm_up(lengths, draws=draws)

    @property
    def waiting(self) -> int:
        """Return how many requests wait for a row."""
        return self._queue.waiting

    @property
    def running(self) -> int:
        """Return how many requests have a row."""
        return len(self._places.live())

    @property
    def counts(self) -> Counts:
        """Return what has been done so far."""
        return self._flights.meter.counts

    @property
    def idle(self) -> bool:
        """Return whether there is nothing to be done."""
        return not (len(self._flights) or self._wanted())

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
            *(self.lm, self._board.shape, self._limits, prompt),
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
        """End a request; its row is free at the next step, and no token comes there.

        Returns:
          Whether it had not ended yet.

        Raises:
          ValueError: it is no request of this engine.
        """
        return self._queue.cancel(handle)

    def step(self) -> list[Event]:
        """Do what there is to be done next, and return what has become of requests.

        What a device fails at ends the requests that it was done for, as "error". New
        tokens and ends are told of once. With nothing to do the list is empty.
        """
        # Prompts and tokens are the host's: these transfers are meant.
        with jax.transfer_guard("allow"):
            events = self._release()
            more = self._flights.blocks and not self._full() and self._wanted()
            if len(self._flights) and not more:
                events += self._collect()
            if not self._full():
                events += self._admit() + self._launch()
            return events

    def run(self) -> Iterator[Event]:
        """Yield what becomes of requests until there are none."""
        while not self.idle:
            yield from self.step()

    def stream(self, handle: Handle) -> Iterator[tuple[int, ...]]:
        """Yield a request's new tokens until it ends; all others go on meanwhile."""
        self._queue.check(handle)
        return requests.streamed(handle, self._go_on)

    def wait(self, handle: Handle) -> Result:
        """Return how a request ends, after as many steps as it takes."""
        self._queue.check(handle)
        while handle.result is None:
            self._go_on(handle)
        return handle.result

    def _go_on(self, handle: Handle) -> None:
        requests.check_awaited(handle, idle=self.idle)
        self.step()

    def _wanted(self) -> bool:
        """Return whether there is something to be launched, or told of."""
        return bool(len(self._queue) or self._reader.current or self.running)

    def _full(self) -> bool:
        """Return whether as many blocks were launched as may be."""
        return self._flights.blocks > (1 if self._board.ahead else 0)

    def _collect(self) -> list[Event]:
        try:
            return self._landed()
        except Exception as error:
            return self._lose(error)

    def _landed(self) -> list[Event]:
        """Wait for what was launched first, and note what it has brought."""
        flight, report, late = self._flights.land()
        rows = [(at, handle) for at, handle in flight.rows if handle.result is None]
        events = [self._noted(handle, at, report) for at, handle in rows]
        if flight.block:
            new = [len(event.tokens) for event in events]
            self._flights.meter.block(new, self._board.steps, late=late)
        return events

    def _noted(self, handle: Handle, at: int, report: Lists) -> Event:
        """Note what a report says at one of its places, and if the request ended."""
        length, had = report.lengths[at], requests.count(handle)
        noted = report.logprobs and jax.tree.map(lambda x: x[at], report.logprobs)
        event = requests.told(handle, report.tokens[at][: length - had], noted)
        if not report.finite[at]:
            said = f"the logits are NaN or infinite; {self._cause}"
            return self._end(event, "error", said)
        if report.done[at]:
            return self._end(event, "stop", None)
        if length >= handle.request.max_new_tokens:
            return self._end(event, "length", None)
        return event

    @functools.cached_property
    def _cause(self) -> str:
        return soundness.cause(self.lm.params)  # reads all weights

    def _end(
        self,
        event: Event,
        reason: Reason,
        error: str | None,
        *,
        may_retry: bool = False,
    ) -> Event:
        """End a request, and free its row if it has one."""
        self._places.leave(event.handle)
        with self._queue.lock:
            self._queue.forget(event.handle)
            tokenizer = self.lm.tokenizer
            return requests.ended(event, reason, tokenizer, error, may_retry=may_retry)

    def _release(self) -> list[Event]:
        """End what has been cancelled."""
        dropped, cancelled = self._queue.unwanted()
        if self._reader.current in cancelled:
            self._reader.current = None
        return [
            self._end(requests.told(handle, [], None), "cancelled", None)
            for handle in dropped + cancelled
        ]

    def _admit(self) -> list[Event]:
        """Read waiting prompts into free rows, as many as the others can wait for."""
        failed: list[Event] = []
        tokens, busy = 0, self.running > 0
        free = self._places.free()
        while free:
            part = self._reader.read(spent=tokens, busy=busy, rows=len(free))
            if part is None:
                break
            self._flights.meter.launches()
            handles, tokens = part.handles, tokens + part.tokens
            if part.error is not None:
                failed += [self._failed(handle, part.error) for handle in handles]
                continue
            if part.found is None:
                break  # the rest of it after the next block
            new, report = part.found
            at, free = free[: len(handles)], free[len(handles) :]
            try:
                self._board.place(at, [handle.request for handle in handles], new)
            except Exception as error:
                failed += [self._failed(handle, error) for handle in handles]
                return failed + self._lose(error)
            self._flights.add(report, list(enumerate(handles)), block=False)
            self._places.give(at, handles)
        return failed

    def _launch(self) -> list[Event]:
        """Let the device decode a block, and do not wait for it."""
        if not (live := self._places.live()):
            if not len(self._flights):
                self._flights.meter.rests()
            return []
        self._flights.meter.launches()
        try:
            report = self._board.launch()
        except Exception as error:
            return self._lose(error)
        self._flights.add(report, live, block=True)
        self._places.launched()
        return []

    def _failed(self, handle: Handle, error: Exception) -> Event:
        said = f"{type(error).__name__}: {error}"
        event = requests.told(handle, [], None)
        return self._end(event, "error", said, may_retry=True)

    def _lose(self, error: Exception) -> list[Event]:
        """End all requests whose tokens are not there, and make the rows anew."""
        owners = self._flights.owners() + [h for _, h in self._places.live()]
        events: list[Event] = []
        try:
            while len(self._flights):
                events += self._landed()
        except Exception:
            self._flights.clear()  # what comes behind was made of it
        left = [h for h in dict.fromkeys(owners) if h.result is None]
        events += [self._failed(handle, error) for handle in left]
        self._board.clear()
        return events
