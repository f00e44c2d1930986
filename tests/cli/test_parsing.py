"""Flags with commas in them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxkv.cli import parsing

TAKES = "--sizes takes numbers such as 1,8;"


@given(st.lists(st.integers(1, 2**40), min_size=1), st.sampled_from([",", ", "]))
def test_what_is_written_is_read(numbers, comma):
    text = comma.join(map(str, numbers))
    assert parsing.numbers(text, TAKES) == numbers
    assert parsing.positive("--sizes", text) == list(dict.fromkeys(numbers))


@pytest.mark.parametrize("text", ["", "1,", "1;2", "1.5", "x"])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(f"{TAKES} got {text!r}.")):
        parsing.numbers(text, TAKES, outside="never")


def test_numbers_out_of_bounds_are_refused():
    bounds = dict(read=float, least=0, most=100)
    assert parsing.numbers("0,100", TAKES, **bounds) == [0, 100]
    for text in ("-1", "50,100.5", "nan"):
        with pytest.raises(ValueError, match=f"too far, got '{text}'"):
            parsing.numbers(text, TAKES, outside="too far,", **bounds)
    with pytest.raises(ValueError, match="--a takes positive numbers with commas, got"):
        parsing.positive("--a", "1,0")


def test_names():
    known = ("a", "b", "c")
    assert parsing.names(None, known) == ["a", "b", "c"]
    assert parsing.names("c, a,c", known) == ["c", "a"]
    with pytest.raises(ValueError, match="unknown task 'd'; choose among a, b, c"):
        parsing.names("a,d", known)
    with pytest.raises(ValueError, match="'d' is none of a, b, c"):
        parsing.names("d", known, "{!r} is none of {}")
