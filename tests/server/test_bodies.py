"""Bodies that are wrong are told where and how, by the type that was meant."""

import json

import pytest

pytest.importorskip("starlette")

from jaxkv.server import bodies
from jaxkv.server.refusals import Refusal

ASKED = {"model": "m", "prompt": "x"}
CASES = {
    "stop.0: String should have at least 1 character": {"stop": [""]},
    "stop: String should have at least 1 character": {"stop": ""},
    "stop: List should have at most 16 items": {"stop": ["a"] * 17},
    "stop.1: Input should be a valid string": {"stop": ["a", 5]},
    "prompt.0.1: Input should be a valid integer": {"prompt": [[1, "a"]]},
    "prompt.2: Input should be a valid integer": {"prompt": [1, 2, 2.5]},
    "prompt.1: Input should be a valid string": {"prompt": ["a", 5]},
    "stream_options.include_usage: Input should be a valid boolean": {
        "stream_options": {"include_usage": 5}
    },
}


@pytest.mark.parametrize("said", CASES)
def test_the_type_that_was_meant_says_what_is_wrong(said):
    with pytest.raises(Refusal) as refused:
        bodies.parse(bodies.Completion, json.dumps(ASKED | CASES[said]).encode())
    assert refused.value.args[0].startswith(said)


def test_what_is_missing_is_named():
    with pytest.raises(Refusal, match="prompt: Field required"):
        bodies.parse(bodies.Completion, b'{"model": "m"}')
    message = {"model": "m", "messages": [{"role": "user"}]}
    with pytest.raises(Refusal, match=r"messages\.0\.content: Field required"):
        bodies.parse(bodies.Chat, json.dumps(message).encode())
