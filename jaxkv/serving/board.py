"""The rows of an engine on their device, and what the host knows of their terms."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxkv.generation import Running
from jaxkv.language_model import LanguageModel
from jaxkv.options import Options
from jaxkv.runtime.seeds import row_keys
from jaxkv.sampling import Greedy
from jaxkv.serving import rows
from jaxkv.serving.requests import Request
from jaxkv.serving.rows import Report, Shape, Terms
from jaxkv.serving.samplers import RowSamplers
from jaxkv.speculation import pace
from jaxkv.text.planning import bucket
from jaxkv.text.pricing import Prices

_LONGEST_WAIT = 24  # plain steps that a block may have beyond its own, with drafts
_ALL = 2**30  # more steps than any output has


class Board:
    """Rows, and the programs that they take part in. Nothing here waits for a device.

    Attributes:
      shape: of the rows.
      rows: how many there are.
    """

    def __init__(
        self,
        lm: LanguageModel,
        shape: Shape,
        *,
        rows: int,
        block: int,
        most_stop_ids: int,
        penalties: bool,
    ):
        """Make free rows.

        Args:
          lm: the model.
          shape: of the rows.
          rows: how many.
          block: decode steps between two reports.
          most_stop_ids: of a request.
          penalties: whether requests may have penalties of repetition.
        """
        self._lm, self.shape, self.rows = lm, shape, rows
        self._block, self._most_stop_ids = block, most_stop_ids
        self._penalties = penalties
        self._most = min(_most_tokens(shape.options, block), shape.max_out)
        drafter = shape.options.speculate
        self._prices: np.ndarray | None = None
        if drafter is not None:
            assumed = pace.assumed_prices(drafter, shape.options.accept)
            self._prices = np.asarray(assumed)
        self.clear()

    def clear(self) -> None:
        """Make all rows free, whatever has become of them."""
        self._terms = rows.no_terms(
            self.rows, stops=self._most_stop_ids, penalties=self._penalties
        )
        self._placed: Terms | None = None
        self._state = rows.empty_jit(
            *(self._lm.network, self._lm.params, self._terms),
            row_keys(0, self.rows),
            shape=self.shape,
        )

    def free(self, row: int) -> None:
        """Make a row free; it takes no part in the coming blocks."""
        self._terms.limits[row], self._placed = 0, None

    def limit(self, row: int) -> int:
        """Return the longest output of a row; 0 if it is free."""
        return int(self._terms.limits[row])

    def parts(
        self, request: Request, most: int | None
    ) -> Iterator[tuple[Running, Report] | None]:
        """Read a prompt by itself, in parts, and choose its first token.

        A part is some of the layers, each of which sees all of the prompt. Questions
        about contexts, and prompts that the policy decodes from, have one.

        Args:
          request: whose prompt.
          most: tokens of a part, padding included, if all layers were in it; None
            reads all in one.

        Yields:
          None for each part but the last, and then the row and a report.
        """
        tokens = np.zeros((1, bucket(len(request.ids))), np.int32)
        tokens[0, : len(request.ids)] = request.ids
        lengths = np.array([len(request.ids)], np.int32)
        keys, terms = row_keys([request.seed], 1), self._terms_of(request)
        network, params = self._lm.network, self._lm.params
        if request.context is not None:
            # The program is the same whatever has chosen the tokens.
            context = dataclasses.replace(request.context, policy="")
            yield rows.read_questions_jit(
                *(network, params, context, np.array([request.document], np.int32)),
                *(tokens, lengths, keys, terms),
                shape=self.shape,
            )
            return
        keep: Any = None
        if request.budget is not None:
            keep = np.array([request.budget], np.int32)
        given = (network, params, tokens, lengths)
        part: rows.Part | None = None
        edges = self._edges(tokens.shape[1], most)
        for first, after in itertools.pairwise(edges[:-1]):
            carried, cache = part or (None, ())
            carried, states = rows.read_layers_jit(
                *(*given, keep, carried),
                shape=self.shape,
                first=first,
                count=after - first,
            )
            part = rows.Part(carried, cache + states)
            yield None
        yield rows.read_prompts_jit(
            *(*given, keys, terms, keep, part), shape=self.shape, first=edges[-2]
        )

    def _edges(self, tokens: int, most: int | None) -> list[int]:
        """Return the layers at which the parts of a prompt begin, and their number."""
        layers, options = len(self.shape.slots), self.shape.options
        whole = most is None or (options.budget and options.prefill.sketches)
        number = 1 if whole else min(-(-tokens // (most or 1)), layers)
        return [layers * part // number for part in range(number + 1)]

    def place(self, row: int, request: Request, new: Running) -> None:
        """Put a request that has been read into a row."""
        self._state = rows.insert_jit(self._state, new, np.array([row], np.int32))
        both = self._terms, self._terms_of(request)
        for all_rows, one in zip(*map(jax.tree.leaves, both), strict=True):
            all_rows[row] = one[0]
        self._placed = None

    def launch(self) -> Report:
        """Decode a block in all rows that are not free."""
        if self._placed is None:
            # A device may share memory with the host, where rows change.
            self._placed = jax.device_put(jax.tree.map(np.copy, self._terms))
        self._state, report = self._advance(
            self._state, self._placed, self._block, self._prices
        )
        return report

    def warm_up(self, longest: int, most: int | None) -> None:
        """Compile for prompts of all lengths, and measure what drafts take.

        All rows become free.

        Args:
          longest: tokens of the longest prompt.
          most: see `parts`.
        """
        length, state = 1, self._state
        while length <= longest:
            request = self._some_request(min(bucket(length), longest))
            *_, last = self.parts(request, most)
            assert last is not None
            new, _ = last
            for row in range(self.rows):
                state = rows.insert_jit(state, new, np.array([row], np.int32))
            length = bucket(length) + 1
        limits = np.full(self.rows, self.shape.max_out, np.int32)
        terms = dataclasses.replace(self._terms, limits=limits)
        drafter, prices = self.shape.options.speculate, self._prices
        if drafter is not None and drafter.break_even == "auto":
            found = Prices(len(np.asarray(prices)))

            def run(state: Running, until: int, prices: np.ndarray) -> Running:
                limits = np.full(self.rows, until, np.int32)
                placed = dataclasses.replace(terms, limits=limits)
                return self._advance(state, placed, _ALL, prices)[0]

            state = found.measure(run, state, self.shape.max_out)
            self._prices = found.array() if found.known else prices
        state, _ = self._advance(state, terms, 1, self._prices)
        jax.block_until_ready(state)
        self.clear()

    def _some_request(self, length: int) -> Request:
        """Return a prompt of this length that says nothing."""
        options = self.shape.options
        budget = None if options.decode.evicts else options.budget
        return Request(
            ids=np.arange(length, dtype=np.int32) % self._lm.config.vocab_size,
            sampler=Greedy(),
            stop_ids=(),
            max_new_tokens=1,
            seed=0,
            budget=budget,
        )

    def _advance(
        self, state: Running, terms: Terms, steps: int, prices: Any
    ) -> tuple[Running, Report]:
        return rows.advance_jit(
            *(self._lm.network, self._lm.params, state, terms, np.int32(steps)),
            prices,
            shape=self.shape,
            most=self._most,
        )

    def _terms_of(self, request: Request) -> Terms:
        stops = np.full((1, self._most_stop_ids), -1, np.int32)
        stops[0, : len(request.stop_ids)] = request.stop_ids
        return Terms(
            limits=np.array([request.max_new_tokens], np.int32),
            stops=stops,
            samplers=RowSamplers.of([request.sampler], penalties=self._penalties),
        )


def _most_tokens(options: Options, block: int) -> int:
    """Return the most tokens that a row gets in a block."""
    drafter = options.speculate
    return block if drafter is None else block * (1 + drafter.depth) + _LONGEST_WAIT
