"""Budgets of `jaxkv.generate`: one per row, fractions, layers, and what is refused."""

import dataclasses

import numpy as np
import pytest
import tiny

import jaxkv
from jaxkv import generation
from jaxkv.text.planning import bucket

CONFIG = dataclasses.replace(tiny.CONFIG, max_positions=256)
DAPQ = jaxkv.DapQ(window_size=4, prefix=1, kernel_size=3)
LAQ = jaxkv.LAQ(window_size=3, draft_window_size=2, kernel_size=3)
PYRAMID = jaxkv.PyramidKV(window_size=2, kernel_size=3, beta=4)


@pytest.fixture(scope="module")
def lm():
    return tiny.language_model(config=CONFIG)


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 61, length).tolist() for length in lengths]


def tokens(lm, rows, *, prefill=DAPQ, max_new_tokens=8, **options):
    out = jaxkv.generate(
        lm, rows, max_new_tokens=max_new_tokens, prefill=prefill, **options
    )
    return out.tokens


@pytest.mark.slow
def test_each_row_gets_its_own_budget(lm):
    """And exactly what it gets alone; rows shorter than all pseudo tokens included."""
    rows = prompts(60, 3, 40)
    together = tokens(lm, rows, budget=[5, 1, 20])
    for row, budget, want in zip(rows, [5, 1, 20], together, strict=True):
        assert tokens(lm, [row], budget=budget) == (want,)
    assert tokens(lm, rows, budget=[60, 3, 40]) == tokens(lm, rows)
    assert tokens(lm, rows, budget=200) == tokens(lm, rows)
    assert tokens(lm, rows, budget=[5, 1, 2]) != together


def test_a_ratio_is_of_each_row(lm):
    rows = prompts(60, 10, 40)
    together = tokens(lm, rows, compression_ratio=0.9)
    assert together == tokens(lm, rows, budget=[6, 1, 4])
    assert tokens(lm, rows, compression_ratio=0.0) == tokens(lm, rows)


def test_similar_budgets_share_a_program(lm):
    rows = prompts(90, 70)
    tokens(lm, rows, budget=20)
    for other in dict(budget=[33, 64]), dict(compression_ratio=0.8):
        again = jaxkv.generate(lm, rows, max_new_tokens=8, prefill=DAPQ, **other)
        assert again.stats.compile_seconds == 0


@pytest.mark.slow
def test_the_cache_is_as_large_as_it_is_said_to_be(lm):
    rows = prompts(120)
    per_slot = 2 * (2 * 8 * 4 + 4)  # two heads: keys, values, position
    for prefill, slots in [(DAPQ, [128, 128]), (PYRAMID, [128, 64])]:
        stats = jaxkv.generate(
            lm, rows, max_new_tokens=8, budget=60, prefill=prefill
        ).stats
        # 60 lie in a bucket of 64, beside 64 for the output. The pyramid of 58 free
        # tokens keeps 102 + 2 below and 14 + 2 above.
        want = [64 + 64] * 2 if prefill is DAPQ else [bucket(104) + 64, 64 + 64]
        assert stats.slots == want[0]
        assert stats.cache_bytes == sum(want) * per_slot + 2 * 2 * 4, slots


@pytest.mark.slow
def test_layers_of_a_pyramid_keep_what_is_theirs(lm):
    """A row that fits is whole in each layer, whoever is beside it."""
    rows = prompts(120, 30)
    together = tokens(lm, rows, prefill=PYRAMID, budget=40)
    assert together[1:] == tokens(lm, rows[1:], prefill=PYRAMID)
    assert together[:1] == tokens(lm, rows[:1], prefill=PYRAMID, budget=40)
    assert together[:1] != tokens(
        lm, rows[:1], prefill=jaxkv.SnapKV(window_size=2, kernel_size=3), budget=40
    )


def test_a_budget_that_holds_through_generation(lm):
    out = jaxkv.generate(
        lm,
        prompts(60, 3),
        max_new_tokens=30,
        budget=[12, 12],
        prefill=DAPQ,
        decode=jaxkv.StreamingLLM(n_sink=1),
    )
    assert out.stats.slots == 12
    assert out.lengths == (30, 30)


EVICTS = dict(decode=jaxkv.StreamingLLM())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(budget=[5]), "got 1 budgets for 2 prompts"),
        (dict(budget=[5, 0]), "budget must be at least 1"),
        (dict(budget=[5, 6], **EVICTS), "same budget for all rows, got .5, 6."),
        (dict(compression_ratio=0.5, **EVICTS), "pass budget= .tokens. instead"),
        (dict(budget=[100, 50], prefill=jaxkv.Full()), "has 60 tokens and budget=50"),
        (dict(budget=50, prefill=jaxkv.DapQ(offset=150)), "at offset 150 need 282"),
        (dict(budget=50, prefill=jaxkv.DapQ(window_size=200)), "200 pseudo tokens"),
        (dict(budget=9, prefill=jaxkv.DapQ(window_size=300, offset=-999)), "need 300"),
        (dict(budget=50, prefill=jaxkv.SnapKV(offset=200)), "at offset 200 need 300"),
        (dict(budget=50, prefill=jaxkv.DapQ(window_size=0)), "window_size must be"),
        (dict(budget=[9, 1], prefill=jaxkv.SnapKV()), "budget=1 leaves no slot"),
        (dict(budget=50, prefill=PYRAMID, **EVICTS), "different budgets"),
    ],
)
def test_bad_budgets_are_named(lm, options, message):
    with pytest.raises(ValueError, match=message):
        tokens(lm, prompts(100, 60), **options)


@pytest.mark.slow
def test_offsets_that_fit_are_taken(lm):
    policy = jaxkv.DapQ(window_size=4, offset=150, kernel_size=3)
    assert len(tokens(lm, prompts(60), prefill=policy, budget=20)[0]) == 8
    assert len(tokens(lm, prompts(60), prefill=jaxkv.DapQ(), budget=1)[0]) == 8


@pytest.mark.parametrize("prefill", [DAPQ, PYRAMID, LAQ])
def test_repeated_prompts_are_read_once(lm, prefill, monkeypatch):
    """And give, budget by budget, what they give alone, drawn tokens included."""
    rows, budgets = list(map(np.array, prompts(60, 9))), [5, 7, 20, 20, 6, 5]
    sampler = jaxkv.Categorical(temperature=2.0)
    options = dict(prefill=prefill, sampler=sampler)
    read = []
    begin = generation.start_copies_jit
    monkeypatch.setattr(
        generation, "start_copies_jit", lambda *a, **k: read.append(k) or begin(*a, **k)
    )
    got = tokens(lm, rows * 3, budget=budgets, seed=list(range(6)), **options)
    assert [k["keep"].shape for k in read] == [(3, 2)]
    for i, budget in enumerate(budgets):
        alone = tokens(lm, [rows[i % 2]], budget=[budget], seed=[i], **options)
        assert alone == got[i : i + 1]


def test_prompts_that_do_not_repeat_are_read_in_turn(lm, monkeypatch):
    monkeypatch.setattr(generation, "start_copies_jit", None)
    one, two = prompts(20, 20)
    tokens(lm, [one, two, one], budget=[5, 6, 7], max_new_tokens=2)
