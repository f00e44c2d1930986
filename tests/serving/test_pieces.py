"""Texts end where the first of their stop strings begins; echoes are scores."""

import asyncio

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from serving.served import BROKEN, model, prompt

import jaxkv
from jaxkv.serving import echoes
from jaxkv.serving.pieces import StoppedText
from jaxkv.serving.worker import FullError, StoppedError, Worker


@given(st.data())
def test_a_text_ends_where_the_first_stop_string_begins(tiny_lm, data):
    tokenizer = tiny_lm.tokenizer
    ids = data.draw(st.lists(st.integers(0, 4095), max_size=12))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    at = data.draw(st.integers(0, max(0, len(whole) - 1)))
    inside = whole[at : at + data.draw(st.integers(1, 6))]
    stops = [s for s in (inside, data.draw(st.text("ab e", max_size=3))) if s]
    text = StoppedText(tokenizer, stops)
    shown = ""
    for token in ids:
        shown += text.push(token)
        if text.stopped:
            break
    shown += text.finish(whole)
    ends = [
        (whole.index(stop) + len(stop), whole.index(stop))
        for stop in stops
        if stop in whole
    ]
    assert shown == whole[: min(ends, default=(0, len(whole)))[1]]
    assert text.stopped == bool(ends)


def test_what_may_begin_a_stop_string_is_held_back(tiny_lm):
    text = StoppedText(tiny_lm.tokenizer, ["abc", "bd"])
    shown = []
    for part in ("xa", "b", "a", "b", "d", "e"):
        text._write(part)
        shown.append(text._release(end=False))
    assert shown == ["x", "", "ab", "", "a", ""]
    assert text.stopped and text.finish("whatever") == ""


@pytest.mark.parametrize("parts", [["a b"], ["a", " ", "b"], ["a ", "b"]])
def test_the_stop_string_that_is_whole_first_ends_a_text(tiny_lm, parts):
    text = StoppedText(tiny_lm.tokenizer, ["a b", " "])
    shown = ""
    for part in parts:
        text._write(part)
        shown += text._release(end=False)
    assert shown == "a" and text.stopped


def test_an_echo_is_what_score_says_whatever_the_length():
    lm, ids = model(), [*prompt(3), *prompt(4), *prompt(5)]
    for length in (1, 2, 65, len(ids)):
        own, top = echoes.echo(lm, ids[:length], 3)
        assert len(own) == len(top) == length - 1
        if length > 1:
            scores = jaxkv.score(lm, [ids[:1]], [ids[1:length]])
            np.testing.assert_allclose(own, scores.logprobs[0], atol=1e-4)
        for chosen, others in zip(own, top, strict=True):
            values = list(others.values())
            assert values == sorted(values, reverse=True) and len(values) == 3
            assert values[0] >= chosen - 1e-6
    with pytest.raises(jaxkv.LogitsError, match="NaN or infinite"):
        echoes.echo(lm, [1, 2, BROKEN, 4], 1)


def test_a_worker_is_bounded_and_ends():
    engine = jaxkv.Engine(model(), rows=2, max_prompt=64, max_new_tokens=12, block=4)

    async def work():
        worker = Worker(engine, queue=1)
        asked = {"prompt": prompt(1)}
        with pytest.raises(ValueError, match="token ids outside"):
            worker.submit([asked, {"prompt": [10**6]}])  # all of them or none
        assert worker.taken == 1  # until the engine has let go of it
        worker.start()
        while worker.taken:
            await asyncio.sleep(0.001)
        group = worker.submit([asked] * 3)
        with pytest.raises(FullError):
            worker.submit([asked])
        with pytest.raises(FullError):
            await worker.run(lambda: 1)
        ended = []
        while len(ended) < 3:
            number, event = await group.events.get()
            ended += [] if event.result is None else [number]
        assert sorted(ended) == [0, 1, 2] and worker.taken == 0
        assert await worker.run(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await worker.run(lambda: 1 // 0)
        last = worker.submit([asked])
        await worker.stop()
        await asyncio.sleep(0)
        assert last.handles[0].result is not None and worker.taken == 0
        with pytest.raises(StoppedError):
            worker.submit([asked])
        with pytest.raises(StoppedError):
            await worker.run(lambda: 1)

    asyncio.run(asyncio.wait_for(work(), 60))
