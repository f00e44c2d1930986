"""What decides the shapes of a generation, whatever prompts and budgets come."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxkv
from jaxkv.options import Options
from jaxkv.text import planning
from jaxkv.text.planning import bucket, row_budgets

LAYERS = 5
WINDOWS = (None,) * LAYERS
EVEN = Options(prefill=jaxkv.SnapKV())
PYRAMID = Options(prefill=jaxkv.PyramidKV(window_size=4, beta=6))
EVICTING = Options(prefill=jaxkv.SnapKV(), decode=jaxkv.StreamingLLM())
SPARING = Options(prefill=jaxkv.SnapKV(), decode=jaxkv.H2ODecode())

lengths_and_budgets = st.lists(
    st.tuples(st.integers(1, 900), st.integers(2, 900)), min_size=1, max_size=6
)


def make(lengths, options=EVEN, budgets=None, new=20):
    ids = [[i] * length for i, length in enumerate(lengths)]
    return planning.plan(ids, options, budgets, max_new_tokens=new, windows=WINDOWS)


def program(plan):
    """What decides which compiled program runs."""
    return plan.options, plan.slots, plan.prompt, plan.max_out, plan.distinct


def test_buckets_waste_at_most_half():
    sizes = [bucket(n) for n in range(1, 5000)]
    assert sizes == sorted(sizes)
    assert all(n <= size for n, size in enumerate(sizes, 1))
    assert all(size <= 1.5 * n for n, size in enumerate(sizes, 1) if n > 64)


@given(rows=lengths_and_budgets, new=st.integers(1, 300))
@pytest.mark.parametrize("options", [EVEN, PYRAMID])
def test_slots_are_enough_for_every_row(options, rows, new):
    """For what each layer keeps of it, and the whole output behind that."""
    lengths, budgets = map(np.array, zip(*rows, strict=True))
    plan = make(lengths, options, budgets.tolist(), new)
    kept = options.prefill.layer_keeps(budgets, lengths, LAYERS)
    for slots, layer in zip(plan.slots, kept, strict=True):
        assert slots >= np.minimum(layer, lengths).max() + new
        assert slots <= plan.prompt + plan.max_out
    assert plan.prompt >= lengths.max() and plan.max_out >= new


@given(rows=lengths_and_budgets)
@pytest.mark.parametrize("options", [EVEN, PYRAMID])
def test_each_row_keeps_what_was_asked_for_and_no_bound_is_below_it(options, rows):
    lengths, budgets = zip(*rows, strict=True)
    plan = make(lengths, options, budgets)
    assert tuple(plan.keep) == budgets
    assert plan.keep.dtype == np.int32
    assert plan.bound == bucket(max(budgets)) >= max(budgets)
    assert plan.options == dataclasses.replace(options, budget=plan.bound)


@given(length=st.integers(1, 900), budget=st.integers(5, 900))
@pytest.mark.parametrize("options", [EVICTING, SPARING])
def test_an_evicting_policy_gets_the_budget_itself(options, length, budget):
    plan = make([length, 1], options, (budget, budget))
    assert (plan.bound, plan.options.budget, plan.keep) == (budget, budget, None)
    assert plan.slots == (min(budget, plan.prompt + plan.max_out),) * LAYERS


def test_without_a_budget_everything_fits():
    plan = make([70, 3], PYRAMID)
    assert (plan.bound, plan.options, plan.keep) == (None, PYRAMID, None)
    assert plan.slots == (96 + 64,) * LAYERS


@given(one=lengths_and_budgets, data=st.data())
def test_what_lies_in_the_same_buckets_shares_a_program(one, data):
    """All but the shape of a batch comes from buckets, and rows only have to fit."""
    lengths, budgets = zip(*one, strict=True)
    first = make(lengths, EVEN, budgets, new=20)
    below = st.integers(1, max(lengths)), st.integers(2, max(budgets))
    rest = [data.draw(st.tuples(*below)) for _ in one[1:]]
    top = (bucket(max(lengths)), bucket(max(budgets)))
    lengths, budgets = zip(top, *rest, strict=True)
    assert program(make(lengths, EVEN, budgets, new=60)) == program(first)


def test_another_bucket_is_another_program():
    first = program(make([60], EVEN, (40,)))
    for other in (
        make([65], EVEN, (40,)),
        make([60], EVEN, (65,)),
        make([60], EVEN, (40,), new=65),
        make([60], PYRAMID, (40,)),
    ):
        assert program(other) != first


def test_prompts_are_padded_behind():
    plan = make([3, 1])
    assert plan.padded([[7, 8, 9], [5]]).tolist() == [
        [7, 8, 9] + [0] * 61,
        [5] + [0] * 63,
    ]


@given(count=st.integers(1, 3), copies=st.integers(2, 3))
def test_prompts_that_repeat_are_read_once(count, copies):
    ids = [[i] * 3 for i in range(count)] * copies
    arguments = dict(max_new_tokens=8, windows=WINDOWS)
    budgets = (4,) * len(ids)
    assert planning.plan(ids, EVEN, budgets, **arguments).distinct == count
    other = [*ids[:-1], [9]]
    assert planning.plan(other, EVEN, budgets, **arguments).distinct == len(ids)
    for options in (
        dataclasses.replace(EVEN, speculate=jaxkv.Tree()),
        EVICTING,
    ):
        plan = planning.plan(ids, options, budgets, **arguments)
        assert plan.distinct == len(ids)
        assert plan.padded(ids).shape == (len(ids), 64)
    assert planning.plan(ids, EVEN, None, **arguments).distinct == len(ids)


@given(
    lengths=st.lists(st.integers(1, 900), min_size=1, max_size=5),
    ratio=st.floats(0, 1, exclude_max=True),
)
def test_a_ratio_leaves_its_part_of_each_prompt(lengths, ratio):
    ids = [[0] * length for length in lengths]
    budgets = row_budgets(None, ratio, ids, evicts=False)
    for length, budget in zip(lengths, budgets, strict=True):
        assert 1 <= budget <= length
        assert abs(budget - length * (1 - ratio)) <= 0.5 or budget == 1


def test_one_budget_is_that_of_every_row():
    assert row_budgets(7, None, [[1], [2, 3]], evicts=True) == (7, 7)
    assert row_budgets(np.int64(7), None, [[1], [2]], evicts=False) == (7, 7)
    assert row_budgets([7, 9], None, [[1], [2]], evicts=False) == (7, 9)
    assert row_budgets(None, None, [[1]], evicts=True) is None
