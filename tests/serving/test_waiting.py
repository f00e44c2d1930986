"""Requests that are waited for: streamed, cancelled, lost, and of another engine."""

import pytest
from serving.served import model, prompt

from jaxkv import Engine
from jaxkv.serving import requests
from jaxkv.serving.board import Board

SMALL = dict(rows=2, max_prompt=64, max_new_tokens=12, block=4)


@pytest.fixture(scope="module")
def engine():
    return Engine(model(), **SMALL)


def test_streams_and_waits(engine):
    first, second, third = (engine.submit(prompt(n), seed=n) for n in range(3))
    assert (engine.waiting, engine.running, engine.idle) == (3, 0, False)
    assert third.tokens == () and "0 tokens so far" in repr(third)
    pieces = list(engine.stream(third))
    assert len(pieces) > 2 and sum(pieces, ()) == third.result.tokens
    assert engine.wait(first) is first.result and second.result is not None
    assert "length after 12 tokens" in repr(first)
    list(engine.run())
    assert engine.idle and engine.step() == []
    assert not engine.cancel(first)
    with pytest.raises(RuntimeError, match="ends twice; this is a fault of the engine"):
        requests.ended(requests.Event(handle=first, tokens=()), "stop", None)


def test_a_stream_ends_where_it_is_cancelled(engine):
    handle, other = engine.submit(prompt(0)), engine.submit(prompt(1), seed=1)
    seen = []
    for tokens in engine.stream(handle):
        seen.append(tokens)
        if len(seen) == 2:
            engine.cancel(handle)
    assert len(seen) == 2 and sum(seen, ()) == handle.result.tokens == handle.tokens
    assert handle.result.finish_reason == "cancelled"
    assert engine.wait(other).finish_reason == "length"


def test_what_no_engine_would_end_is_not_waited_for():
    engine, other = Engine(model(), **SMALL), Engine(model(), **SMALL)
    handle = other.submit(prompt(0))
    for ask in (engine.wait, engine.cancel, engine.stream):
        for asked, said in ((handle, "no request of this engine"), (5, "got 5")):
            with pytest.raises(ValueError, match=said):
                ask(asked)
    assert engine.step() == [] and other.wait(handle).finish_reason == "length"


def test_what_was_lost_is_not_waited_for(monkeypatch):
    def ctrl_c(*_, **__):
        raise KeyboardInterrupt

    engine = Engine(model(), **SMALL)
    handle = engine.submit(prompt(0))
    with monkeypatch.context() as patch:
        patch.setattr(Board, "place", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    list(engine.run())  # the first token is told of
    with pytest.raises(ValueError, match="was lost in a step that was broken off"):
        engine.wait(handle)


def test_rows_are_given_away_before_their_last_tokens_are_read():
    engine = Engine(model(), **SMALL)
    first, second, third = (
        engine.submit(prompt(n), max_new_tokens=new, stop_ids=[])
        for n, new in enumerate((5, 9, 1))
    )
    engine.step()  # the first will have its 5 tokens after this block
    assert (engine.running, engine.waiting) == (1, 1) and first.result is None
    engine.step()
    assert (engine.running, engine.waiting) == (0, 0) and second.result is None
    assert engine.cancel(first)
    list(engine.run())
    assert [len(h.tokens) for h in (first, second, third)] == [0, 9, 1]
    assert first.result.finish_reason == "cancelled"


def test_no_more_is_read_between_blocks_than_rows_may_wait_for():
    engine = Engine(
        model(), rows=4, max_prompt=64, max_new_tokens=12, block=4, stall=128
    )
    engine.submit(prompt(0))
    engine.step()
    for number in range(1, 5):
        engine.submit(prompt(number))
    engine.step()
    assert (engine.running, engine.waiting) == (3, 2)
    assert engine.cancel(engine.submit(prompt(7)))
    with pytest.raises(ValueError, match="warm_up: there are requests"):
        engine.warm_up()
    list(engine.run())
