"""The one clock of all measurements, with a hand that the tests turn."""

import itertools

import jax.numpy as jnp
import pytest

from jaxkv.bench import clock


@pytest.fixture
def hand(monkeypatch):
    """A clock that stands still unless it is told to go on."""

    class Hand:
        now = 0.0

        def turn(self, seconds):
            self.now += seconds

    hand = Hand()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: hand.now)
    return hand


def test_neither_the_warm_up_nor_what_prepares_is_timed(hand):
    costs = iter([100, 8, 6])

    def call(state):
        hand.turn(next(costs))
        return [*state, "call"]

    def prepare(state):
        hand.turn(50)
        return [*state, "prepare"]

    seconds, state = clock.timed(
        call, [], 2, prepare=prepare, units=lambda state: state.count("call")
    )
    assert seconds == (8 / 2, 6 / 3)
    assert state == ["call", "prepare", "call", "prepare", "call"]


def test_the_median_of_a_call(hand):
    costs = iter([100, 1, 7, 2])
    assert clock.median_seconds(lambda: hand.turn(next(costs)), 3) == 2


def test_a_loop_goes_on_from_its_own_state(monkeypatch):
    ticks = itertools.count(step=6)  # at each look at the clock
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(ticks))
    seconds, state, temporaries = clock.time_loop(
        lambda x: 2 * x, jnp.float32(1), iterations=3, repeats=2
    )
    assert seconds == (6 / 3, 6 / 3)
    assert state == 2 ** (3 * (1 + 2))
    assert temporaries >= 0


def test_copy_bandwidth_counts_what_is_read_and_written(monkeypatch):
    monkeypatch.setattr(clock, "timed", lambda call, x, repeats: ((4.0,) * 3, x))
    assert clock.copy_bandwidth(2**20, passes=10) == 2 * 2**20 * 10 / 4
    monkeypatch.undo()
    assert clock.copy_bandwidth(2**20, repeats=2) > 0


def test_memory_that_nobody_tells_of(monkeypatch):
    class Silent:
        def memory_stats(self):
            return None

        def memory_analysis(self):
            return None

    monkeypatch.setattr(clock.jax, "devices", lambda: [Silent()])
    assert clock.device_memory("bytes_limit") is None
    assert clock.program_memory(Silent()) == {"program_bytes": None, "temp_bytes": None}
