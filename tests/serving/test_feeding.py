"""An engine that is fed: bounded, in order if wanted, and through faults."""

import jax
import pytest
from serving.served import MOST, alone, model, prompt

from jaxkv import Engine
from jaxkv.serving import rows
from jaxkv.serving.feeding import answers


@pytest.fixture(scope="module")
def engine():
    return Engine(model(), rows=2, max_prompt=64, max_new_tokens=MOST, block=4)


def asked(number):
    # The first is long, so that others end before it.
    new = MOST if number % 4 == 0 else 1
    return {"prompt": prompt(number), "seed": number, "max_new_tokens": new}


@pytest.mark.parametrize("ordered", [False, True])
def test_no_more_is_in_hand_than_allowed(engine, ordered):
    taken, given = [], []

    def requests():
        for number in range(12):
            taken.append(number)
            yield number, ValueError("bad") if number == 5 else asked(number)

    for number, outcome in answers(engine, requests(), window=3, ordered=ordered):
        assert len(taken) <= len(given) + 3
        given.append(number)
        if number == 5:
            assert str(outcome) == "bad"
        else:
            tokens = alone(number, "greedy", ())
            assert outcome.tokens == tokens[: len(outcome.tokens)]
    assert sorted(given) == list(range(12))
    assert (given == sorted(given)) == ordered
    assert engine.idle


@pytest.mark.parametrize("faults", [2, 9])
def test_a_device_that_fails_is_asked_again(engine, monkeypatch, faults):
    left, whole = [faults], rows.advance_jit

    def failing(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise jax.errors.JaxRuntimeError("INTERNAL: a fault of a test")
        return whole(*args, **kwargs)

    monkeypatch.setattr(rows, "advance_jit", failing)
    requests = ((number, asked(number)) for number in (0, 4))
    found = answers(engine, requests, window=2, ordered=False)
    if faults == 2:
        assert {o.finish_reason for _, o in found} == {"length"}
    else:
        with pytest.raises(ValueError, match=r"device has failed: .*fault of a test"):
            list(found)
