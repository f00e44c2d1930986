"""What a step with drafts takes: measured in a first generation, kept, bounded."""

import dataclasses
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import Exact, Tree
from jaxkv.sequences import Generation
from jaxkv.speculation import loop
from jaxkv.text.pricing import Ledger, Prices

IDLE, STEPS = 0.005, (0.01, 0.015, 0.04)  # seconds of a call, and of each kind of step
DRAFTER = Tree()


class Machine:
    """Decodes without a network, by a clock of its own."""

    def __init__(self, slow=(), idle=IDLE, steps=STEPS):
        self.now, self.slow, self.kinds = 0.0, list(slow), []
        self.idle, self.steps = idle, steps

    def clock(self):
        return self.now

    def __call__(self, state, until, prices):
        lengths = np.asarray(state.lengths)
        left = until - lengths[~np.asarray(state.done)]
        count = int(left.max(initial=0))
        kind = int(np.argmin(prices)) + 1 if np.isfinite(prices).any() else 0
        waits = np.asarray(state.speculation.pace.wait) > 0
        assert count == 0 or waits.all() == (kind == 0)
        if count:
            self.kinds.append(kind)
        slow = self.slow.pop(0) if count and self.slow else 1
        self.now += self.idle + count * self.steps[kind] * slow
        taken = jnp.asarray(np.clip(until - lengths, 0, None), jnp.int32)
        counts = state.speculation.counts
        counts = dataclasses.replace(counts, steps=counts.steps + taken)
        pace = state.speculation.pace
        pace = dataclasses.replace(pace, balance=pace.balance + 1)
        return dataclasses.replace(
            state,
            lengths=state.lengths + taken,
            speculation=dataclasses.replace(
                state.speculation, counts=counts, pace=pace
            ),
        )


def begun(done=(False, False)):
    one = jnp.ones(2, jnp.int32)
    return Generation(
        tokens=jnp.zeros((2, 1024), jnp.int32),
        lengths=one,
        done=jnp.asarray(done),
        finite=one == 1,
        last=one,
        position=one,
        cache=(),
        rngs=one,
        seen=None,
        speculation=loop.begin(
            *(DRAFTER, jnp.zeros((2, 4), jnp.int32), one, one),
            rule=Exact(),
            max_out=1024,
        ),
    )


def measured(machine, *, most=1024, found=None, state=None):
    found = found or Prices(2, clock=machine.clock)
    return found, found.measure(machine, state or begun(), most)


def test_prices_are_ratios_of_steps():
    found, state = measured(Machine())
    assert found.known
    np.testing.assert_allclose(found.array(), [1.5, 4.0], rtol=1e-5)
    speculation = state.speculation.pace
    assert (speculation.wait == 0).all() and (speculation.balance == 0).all()


def test_a_disturbed_call_does_not_count():
    found, _ = measured(Machine(slow=[3, 1, 9, 2, 4]))
    np.testing.assert_allclose(found.array(), [1.5, 4.0], rtol=1e-5)


def test_no_step_is_cheaper_than_a_plain_one():
    found, _ = measured(Machine(slow=[7] + [1, 1, 7] * 3))
    assert (found.array() >= 1).all()


def test_what_is_known_is_not_measured_again():
    machine = Machine()
    found, _ = measured(machine)
    before = machine.now
    measured(machine, found=found)
    assert machine.now == before


def test_short_outputs_leave_the_rest_to_later_ones():
    machine = Machine()
    found, state = measured(machine, most=5)
    assert not found.known and np.isinf(found.array()).all()
    assert int(state.lengths.max()) == 5
    for _ in range(20):
        measured(machine, most=5, found=found)
    np.testing.assert_allclose(found.array(), [1.5, 4.0], rtol=1e-5)
    assert machine.kinds == [0, 1, 2] * 3


@pytest.mark.parametrize(
    ("idle", "step", "tokens"),
    [
        (0.0, 0.1, 1),
        (0.0, 0.004, 3),  # 10 ms
        (0.01, 0.004, 10),  # 40 ms
        (0.01, 0.0001, 64),  # no more
    ],
)
def test_calls_last_longer_than_what_disturbs_them(idle, step, tokens):
    machine = Machine(idle=idle, steps=(step, step, step))
    _, state = measured(machine)
    assert (state.lengths - 1).tolist() == [2 + 8 * tokens] * 2


@pytest.mark.parametrize("done", [(True, True), (True, False)])
def test_rows_that_have_ended_are_not_waited_for(done):
    found, state = measured(Machine(), state=begun(done))
    assert found.known == (not all(done))
    assert state.done.tolist() == list(done)


def test_a_ledger_keeps_what_was_used_last():
    ledger = Ledger(most=2)
    first = ledger.of("a", widths=2)
    ledger.of("b", widths=1)
    assert ledger.of("a", widths=2) is first
    ledger.of("c", widths=1)  # in place of b
    assert ledger.of("a", widths=2) is first
    others = [threading.Thread(target=ledger.of, args=("d",), kwargs=dict(widths=1))]
    for thread in others:
        thread.start()
        thread.join()
    assert ledger.of("a", widths=2) is first
