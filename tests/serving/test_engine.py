"""An engine's ways in and out: what it refuses, notes, streams and waits for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving.served import BROKEN, model, prompt

import jaxkv
from jaxkv import Categorical, Engine, Greedy, LongFlow, PyramidKV, SnapKV, Tree
from jaxkv.contexts.context import Context
from jaxkv.runtime.seeds import row_keys
from jaxkv.serving import rows
from jaxkv.serving.board import Board
from jaxkv.serving.samplers import RowSamplers
from jaxkv.speculation.rules import TopK

SMALL = dict(rows=2, max_prompt=64, max_new_tokens=12, block=4)


@pytest.fixture(scope="module")
def engine():
    return Engine(model(), **SMALL, repetition_penalties=True, top_logprobs=2)


SAMPLERS = [
    Greedy(),
    Categorical(),
    Categorical(temperature=1e-30),
    Categorical(temperature=3.0, top_k=1),
    Categorical(temperature=0.7, top_k=7, top_p=0.8),
    Categorical(top_p=0.3, min_p=0.02),
    Categorical(min_p=0.2, repetition_penalty=1.7),
    Greedy(repetition_penalty=0.5),
]


def test_each_row_draws_what_its_own_sampler_draws():
    rows = 40
    logits = jax.random.normal(jax.random.key(0), (rows, 50)) * 3
    logits = logits.at[:, 7].set(logits[:, 9])  # a tie
    keys = row_keys(list(range(rows)), rows)
    chosen = [SAMPLERS[row % len(SAMPLERS)] for row in range(rows)]
    together = RowSamplers.of(chosen, penalties=True)
    together = jax.tree.map(jnp.asarray, together)
    together.check()
    want = [
        int(sampler.pick(logits[row][None], keys[row][None])[0])
        for row, sampler in enumerate(chosen)
    ]
    assert together.pick(logits, keys).tolist() == want
    assert len(set(want)) > 10
    # A program for one kind of rows does for them what the one that asks them does.
    for only, kind in ((slice(1), "greedy"), (slice(3), "drawn"), (None, "cut")):
        mine = RowSamplers.of(
            (chosen[:8] if only is None else chosen[only]), penalties=False
        )
        assert mine.needed() == kind
        mine = dataclasses.replace(jax.tree.map(jnp.asarray, mine), kind=kind)
        rows = len(mine.temperature)
        assert mine.pick(logits[:rows], keys[:rows]).tolist() == want[:rows]
    one = RowSamplers.of([Categorical(top_k=99)], penalties=False)
    assert one.repetition_penalty == 1.0
    assert one.pick(logits[:1], keys[:1]) == Categorical().pick(logits[:1], keys[:1])


def test_penalties_and_logprobs_are_those_of_generate(engine):
    sampler = Categorical(temperature=0.8, top_k=9, repetition_penalty=1.4)
    handles = [engine.submit(prompt(n), sampler=sampler, seed=n) for n in range(3)]
    events = list(engine.run())
    for n, handle in enumerate(handles):
        out = jaxkv.generate(
            model(),
            [prompt(n)],
            sampler=sampler,
            seed=n,
            max_new_tokens=12,
            top_logprobs=2,
        )
        result = handle.result
        assert result.tokens == out.tokens[0]
        np.testing.assert_allclose(result.logprobs, out.logprobs[0], atol=1e-4)
        alike = zip(result.top_logprobs, out.top_logprobs[0], strict=True)
        assert all(list(mine) == list(its) for mine, its in alike)
        told = [event for event in events if event.handle is handle]
        for name in ("tokens", "logprobs", "top_logprobs"):
            parts = sum((getattr(event, name) for event in told), ())
            assert parts == getattr(result, name)
        assert result.prompt_tokens == len(prompt(n)) and result.text is None
        assert 0 <= result.waited <= result.first_token <= result.seconds


def test_a_question_about_a_context_is_answered_as_by_generate():
    lm = model()
    context = jaxkv.compress(lm, [prompt(1), prompt(2)], budget=9, prefill=SnapKV())
    how = dict(decode=LongFlow(), budget=16)
    engine = Engine(lm, rows=2, max_prompt=96, max_new_tokens=12, block=4, **how)
    handles = [
        engine.submit([5, 6, 7 + n], context=context, document=n % 2) for n in range(3)
    ]
    plain = engine.submit(prompt(3)[:9])
    list(engine.run())
    for n, handle in enumerate(handles):
        out = jaxkv.generate(
            *(lm, [[5, 6, 7 + n]]),
            context=context,
            documents=[n % 2],
            max_new_tokens=12,
            **how,
        )
        assert handle.result.tokens == out.tokens[0]
        assert handle.prompt_tokens == len(prompt(1 + n % 2)) + 3
    assert plain.result.finish_reason == "length"
    with pytest.raises(ValueError, match=r"submit: .*need 22 slots, but a row has 16"):
        engine.submit([1] * 12, context=context)
    with pytest.raises(ValueError, match=r"submit: the prompt has .* for 96"):
        engine.submit([1] * 95, context=context)
    with pytest.raises(ValueError, match="submit: budget=3 of a request goes with"):
        engine.submit([1], context=context, budget=3)


def test_heads_of_a_context_must_be_those_of_the_rows(engine):
    context = jaxkv.compress(model(), [prompt(1)])
    cache = tuple(jax.tree.map(lambda x: x[:, :1], s) for s in context.cache)
    thin = Context(**vars(context) | {"cache": cache})
    with pytest.raises(ValueError, match=r"heads a layer: \[1\], but the rows hold 2"):
        engine.submit([1], context=thin)


def test_budgets_of_requests_are_those_of_generate():
    how = dict(prefill=SnapKV(window_size=4))
    engine = Engine(model(), **SMALL, budget=20, **how)
    handles = [engine.submit(prompt(n), budget=5 + 5 * n) for n in range(4)]
    list(engine.run())
    for n, handle in enumerate(handles):
        out = jaxkv.generate(
            model(), [prompt(n)], budget=5 + 5 * n, max_new_tokens=12, **how
        )
        assert handle.result.tokens == out.tokens[0]
    with pytest.raises(ValueError, match=r"budget must be between 1 and 20.*got 21"):
        engine.submit(prompt(0), budget=21)


def test_long_prompts_are_read_layer_by_layer_while_rows_run():
    how = dict(budget=30, prefill=PyramidKV(window_size=4))  # each layer has its own
    sizes = SMALL | {"max_prompt": 128, "block": 2}
    engine = Engine(model(), **sizes, stall=64, **how)
    long = [7, *prompt(3), *prompt(4), *prompt(5)][:120]
    whole = jaxkv.generate(model(), [long], max_new_tokens=12, **how).tokens[0]
    engine.submit(prompt(0))
    engine.step()
    second, third = engine.submit(long), engine.submit(prompt(1))
    assert not any(event.handle is second for event in engine.step())
    assert (engine.running, engine.waiting) == (1, 1)  # one layer of two has been read
    engine.step(), engine.step()  # the first token and block of the first are there
    assert engine.running == 2 and second.tokens == ()  # read, and nobody has looked
    list(engine.run())
    assert second.tokens == whole and third.result.finish_reason == "length"
    # One that is cancelled before its last part, and one that nobody waits for.
    engine.submit(prompt(0))
    engine.step()
    second = engine.submit(long)
    engine.step()
    assert engine.cancel(second) and second.tokens == ()
    (event,) = (event for event in engine.step() if event.handle is second)
    assert event.result.finish_reason == "cancelled"
    list(engine.run())
    third = engine.submit(long)
    engine.step()
    assert engine.running == 1  # as a whole, in one step
    assert engine.wait(third).tokens == whole


def test_a_cancelled_row_goes_no_further(engine):
    handles = [engine.submit(prompt(n)) for n in range(2)]
    engine.step()
    assert engine.cancel(handles[0]) and engine.cancel(handles[0])
    engine.step()
    before = np.array(engine._board._state.lengths)
    list(engine.run())
    now = np.array(engine._board._state.lengths)
    assert sorted(now - before) == [0, 12 - before.max()]
    assert not engine.cancel(handles[0]) and len(handles[1].tokens) == 12


def test_a_block_on_a_gpu_asks_its_host_nothing():
    def ahead(**how):
        lm, sizes = model(), SMALL | how
        board = functools.partial(Board, on_gpu=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("jaxkv.serving.engine.Board", board)
            engine = Engine(lm, **sizes)
        return engine._board.ahead

    assert ahead(budget=8, decode=LongFlow()) and ahead(top_logprobs=2)
    # What evicts in bulk loops for as long as rows are full, and drafts may be paid.
    assert not ahead(budget=8, decode=LongFlow(interval=2))
    assert not ahead(speculate=Tree())


def test_a_warm_up_compiles_what_is_asked_for(monkeypatch):
    monkeypatch.setattr(
        "jaxkv.serving.engine.Board", functools.partial(Board, on_gpu=True)
    )
    engine = Engine(model(), **SMALL | {"max_prompt": 128}, together=2, stall=192)

    def asked_for(**how):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(
                Board, "_compile", lambda *given: seen.extend(given[1:]) or 1 / 0
            )
            with pytest.raises(ZeroDivisionError):
                engine.warm_up(**how)
        groups, blocks = seen
        kinds = [terms.samplers.kind for terms in blocks]
        return [[len(request.ids) for request in group] for group in groups], kinds

    every = [[64], [64, 64], [96], [96, 96], [128]]  # two of 128 are more than `stall`
    assert asked_for() == (every, ["greedy", "drawn", "cut"])
    few = asked_for(prompts=np.array([3, 97, 9]), draws=False)
    assert few == ([[9], [9, 9], [97]], ["greedy"])
    for bad in ([], [0], [129], ["3"], "3", 3):
        with pytest.raises(ValueError, match=r"Engine\.warm_up: prompts"):
            engine.warm_up(prompts=bad)


def test_a_row_that_has_ended_has_no_say_in_how_blocks_are_drawn(monkeypatch):
    monkeypatch.setattr(
        "jaxkv.serving.engine.Board", functools.partial(Board, on_gpu=True)
    )
    engine = Engine(model(), **SMALL | {"rows": 2, "block": 999})
    assert engine._board.steps < 999  # no output is longer
    engine = Engine(model(), **SMALL | {"rows": 2, "block": 2})
    kinds, launch = [], engine._board.launch

    def noted():
        report = launch()
        kinds.append(engine._board._placed.samplers.kind)
        return report

    monkeypatch.setattr(engine._board, "launch", noted)
    engine.submit(prompt(0), max_new_tokens=9, stop_ids=[])
    drawn = Categorical(temperature=0.7, top_k=20)
    engine.submit(prompt(1), sampler=drawn, max_new_tokens=3, stop_ids=[])
    list(engine.run())
    assert kinds == ["cut", "greedy", "greedy", "greedy"]


def test_what_is_broken_off_loses_no_request(monkeypatch):
    def ctrl_c(*_, **__):
        raise KeyboardInterrupt

    engine = Engine(model(), **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "block_until_ready", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            engine.warm_up(prompts=[64])
    kept, unwanted = engine.submit(prompt(0)), engine.submit(prompt(1))
    with monkeypatch.context() as patch:
        patch.setattr(rows, "read_prompts_jit", ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert engine.waiting == 2 and engine.cancel(unwanted)
    assert engine.wait(kept).finish_reason == "length"
    assert unwanted.result.finish_reason == "cancelled" and engine.idle


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(rows=0), "Engine: rows must be >= 1, got 0"),
        (dict(block="8"), "Engine: block must be a whole number, got '8'"),
        (dict(together=None), "Engine: together must be a whole number, got None"),
        (dict(max_prompt=None), "Engine: max_prompt must be a whole number, got None"),
        (dict(max_prompt=500, max_new_tokens=13), "more than the 512 positions"),
        (dict(decode=LongFlow()), "LongFlow evicts while decoding and needs a budget"),
        (dict(accept=TopK()), "does nothing without drafts"),
        (dict(top_logprobs=-1), "Engine: top_logprobs must be between 0"),
        (dict(repetition_penalties="no"), "repetition_penalties= takes True or False"),
        (dict(lm="needle"), r"lm= takes a model .*, got 'needle'; write jaxkv\.load"),
    ],
)
def test_engines_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        Engine(**{"lm": model()} | options)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (dict(prompt=[]), "submit: prompt 0 has no tokens"),
        (dict(prompt=[1] * 65), "submit: the prompt has 65 tokens.*for 64"),
        (dict(prompt=[BROKEN + 1]), "outside"),
        (dict(max_new_tokens=13), "max_new_tokens=13, but the engine was made for 12"),
        (dict(max_new_tokens=0), "max_new_tokens must be >= 1, got 0"),
        (dict(stop_ids=range(9)), "got 9 stop_ids, but .* for 8; .*most_stop_ids=9"),
        (dict(sampler=print), "sampler= takes Greedy.. or Categorical"),
        (dict(sampler=Categorical(top_p=2.0)), "top_p"),
        (dict(seed=0.5), "seed must be a whole number"),
        (dict(document=5), "document=5 goes with context=, .* but there is none"),
        (dict(document="a"), "submit: document must be a whole number, got 'a'"),
        (dict(budget=4), "budget=4 of a request goes with an engine that has a budget"),
    ],
)
def test_requests_that_cannot_be(engine, asked, said):
    asked = {"prompt": [1, 2]} | asked
    with pytest.raises(ValueError, match=said):
        engine.submit(asked.pop("prompt"), **asked)


def test_a_stop_id_counts_once(engine):
    handle = engine.submit([1, 2], stop_ids=[3, 3, 4] * 9)
    assert handle.request.stop_ids == (3, 4) and engine.cancel(handle)
    assert [event.handle for event in engine.run()] == [handle]


def test_samplers_that_the_engine_was_not_made_for():
    plain = Engine(model(), **SMALL)
    with pytest.raises(ValueError, match="made without repetition penalties"):
        plain.submit([1], sampler=Greedy(repetition_penalty=1.1))
    lossy = Engine(model(), **SMALL, speculate=Tree(), accept=TopK())
    with pytest.raises(ValueError, match="accept=TopK is lossy"):
        lossy.submit([1], sampler=Categorical())
