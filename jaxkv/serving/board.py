"""The rows of an engine on their device, and what the host knows of their terms."""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args

import jax
import numpy as np

from jaxkv.generation import Running
from jaxkv.language_model import LanguageModel
from jaxkv.options import Options
from jaxkv.runtime.host_waits import asks_the_device
from jaxkv.runtime.meshes import under_mesh_of
from jaxkv.runtime.seeds import row_keys
from jaxkv.sampling import Greedy
from jaxkv.serving import rows
from jaxkv.serving.requests import Request
from jaxkv.serving.rows import Report, Shape, Terms
from jaxkv.serving.samplers import Kind, RowSamplers
from jaxkv.speculation import pace
from jaxkv.text.planning import bucket
from jaxkv.text.pricing import Prices

_LONGEST_WAIT = 24  # plain steps that a block may have beyond its own, with drafts
_ALL = 2**30  # more steps than any output has
_FILLS = 2048  # prompt tokens that keep a device busy: more are not read together


class Board:
    """Rows, and the programs that they take part in. Nothing here waits for a device.

    A GPU's host waits while it hands over what asks the device (`runtime.host_waits`).
    So blocks have a number of steps there, and a program for each kind of samplers.

    Attributes:
      shape: of the rows.
      rows: how many there are.
      sure: tokens that a row that runs gets in a block, if it does not end.
    """

    def __init__(
        self,
        lm: LanguageModel,
        shape: Shape,
        *,
        rows: int,
        block: int,
        stall: int | None,
        together: int,
        most_stop_ids: int,
        penalties: bool,
        on_gpu: bool | None = None,
    ):
        """Make free rows.

        Args:
          lm: the model.
          shape: of the rows.
          rows: how many.
          block: decode steps between two reports.
          stall: tokens of a part of a prompt, padding included, if all layers were in
            it; None reads all in one.
          together: see `Engine`.
          most_stop_ids: of a request.
          penalties: whether requests may have penalties of repetition.
          on_gpu: whether to do as on a GPU; None is where there is one.
        """
        self._lm, self.shape, self.rows = lm, shape, rows
        self._block, self._most_stop_ids = block, most_stop_ids
        self._stall, self._together = stall, together
        self._penalties = penalties
        self._most = min(_most_tokens(shape.options, block), shape.max_out)
        drafter = shape.options.speculate
        if on_gpu is None:
            on_gpu = jax.default_backend() == "gpu"
        self.sure = block if drafter is None else 0
        # No output is longer than that: what is beyond brings nothing.
        few = min(block, shape.max_out)
        self._fixed = few if drafter is None and on_gpu else None
        self._steps = jax.device_put(np.int32(block)) if self._fixed is None else None
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
        self._state: Any = None  # no room for two of them is needed
        self._state = rows.empty_jit(
            *(self._lm.network, self._lm.params, self._terms),
            row_keys(0, self.rows),
            shape=self.shape,
        )

    @functools.cached_property
    def ahead(self) -> bool:
        """Return whether to launch a block before the report of the last one is read.

        Not with drafts: a row that ends is found out one block later, and theirs have
        many tokens. Nor where the host would wait while it launches.
        """
        if self.shape.options.speculate is not None:
            return False
        if self._fixed is None:
            return True

        def block(params: Any, state: Running, terms: Terms) -> Any:
            given = self._lm.network, params, state, terms, None, None
            return rows.advance(*given, **self._block_options)

        given = self._lm.params, self._state, self._of_kind(self._terms)
        with under_mesh_of(self._lm.params):
            return not asks_the_device(block, *given)

    @property
    def steps(self) -> int | None:
        """Return how many steps a block has; None where that is for its rows to say."""
        return self._fixed

    def together(self, size: int) -> int:
        """Return how many prompts of a padded length are read in one go."""
        number = min(self._together, self.rows)
        return number if number * size <= min(self._stall or _FILLS, _FILLS) else 1

    def free(self, row: int) -> None:
        """Make a row free; it takes no part in the coming blocks."""
        self._terms.limits[row], self._placed = 0, None
        self._terms.samplers.temperature[row] = 0  # nor does a block draw for it

    def parts(
        self, asked: Sequence[Request]
    ) -> Iterator[tuple[Running, Report] | None]:
        """Read prompts by themselves, in parts, and choose their first tokens.

        A part is some of the layers, each of which sees all of the prompt. Questions
        about contexts, and prompts that the policy decodes from, have one.

        Args:
          asked: whose prompts, `A` of them; a question is alone.

        Yields:
          None for each part but the last, and then the rows and a report.
        """
        given, keys, terms, keep = self._arguments(asked)
        (request, *_) = asked
        if request.context is not None:
            # The program is the same whatever has chosen the tokens.
            context = dataclasses.replace(request.context, policy="")
            network, params, *questions = given
            yield rows.read_questions_jit(
                *(network, params, context, np.array([request.document], np.int32)),
                *(*questions, keys, terms),
                shape=self.shape,
            )
            return
        part: rows.Part | None = None
        edges = self._edges(given[2].shape)
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

    def _arguments(
        self, asked: Sequence[Request]
    ) -> tuple[tuple[Any, ...], jax.Array, Terms, Any]:
        """Return what `read_layers` takes, and keys, terms, and what may be kept."""
        lengths = np.array([len(request.ids) for request in asked], np.int32)
        tokens = np.zeros((len(asked), bucket(int(lengths.max()))), np.int32)
        for row, request in zip(tokens, asked, strict=True):
            row[: len(request.ids)] = request.ids
        budgets = [request.budget for request in asked if request.budget is not None]
        keep = np.array(budgets, np.int32) if budgets else None
        keys = row_keys([request.seed for request in asked], len(asked))
        given = (self._lm.network, self._lm.params, tokens, lengths)
        return given, keys, self._terms_of(asked), keep

    def _edges(self, shape: tuple[int, int]) -> list[int]:
        """Return the layers at which the parts of prompts begin, and their number."""
        number, options = 1, self.shape.options
        layers, sketches = len(self.shape.slots), options.prefill.sketches
        if self._stall is not None and not (options.budget and sketches):
            number = min(-(-shape[0] * shape[1] // self._stall), layers)
        return [layers * part // number for part in range(number + 1)]

    def place(self, at: Sequence[int], asked: Sequence[Request], new: Running) -> None:
        """Put requests that have been read into rows."""
        places = np.array(at, np.int32)
        self._state = rows.insert_jit(self._state, new, places)
        both = self._terms, self._terms_of(asked)
        for all_rows, some in zip(*map(jax.tree.leaves, both), strict=True):
            all_rows[places] = some
        self._placed = None

    def launch(self) -> Report:
        """Decode a block in all rows that are not free."""
        if self._placed is None:
            # A device may share memory with the host, where rows change.
            terms = self._of_kind(jax.tree.map(np.copy, self._terms))
            self._placed = jax.device_put(terms)
        self._state, report = self._advance(
            self._state, self._placed, self._steps, self._prices
        )
        return report

    def warm_up(self, lengths: Iterable[int], *, draws: bool) -> None:
        """Compile for prompts, and measure what drafts take; all rows become free.

        Args:
          lengths: of the prompts.
          draws: whether rows will draw.
        """
        limits = np.full(self.rows, self.shape.max_out, np.int32)
        terms = dataclasses.replace(self._terms, limits=limits)
        groups = list(self._groups(lengths))
        blocks = self._of_all_kinds(terms) if draws else [self._of_kind(terms)]
        self._compile(groups, blocks)
        try:
            self._try_out(groups, blocks, terms)
        finally:
            self.clear()  # programs take the state with them, also if broken off
        assert self.ahead in (True, False)  # found out now, not at the first request

    def _try_out(
        self, groups: Sequence[Sequence[Request]], blocks: Sequence[Terms], terms: Terms
    ) -> None:
        """Run what was compiled, and compile what takes what others return."""
        state = self._state
        for asked in groups:
            *_, last = self.parts(asked)
            assert last is not None
            new, _ = last
            for row in range(0, self.rows - len(asked) + 1, len(asked)):
                at = np.arange(row, row + len(asked), dtype=np.int32)
                state = rows.insert_jit(state, new, at)
        drafter, prices = self.shape.options.speculate, self._prices
        if drafter is not None and drafter.break_even == "auto":
            found = Prices(len(np.asarray(prices)))

            def run(state: Running, until: int, prices: np.ndarray) -> Running:
                limits = np.full(self.rows, until, np.int32)
                placed = dataclasses.replace(terms, limits=limits)
                return self._advance(state, placed, np.int32(_ALL), prices)[0]

            state = found.measure(run, state, self.shape.max_out)
            self._prices = found.array() if found.known else prices
        for placed in blocks:
            state, _ = self._advance(state, placed, self._steps, self._prices)
        jax.block_until_ready(state)

    def _groups(self, lengths: Iterable[int]) -> Iterator[list[Request]]:
        """Yield requests of all shapes in which prompts of these lengths are read."""
        longest = {bucket(length): length for length in sorted(lengths)}
        for size, length in longest.items():
            for number in sorted({1, self.together(size)}):
                yield [self._some_request(length)] * number

    def _compile(
        self, groups: Sequence[Sequence[Request]], blocks: Sequence[Terms]
    ) -> None:
        """Compile what stands by itself, side by side."""
        # While JAX traces, no other thread does; XLA's part is the longer one.
        how: dict[str, Any] = dict(shape=self.shape)
        wanted: list[Callable[[], Any]] = []
        for placed in blocks:
            given = self._state, placed, self._steps, self._prices
            model = self._lm.network, self._lm.params
            compile_it = rows.advance_jit.compile
            wanted.append(
                functools.partial(compile_it, *model, *given, **self._block_options)
            )
        for asked in groups:
            prompts, keys, own, keep = self._arguments(asked)
            if len(self._edges(prompts[2].shape)) == 2:  # in one part
                given = *prompts, keys, own, keep, None
                compile_it = rows.read_prompts_jit.compile
                wanted.append(functools.partial(compile_it, *given, **how, first=0))
        with concurrent.futures.ThreadPoolExecutor(_threads()) as pool:
            for future in [pool.submit(one) for one in wanted]:
                future.result()

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
        self, state: Running, terms: Terms, steps: Any, prices: Any
    ) -> tuple[Running, Report]:
        return rows.advance_jit(
            *(self._lm.network, self._lm.params, state, terms, steps, prices),
            **self._block_options,
        )

    @property
    def _block_options(self) -> dict[str, Any]:
        return dict(shape=self.shape, most=self._most, fixed=self._fixed)

    def _of_kind(self, terms: Terms, kind: Kind | None = None) -> Terms:
        """Return terms for the program of this kind, or of the one that they need."""
        if self._fixed is None:
            return terms
        samplers = terms.samplers
        samplers = dataclasses.replace(samplers, kind=kind or samplers.needed())
        return dataclasses.replace(terms, samplers=samplers)

    def _of_all_kinds(self, terms: Terms) -> list[Terms]:
        if self._fixed is None:
            return [terms]
        return [self._of_kind(terms, kind) for kind in get_args(Kind)]

    def _terms_of(self, asked: Sequence[Request]) -> Terms:
        stops = np.full((len(asked), self._most_stop_ids), -1, np.int32)
        for row, request in zip(stops, asked, strict=True):
            row[: len(request.stop_ids)] = request.stop_ids
        samplers = [request.sampler for request in asked]
        terms = Terms(
            limits=np.array([request.max_new_tokens for request in asked], np.int32),
            stops=stops,
            samplers=RowSamplers.of(samplers, penalties=self._penalties),
        )
        return self._of_kind(terms, "cut")  # once a prompt, what sorts costs nothing


def _most_tokens(options: Options, block: int) -> int:
    """Return the most tokens that a row gets in a block."""
    drafter = options.speculate
    return block if drafter is None else block * (1 + drafter.depth) + _LONGEST_WAIT


def _threads() -> int:
    return min(16, os.cpu_count() or 1)
