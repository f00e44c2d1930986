"""What policies refuse: a bound of one option, and options that leave no room."""

import numpy as np
import pytest

from jaxkv import (
    H2O,
    LAQ,
    RKV,
    TOVA,
    VATP,
    AdaKV,
    ChunkKV,
    CriticalKV,
    DapQ,
    DefensiveKV,
    DropKV,
    ExpectedAttention,
    H2ODecode,
    KVzip,
    LagKV,
    LazyEviction,
    LongFlow,
    PyramidKV,
    RandomDecode,
    SnapKV,
    StreamingLLM,
    TriAttention,
)
from jaxkv.fields import check_types

INFINITE, NAN = float("inf"), float("nan")
RECENT = "be a whole number of at least 0 or a number of at least 0 and below 1, got"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (SnapKV(window_size=0), "SnapKV: window_size must be at least 1, got 0."),
        (SnapKV(kernel_size=4), "SnapKV: kernel_size must be odd and at least 1, got"),
        (SnapKV(kernel_size=-1), "kernel_size must be odd and at least 1, got -1"),
        (SnapKV(offset=-1), "SnapKV: offset must be at least 0, got -1"),
        (PyramidKV(beta=0), "PyramidKV: beta must be at least 1"),
        (H2O(window_size=0), "H2O: window_size must be at least 1, got 0"),
        (ExpectedAttention(n_future_positions=0), "at least 1 and at most 65536, got"),
        (ExpectedAttention(n_future_positions=1 << 17), "at most 65536, got 131072"),
        (ExpectedAttention(epsilon=-1.0), "epsilon must be at least 0 and finite"),
        (ExpectedAttention(epsilon=INFINITE), "epsilon must be .* finite, got inf"),
        (DapQ(window_size=0), "DapQ: window_size must be at least 1"),
        (DapQ(prefix=-1), "DapQ: prefix must be at least 0, got -1"),
        (DapQ(fixed_ids=(1, -1)), "DapQ: fixed_ids must be at least 0, got -1"),
        (DapQ(kernel_size=2), "DapQ: kernel_size must be odd"),
        (DapQ(n_sink=-1), "DapQ: n_sink must be at least 0"),
        (DapQ(n_recent=-1), "DapQ: n_recent must be at least 0"),
        (LAQ(window_size=0), "LAQ: window_size must be at least 1"),
        (LAQ(draft_window_size=0), "LAQ: draft_window_size must be at least 1"),
        (LAQ(kernel_size=4), "LAQ: kernel_size must be odd"),
        (LAQ(n_recent=-1), "LAQ: n_recent must be at least 0"),
        (StreamingLLM(n_sink=-1), "StreamingLLM: n_sink must be at least 0, got -1"),
        (LongFlow(interval=0), "LongFlow: interval must be at least 1, got 0"),
        (LongFlow(n_sink=-1), "LongFlow: n_sink must be at least 0, got -1"),
        (LongFlow(n_recent=-1), "LongFlow: n_recent must be at least 0"),
        (H2ODecode(n_recent=-1), f"H2ODecode: n_recent must {RECENT} -1"),
        (H2ODecode(n_recent=1.0), f"n_recent must {RECENT} 1.0"),
        (H2ODecode(n_recent=INFINITE), f"n_recent must {RECENT} inf"),
        (H2ODecode(n_recent=np.float32(1)), f"n_recent must {RECENT} 1.0"),
        (H2ODecode(n_recent=NAN), "n_recent takes a number, got nan"),
        (TriAttention(interval=0), "TriAttention: interval must be at least 1, got 0"),
        (TriAttention(n_recent=-1), "TriAttention: n_recent must be at least 0"),
        (LazyEviction(alpha=0.0), "alpha must be above 0 and below 1, got 0.0"),
        (LazyEviction(window_size=0), "window_size must be at least 1, got 0"),
        (VATP(n_sink=-1), "VATP: n_sink must be at least 0"),
        (VATP(n_recent=1.5), f"VATP: n_recent must {RECENT} 1.5"),
        (RandomDecode(n_sink=-1), "RandomDecode: n_sink must be at least 0"),
        (RandomDecode(n_recent=-1), "RandomDecode: n_recent must be at least 0"),
        (RKV(window_size=0), "RKV: window_size must be at least 1, got 0"),
        (RKV(buffer=0), "RKV: buffer must be at least 1, got 0"),
        (RKV(kernel_size=4), "RKV: kernel_size must be odd and at least 1, got 4"),
        (KVzip(n_sink=-1), "KVzip: n_sink must be at least 0"),
        (KVzip(repeat_ids=(-1,)), "KVzip: repeat_ids must be at least 0, got -1"),
        (DropKV(window_size=0), "DropKV: window_size must be at least 1"),
        (DropKV(kernel_size=2), "DropKV: kernel_size must be odd"),
        (DefensiveKV(mass=1.5), "DefensiveKV: mass must be at least 0 and at most 1"),
        (DefensiveKV(kernel_size=2), "DefensiveKV: kernel_size must be odd"),
        (LagKV(lag_size=1), "LagKV: lag_size must be at least 2, got 1"),
        (LagKV(n_sink=-1), "LagKV: n_sink must be at least 0"),
        (TOVA(n_recent=-1), "TOVA: n_recent must be at least 0"),
        (ChunkKV(chunk_length=0), "ChunkKV: chunk_length must be at least 1, got 0"),
        (CriticalKV(epsilon=-1.0), "CriticalKV: epsilon must be at least 0 and finite"),
        (CriticalKV(first_stage=1.5), "first_stage must be at least 0 and at most 1"),
        (AdaKV(safeguard=-0.5), "AdaKV: safeguard must be at least 0 and at most 1"),
        (AdaKV(most=0.5), "AdaKV: most must be at least 1 and finite, got 0.5"),
        (AdaKV(most=INFINITE), "AdaKV: most must be at least 1 and finite, got inf"),
        (RKV(mix_lambda=1.5), "RKV: mix_lambda must be at least 0 and at most 1, got"),
    ],
)
def test_bounds(policy, message):
    with pytest.raises(ValueError, match=message):
        check_types(policy)


def test_bounds_themselves_are_taken():
    for policy in (
        SnapKV(window_size=1, kernel_size=1, offset=0),
        H2O(window_size=None),
        H2ODecode(n_recent=1),
        H2ODecode(n_recent=0.0),
        RKV(mix_lambda=1),
        ExpectedAttention(n_future_positions=65536, epsilon=0),
    ):
        check_types(policy)


@pytest.mark.parametrize(
    ("policy", "budget", "message"),
    [
        (SnapKV(window_size=8), 1, "SnapKV: budget=1 leaves no slot beside its win"),
        (PyramidKV(window_size=8), 1, "PyramidKV: budget=1 leaves no slot"),
        (H2O(window_size=8), 1, "H2O: budget=1 leaves no slot"),
        (H2O(window_size=None), 1, "H2O: budget=1 leaves no slot"),
        (ExpectedAttention(n_sink=8), 8, "leaves no slot .* n_sink=8"),
        (
            DapQ(window_size=8, prefix=9),
            8,
            "prefix=9 must lie between 0 and window_size=8",
        ),
        (DapQ(content="fixed"), 8, 'content="fixed" needs fixed_ids'),
        (DapQ(n_sink=4, n_recent=4), 8, "n_sink=4 and n_recent=4 keeps anyway"),
        (KVzip(), 4, "KVzip: budget=4 leaves no slot .* n_sink=4"),
        (DropKV(), 1, "DropKV: budget=1 leaves no slot"),
        (DefensiveKV(), 1, "DefensiveKV: budget=1 leaves no slot"),
        (LagKV(), 4, "LagKV: budget=4 leaves no slot .* n_sink=4"),
        (TOVA.kvpress(), 1, "TOVA: budget=1 leaves no slot .* n_recent=1"),
        (LAQ(), 1, "LAQ: budget=1 leaves no slot"),
        (LAQ(n_recent=64), 64, "LAQ: budget=64 leaves no slot"),
        (StreamingLLM(), 4, "StreamingLLM: budget=4 leaves no slot beside n_sink=4"),
        (LongFlow(n_sink=9, n_recent=8), 16, "use a budget of at least 18"),
        (LongFlow(interval=17), 16, "use a budget of at least 17"),
        (H2ODecode(n_recent=16), 16, "use a budget of at least 17"),
        (VATP(), 16, "20 sinks, 8 recent tokens and 1 to evict"),
        (RandomDecode(n_recent=16), 16, "RandomDecode: budget=16 is too small"),
        (TriAttention(), 16, "TriAttention: budget=16 is too small"),
        (RKV(), 16, "RKV: budget=16 is too small"),
    ],
)
def test_options_that_leave_no_room(policy, budget, message):
    check_types(policy)
    with pytest.raises(ValueError, match=message):
        policy.check(budget)
