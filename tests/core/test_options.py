"""Options of one generation that are at odds with each other, and slots of a state."""

import pytest

import jaxkv
from jaxkv.options import Options, described

TWO = (None, None)  # layers without a window
EVICTING = Options(prefill=jaxkv.SnapKV(), decode=jaxkv.StreamingLLM())


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        (None, "StreamingLLM evicts while decoding and needs a budget"),
        ((9, 0), "budget must be at least 1 token, got 0"),
        ((9, 4), "StreamingLLM: budget=4 leaves no slot beside n_sink=4 sinks"),
        ((9, -1), "budget must be at least 1 token, got -1"),
    ],
)
def test_every_budget_is_checked(budgets, message):
    with pytest.raises(ValueError, match=message):
        EVICTING.check(budgets)
    EVICTING.check((9, 5))


def test_budgets_may_come_later():
    """As a ratio does, which is of prompts that are not read yet."""
    EVICTING.check(())
    with pytest.raises(ValueError, match="n_sink"):
        Options(decode=jaxkv.StreamingLLM(n_sink="4")).check(())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            Options(budget=3, decode=jaxkv.RKV(buffer=4, window_size=1)),
            "RKV: budget=3 is too small",
        ),
        (
            Options(budget=9, prefill=jaxkv.PyramidKV(), decode=jaxkv.StreamingLLM()),
            "PyramidKV gives layers different budgets",
        ),
    ],
)
def test_policies_at_odds(options, message):
    with pytest.raises(ValueError, match=message):
        options.check()


def test_a_policy_that_needs_the_whole_budget_free():
    class Sparing(jaxkv.H2ODecode):
        spare = 9

    with pytest.raises(ValueError, match=r"budget=9 leaves .* at least 10"):
        Options(budget=9, decode=Sparing()).check()


@pytest.mark.parametrize(
    ("options", "kept", "slots"),
    [
        (Options(), None, 30),
        (Options(budget=7), None, 7 + 10),
        (Options(budget=7), 5, 5 + 10),
        (Options(budget=99), None, 20 + 10),
        (Options(budget=7, decode=jaxkv.StreamingLLM()), 5, 7),
        (Options(budget=99, decode=jaxkv.StreamingLLM()), None, 30),
    ],
)
def test_slots_of_a_state(options, kept, slots):
    assert options.num_slots(20, 10, kept=kept) == slots


def test_slots_of_each_layer():
    assert Options(prefill=jaxkv.PyramidKV()).layer_slots(20, 10, TWO) == (30, 30)
    pyramid = jaxkv.PyramidKV(window_size=2, beta=4)
    low, high = Options(budget=12, prefill=pyramid).layer_slots(99, 10, TWO)
    assert low > high >= 12 + 10
    even = Options(budget=12, prefill=jaxkv.SnapKV())
    assert even.layer_slots(99, 10, TWO) == (12 + 10,) * 2


def test_arguments_are_described_with_the_fields_of_policies():
    told = described({"budget": 9, "decode": jaxkv.StreamingLLM(n_sink=2)})
    assert told == {"budget": 9, "decode": {"name": "StreamingLLM", "n_sink": 2}}
