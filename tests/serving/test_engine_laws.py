"""The laws of an engine, whatever comes, goes and fails, in whatever order.

Each request gets what `generate` gives it alone; what is cancelled leaves no trace;
every request ends once; nothing compiles after the warm-up.
"""

import functools

import jax
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from serving.served import BROKEN, MOST, SAMPLERS, alone, model, prompt

from jaxkv import DapQ, Engine, LongFlow, SnapKV, Tree
from jaxkv.serving import rows
from jaxkv.serving.board import Board
from jaxkv.text.stopwatch import stopwatch

PROMPTS = 5
KINDS = {
    "evicting": {
        "budget": 14,
        "prefill": DapQ(window_size=4),
        "decode": LongFlow(),
    },
    "together, as on a GPU": {"budget": 14, "prefill": SnapKV(window_size=4)},
    "drafts": {
        "budget": 14,
        "prefill": SnapKV(window_size=4),
        "speculate": Tree(num_draft_tokens=3, break_even=0.0),
    },
}
SIZES = {
    "evicting": {"stall": 32},  # half a prompt, so that they are read in two parts
    "together, as on a GPU": {"together": 2},
    "drafts": {},
}
# Drafts that pass exactly change nothing, so that what is alone needs none.
ALONE = {
    kind: tuple((name, x) for name, x in options.items() if name != "speculate")
    for kind, options in KINDS.items()
}
FAILING = ("read_layers_jit", "read_prompts_jit", "insert_jit", "advance_jit")


def device_fault(*_, **__):
    raise jax.errors.JaxRuntimeError("INTERNAL: a fault of a test")


class Requests(RuleBasedStateMachine):
    """Requests that come, are cancelled, and fail; one engine serves all examples."""

    kind = engine = None

    @initialize()
    def begin(self):
        assert self.engine.idle
        self.handles, self.asked, self.ends = [], {}, {}
        self.cancelled, self.shown, self.lost = set(), {}, False

    @rule(
        number=st.integers(0, PROMPTS - 1),
        sampler=st.sampled_from(sorted(SAMPLERS)),
        new=st.integers(1, MOST),
        stop=st.integers(-1, MOST - 1),
    )
    def submit(self, number, sampler, new, stop):
        """Ask for a prompt, and to stop at a token that it may come to."""
        tokens = alone(number, sampler, ALONE[self.kind])
        stops = [] if stop < 0 else [tokens[stop]]
        ends = next((i for i, t in enumerate(tokens, 1) if t in stops), MOST + 1)
        handle = self.engine.submit(
            prompt(number),
            sampler=SAMPLERS[sampler],
            max_new_tokens=new,
            stop_ids=stops,
            seed=number,
        )
        self.handles.append(handle)
        self.asked[handle] = tokens[: min(new, ends)], ends <= new

    @rule()
    def submit_what_breaks(self):
        handle = self.engine.submit([3, BROKEN, 4])
        self.handles.append(handle)
        self.asked[handle] = (), None

    @precondition(lambda self: self.handles)
    @rule(data=st.data())
    def cancel(self, data):
        handle = data.draw(st.sampled_from(self.handles))
        fresh = handle.result is None and handle not in self.cancelled
        if self.engine.cancel(handle) or fresh:
            assert handle.result is None
            self.cancelled.add(handle)

    @rule()
    def step(self):
        self.note(self.engine.step())

    @rule(where=st.sampled_from(FAILING), after=st.booleans())
    def fail(self, where, after):
        """Let one program fail in a step, before or after it took its arguments."""
        whole = getattr(rows, where)

        def failing(*args, **kwargs):
            if after:
                whole(*args, **kwargs)
            device_fault()

        setattr(rows, where, failing)
        try:
            self.note(self.engine.step())
        finally:
            setattr(rows, where, whole)

    def note(self, events):
        for event in events:
            assert event.handle in self.asked and event.handle not in self.ends
            assert not (event.tokens and event.handle in self.cancelled)
            self.shown[event.handle] = (
                *self.shown.get(event.handle, ()),
                *event.tokens,
            )
            if event.result is not None:
                self.ends[event.handle] = event.result

    def teardown(self):
        if not hasattr(self, "handles"):
            return
        self.note(self.engine.run())
        assert set(self.ends) == set(self.handles)
        for handle, result in self.ends.items():
            tokens, stopped = self.asked[handle]
            assert result is handle.result
            assert result.tokens == handle.tokens == self.shown[handle]
            assert result.tokens == tokens[: len(result.tokens)]
            match result.finish_reason:
                case "cancelled":
                    assert handle in self.cancelled
                case "error":
                    known = ("a fault of a test", "NaN or infinite; 32 of 1952 values")
                    assert any(said in result.error for said in known)
                    assert stopped is None or known[0] in result.error
                case reason:
                    assert result.tokens == tokens and handle not in self.cancelled
                    assert reason == ("stop" if stopped else "length")


@pytest.mark.parametrize("kind", KINDS)
def test_requests_end_once_and_as_they_do_alone(kind, monkeypatch):
    if "GPU" in kind:
        as_there = functools.partial(Board, on_gpu=True)
        monkeypatch.setattr("jaxkv.serving.engine.Board", as_there)
    how = SIZES[kind] | KINDS[kind]
    engine = Engine(model(), rows=3, max_prompt=64, max_new_tokens=MOST, block=4, **how)
    assert engine._board.ahead == (kind != "drafts")
    engine.warm_up()
    monkeypatch.setattr(Requests, "kind", kind)
    monkeypatch.setattr(Requests, "engine", engine)
    for number in range(PROMPTS):
        for sampler in SAMPLERS:
            alone(number, sampler, ALONE[kind])
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), engine._board._state)
    engine.submit([1]), list(engine.run()), engine.submit([BROKEN]), list(engine.run())
    with stopwatch() as lap:
        run_state_machine_as_test(
            Requests, settings=settings(max_examples=12, stateful_step_count=15)
        )
        compiling = lap().compiling
    assert compiling == 0
    now = jax.tree.map(lambda x: (x.shape, x.dtype), engine._board._state)
    assert now == shapes
