"""What a step with drafts takes, measured: in the first generation of a program.

A few of its steps are timed, with trees of each width and without. They are steps of
that generation like all others, so that nothing is computed twice and no memory is
taken. The prices stand by what the program was compiled for, and serve all later calls
of this process. An output that ends before all is timed leaves the rest to the next.

Axis letters: `B` batch, `L` widths, `E` stop ids.
"""

import collections
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Hashable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import generation
from jaxkv.generation import Running
from jaxkv.language_model import LanguageModel
from jaxkv.options import Options
from jaxkv.speculation import pace
from jaxkv.speculation.loop import Speculation

# Decodes until each row has so many tokens, at these prices, float32 `[L]`.
Advance = Callable[[Running, int, np.ndarray], Running]

_REPEATS = 3  # timed calls of each kind of step, of which the fastest counts
_SECONDS = 0.01  # that a timed call should take at least
_IDLES = 4  # and how many times as long as one in which no step is taken
_MOST_STEPS = 64  # but no more steps
_FOREVER = 2**30


class Prices:
    """What the steps of one program took.

    Attributes:
      widths: how many there are, `L`.
      timed: seconds of a step in each timed call: of a plain one, of one with each
        width, and again in turn.
    """

    def __init__(self, widths: int, *, clock: Callable[[], float] = time.perf_counter):
        self.widths, self._clock = widths, clock
        self.timed: list[float] = []

    @property
    def known(self) -> bool:
        """Whether all is timed."""
        return len(self.timed) >= _REPEATS * (1 + self.widths)

    def array(self) -> np.ndarray:
        """Return the prices in plain steps, float32 `[L]`; infinite if not known."""
        kinds = 1 + self.widths
        steps = [min(self.timed[k::kinds], default=math.inf) for k in range(kinds)]
        found = [max(step / steps[0], 1) for step in steps[1:]]
        return np.array(found if self.known else [math.inf] * self.widths, np.float32)

    def measure(self, advance: Advance, state: Running, most: int) -> Running:
        """Time steps until all is known or the output ends.

        Args:
          advance: decodes.
          state: of the generation; its buffers are taken.
          most: tokens of the longest output.

        Returns:
          The state after these steps.
        """
        if self.known:
            return state
        never = np.full(self.widths, math.inf, np.float32)
        idle = math.inf
        for _ in range(3):  # no step is taken; the first call compiles
            begin = self._clock()
            state = jax.block_until_ready(advance(state, 0, never))
            idle = min(idle, self._clock() - begin)
        while not self.known:
            lengths = np.asarray(state.lengths)
            ended = np.asarray(state.done | ~state.finite) | (lengths >= most)
            if ended.all():
                break
            width = len(self.timed) % (1 + self.widths)  # 0 is a plain step
            prices = np.where(np.arange(1, 1 + self.widths) == width, 0, never)
            state = _waiting(state, 0 if width else _FOREVER)
            until = min(int(lengths[~ended].min()) + self._steps(idle), most)
            before, begin = _taken(state), self._clock()
            state = advance(state, until, prices.astype(np.float32))
            state = jax.block_until_ready(state)
            seconds = max(self._clock() - begin - idle, 1e-9)
            self.timed.append(seconds / max(int((_taken(state) - before).max()), 1))
        return _waiting(state, 0)

    def _steps(self, idle: float) -> int:
        """Return how many tokens each row gets in the coming timed call, at least."""
        if not self.timed:
            return 2
        long = max(_SECONDS, _IDLES * idle)
        return min(math.ceil(long / min(self.timed)), _MOST_STEPS)


def _waiting(state: Running, steps: int) -> Running:
    """Return the state with drafts that wait so many steps."""
    drafts = cast(Speculation, state.speculation)
    # Made of what was there, so that they lie on the same devices.
    now = dataclasses.replace(
        drafts.pace,
        balance=jnp.zeros_like(drafts.pace.balance),
        wait=jnp.zeros_like(drafts.pace.wait) + steps,
        pause=jnp.zeros_like(drafts.pace.pause) + 1,
    )
    drafts = dataclasses.replace(drafts, pace=now)
    return dataclasses.replace(state, speculation=drafts)


def _taken(state: Running) -> np.ndarray:
    """Return the steps that each row has taken, int `[B]`."""
    return np.array(cast(Speculation, state.speculation).counts.steps)


class Ledger:
    """The prices of the programs that were used last; threads share it."""

    def __init__(self, *, most: int = 256):
        self._most = most
        self._prices: collections.OrderedDict[Hashable, Prices] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def known(self) -> list[Prices]:
        """Return all of them, those last that were used last."""
        with self._lock:
            return list(self._prices.values())

    def of(self, program: Hashable, *, widths: int) -> Prices:
        """Return the prices of a program, empty ones if it is new."""
        with self._lock:
            found = self._prices.setdefault(program, Prices(widths))
            self._prices.move_to_end(program)
            while len(self._prices) > self._most:
                self._prices.popitem(last=False)
            return found


LEDGER = Ledger()


def of_program(
    lm: LanguageModel, options: Options, state: Running, stops: np.ndarray
) -> Prices | None:
    """Return what is known of the program that decodes, or None if nobody asks.

    Args:
      lm: the model.
      options: of the loop.
      state: of a generation.
      stops: int32 `[E]`, stop ids.
    """
    drafter = options.speculate
    if drafter is None or drafter.break_even != "auto":
        return None
    widths = len(pace.widths(drafter, options.accept))
    program = generation.advance_jit.key(
        *(lm.network, lm.params, state, np.int32(0), stops),
        np.zeros(widths, np.float32),
        options=options,
    )
    return LEDGER.of((program, lm.dtype, jax.default_backend()), widths=widths)
