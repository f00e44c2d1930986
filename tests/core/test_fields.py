"""Options of wrong types, wherever they are given."""

import dataclasses
from typing import Any, Union

import numpy as np
import pytest

import jaxkv
from jaxkv import Options, registry
from jaxkv.fields import check_types, words
from jaxkv.speculation.drafters import Aligned, PromptLookup, Tree
from jaxkv.speculation.rules import Conditional, FixedThreshold, TopK

TABLES = {
    "prefill": registry.PREFILL,
    "decode": registry.DECODE,
    "speculate": registry.SPECULATE,
    "accept": registry.ACCEPT,
    "sampler": {"greedy": jaxkv.Greedy, "categorical": jaxkv.Categorical},
}
NAN = float("nan")
WRONG = {
    "prefill": [
        (jaxkv.SnapKV(window_size="8"), "window_size takes a whole number, got '8'"),
        (jaxkv.SnapKV(window_size=2**31), "SnapKV: window_size must be between -2147"),
        (jaxkv.SnapKV(window_size=-(2**31)), "2147483647, got -2147483648"),
        (jaxkv.SnapKV(kernel_size=7.0), "kernel_size takes a whole number, got 7.0"),
        (jaxkv.SnapKV(pooling="mean"), "SnapKV: pooling takes none, max or avg, got"),
        (jaxkv.SnapKV(pooling=["max"]), "takes none, max or avg, got .'max'."),
        (jaxkv.DapQ(n_sink=True), "DapQ: n_sink takes a whole number, got True"),
        (jaxkv.DapQ(fixed_ids=[5]), r"takes a tuple of whole numbers, got \[5\]"),
        (jaxkv.DapQ(fixed_ids=(5, "6")), "takes a tuple of whole numbers, got .5, '6'"),
        (
            jaxkv.DapQ(fixed_ids=(1, 2**40)),
            "fixed_ids must be between .* got 10995",
        ),
        (jaxkv.DapQ(reduction="mean"), "reduction takes sum or max, got 'mean'"),
        (jaxkv.DapQ(content="poem"), "content takes prefix_suffix, .*, got 'poem'"),
        (jaxkv.DapQ(granularity="layer"), "DapQ: granularity takes .*, got 'layer'"),
        (jaxkv.Random(seed=2**63), "Random: seed must be between"),
        (jaxkv.H2O(window_size=1.5), "takes a whole number or none, got 1.5"),
        (jaxkv.ExpectedAttention(epsilon="0"), "epsilon takes a number, got '0'"),
        (jaxkv.ExpectedAttention(epsilon=NAN), "epsilon takes a number, got nan"),
        (jaxkv.ExpectedAttention(epsilon=np.float32(NAN)), "takes a number, got .*nan"),
        (jaxkv.ExpectedAttention(epsilon=2**31), "epsilon must be between"),
    ],
    "decode": [
        (jaxkv.LongFlow(n_recent=0.5), "n_recent takes a whole number, got 0.5"),
        (jaxkv.LongFlow(interval="2"), "interval takes a whole number, got '2'"),
        (jaxkv.LongFlow(interval=np.True_), "interval takes a whole number, got"),
        (jaxkv.LongFlow(interval=np.array(2)), "takes a whole number, got array"),
        (jaxkv.LongFlow(n_sink=np.int64(-(2**63))), "must be between .* got -9223"),
        (jaxkv.LongFlow(shared="no"), "LongFlow: shared takes true or false, got 'no'"),
        (jaxkv.LongFlow(shared=1), "shared takes true or false, got 1"),
        (jaxkv.LongFlow(score="l3"), "takes l1, l2, attention or deletion, got 'l3'"),
        (jaxkv.H2ODecode(n_recent="8"), "H2ODecode: n_recent takes a number, got '8'"),
        (jaxkv.RKV(threshold=None), "RKV: threshold takes a number, got None"),
        (jaxkv.RKV(mix_lambda=1j), "RKV: mix_lambda takes a number, got 1j"),
    ],
    "speculate": [
        (Tree(depth=2.0), "Tree: depth takes a whole number, got 2.0"),
        (Tree(ngram_max="5"), "ngram_max takes a whole number, got '5'"),
        (Tree(break_even="0.2"), "break_even takes a number or auto, got '0.2'"),
        (Tree(break_even=NAN), "break_even takes a number or auto, got nan"),
        (PromptLookup(num_draft_tokens=True), "takes a whole number, got True"),
        (PromptLookup(include_output=None), "takes true or false, got None"),
        (PromptLookup(match="best"), "match takes earliest or latest, got 'best'"),
        (Aligned(sources=1.5), "Aligned: sources takes a whole number, got 1.5"),
        (Aligned(num_main=3.5), "num_main takes a whole number or none, got 3.5"),
    ],
    "accept": [
        (Conditional(form="F5"), "form takes F1, F2, F3 or F4, got 'F5'"),
        (Conditional(alpha="0.1"), "Conditional: alpha takes a number, got '0.1'"),
        (Conditional(beta=NAN), "beta takes a number or none, got nan"),
        (FixedThreshold(threshold="0.1"), "threshold takes a number, got '0.1'"),
        (FixedThreshold(eos_guard=0), "eos_guard takes true or false, got 0"),
        (TopK(k=1.5), "TopK: k takes a whole number, got 1.5"),
        (TopK(k=True), "TopK: k takes a whole number, got True"),
        (TopK(k=2**31), "TopK: k must be between"),
    ],
    "sampler": [
        (jaxkv.Greedy(repetition_penalty=NAN), "penalty takes a number, got nan"),
        (jaxkv.Categorical(temperature="1"), "temperature takes a number, got '1'"),
        (jaxkv.Categorical(top_k=2.5), "Categorical: top_k takes a whole number, got"),
        (jaxkv.Categorical(top_k=2**31), "Categorical: top_k must be between"),
        (jaxkv.Categorical(min_p=None), "Categorical: min_p takes a number, got None"),
    ],
}


@pytest.mark.parametrize(
    ("role", "method", "message"),
    [(role, *case) for role, cases in WRONG.items() for case in cases],
)
@pytest.mark.parametrize("budget", [200, None])
def test_wrong_types_are_refused(role, method, message, budget):
    with pytest.raises(ValueError, match=message):
        Options(budget=budget, **{role: method}).check()


NUMPY = {
    "decode": (jaxkv.LongFlow, dict(n_sink=np.int64(1), shared=np.bool_(True))),
    "prefill": (
        jaxkv.DapQ,
        dict(content="fixed", fixed_ids=(np.int32(4), 5), seed=np.uint8(3)),
    ),
    "sampler": (jaxkv.Categorical, dict(temperature=np.float64(0.5), top_k=np.int8(3))),
}


@pytest.mark.parametrize("role", NUMPY)
def test_numbers_of_numpy_are_taken_as_python_s(role):
    method, given = NUMPY[role]
    options = Options(budget=np.int64(9), **{role: method(**given)})
    options.check()
    found = [options.budget, *(getattr(getattr(options, role), x) for x in given)]
    assert not [x for x in found if isinstance(x, np.generic)]
    assert not isinstance(getattr(options.prefill, "fixed_ids", (0,))[0], np.generic)
    assert getattr(options, role) == method(**given)


@pytest.mark.parametrize("role", WRONG)
def test_generate_refuses_them(tiny_lm, role):
    method, message = WRONG[role][0]
    with pytest.raises(ValueError, match=message):
        jaxkv.generate(tiny_lm, [[3, 4]], budget=200, **{role: method})


@pytest.mark.parametrize("budget", ["5", 2.5, [3], True, 2**31])
def test_wrong_budgets_are_refused(budget):
    with pytest.raises(ValueError, match=r"Options: budget (takes|must be between)"):
        Options(budget=budget).check()


def test_what_is_taken():
    for table in TABLES.values():
        for method in table.values():
            check_types(method())
    Options(
        budget=64,
        prefill=jaxkv.ExpectedAttention(epsilon=1),
        decode=jaxkv.LongFlow(n_recent=np.int32(1), shared=np.True_),
    ).check()
    for policy in (
        jaxkv.SnapKV(window_size=np.int64(4)),
        jaxkv.ExpectedAttention(epsilon=np.float32(0.1)),
        jaxkv.Random(seed=2**40),
        jaxkv.H2O(window_size=None),
        jaxkv.DapQ(content="fixed", fixed_ids=(np.int32(5), 6)),
    ):
        Options(budget=64, prefill=policy).check()
    for policy in (
        jaxkv.RKV(threshold=1, mix_lambda=np.float32(0.5), buffer=8),
        jaxkv.RKV(threshold=float("inf"), buffer=8),  # no two keys are alike
        jaxkv.H2ODecode(n_recent=np.float32(0.5)),
    ):
        Options(budget=64, decode=policy).check()


def test_other_classes_are_left_alone():
    @dataclasses.dataclass(frozen=True)
    class Mine:
        anything: Any = 2**40
        text: str = "x"
        maybe: Union[int, None] = None  # noqa: UP007

    @dataclasses.dataclass(frozen=True)
    class Unknown:
        somewhere: "NotHere" = 2**40  # noqa: F821

    @dataclasses.dataclass(frozen=True)
    class Odd:
        broken: "np.nothing | 'x'" = 2**40  # noqa: F821
        more: "int[3" = 1  # noqa: F722

    @dataclasses.dataclass(frozen=True, eq=False)
    class Later:
        unset: int = dataclasses.field(init=False)

    for options in (Mine(), Unknown(), Odd(), Later(), "no dataclass", None):
        check_types(options)
    with pytest.raises(ValueError, match="maybe takes a whole number or none, got 'x'"):
        check_types(Mine(maybe="x"))


def test_what_cannot_be_hashed_is_refused():
    @dataclasses.dataclass
    class Thawed(jaxkv.KNorm.__base__):
        window: int = 2

    @dataclasses.dataclass(frozen=True)
    class Listed:
        places: Any = ()

    with pytest.raises(
        ValueError, match=r"Thawed .* must be hashable.*frozen dataclas"
    ):
        Options(budget=8, prefill=Thawed()).check()
    with pytest.raises(ValueError, match=r"unhashable type: 'list'.*tuples for lists"):
        check_types(Listed(places=[1]))


def test_hints_in_words():
    assert words(int | float | None) == "a number or none"
    assert words(tuple[float, ...]) == "a tuple of numbers"
    assert words(tuple[bool, ...], a_list="a list of {}") == "a list of truth values"
    assert words(int) == "a whole number"
    assert words(str) == "a text"
    assert words(list) == "a list"
