"""What lm-evaluation-harness says of a generation, without the harness."""

import pytest

from jaxkv import Categorical, Greedy
from jaxkv.evaluation.harness_requests import Wanted, above_0


@pytest.mark.parametrize(
    ("given", "until", "new", "sampler"),
    [
        ({}, (), 9, Greedy()),
        ({"until": "a", "max_gen_toks": 3, "do_sample": False}, ("a",), 3, Greedy()),
        ({"until": ["a", "b"], "temperature": 0.0}, ("a", "b"), 9, Greedy()),
        ({"do_sample": True, "temperature": 0}, (), 9, Greedy()),
        (
            {"temperature": 0.5, "top_k": 4.0},
            (),
            9,
            Categorical(temperature=0.5, top_k=4),
        ),
        ({"do_sample": True, "top_p": 0.9}, (), 9, Categorical(top_p=0.9)),
        ({"do_sample": False, "temperature": 0.7}, (), 9, Greedy()),
        ({"max_new_tokens": "5", "until": None}, (), 5, Greedy()),
        ({"repetition_penalty": 1.5}, (), 9, Greedy(repetition_penalty=1.5)),
    ],
)
def test_arguments_of_a_generation(given, until, new, sampler):
    assert Wanted.read(given, 9) == Wanted(until=until, new=new, sampler=sampler)


def test_an_output_ends_before_the_first_stop_string():
    wanted = Wanted.read({"until": ["\n\n", "Q:"]}, 9)
    assert wanted.cut("one\n Q: two\n\n") == "one\n "
    assert wanted.cut("one\n\n Q: two") == "one"
    assert wanted.cut("one\n") == "one\n" and not wanted.ended("one\n")
    assert wanted.ended("one Q: two")


@pytest.mark.parametrize("value", [0, "-1", 1.5, "many", True])
def test_numbers_are_at_least_1(value):
    with pytest.raises(ValueError, match=r"size must be (at least 1|a whole number)"):
        above_0("size", value)


def test_unknown_arguments_are_named():
    with pytest.raises(ValueError, match="arguments beams, typical are not known here"):
        Wanted.read({"typical": 1, "beams": 2, "num": None}, 9)
