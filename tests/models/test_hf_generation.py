"""The ids that end a text, and the sampling that a checkpoint's makers recommend."""

import json

import pytest
from hf_checkpoints import raises

from jaxkv.models.hf.generation import drawing, stop_ids


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 9, 5]}, {"eos_token_id": 2}, (5, 9)),
        ({"eos_token_id": 5}, {"eos_token_id": 2}, (5,)),
        ({"eos_token_id": 0}, {"eos_token_id": 2}, (0,)),
        ({"eos_token_id": [5.0, 9]}, {"eos_token_id": 2}, (5, 9)),
        ({"eos_token_id": None}, {"eos_token_id": 2}, (2,)),
        ({}, {"eos_token_id": [2, 3]}, (2, 3)),
        (None, {"eos_token_id": 2}, (2,)),
        (None, {}, ()),
        (None, None, ()),
    ],
)
def test_stop_ids(tmp_path, generation, config, expected):
    for name, content in [("generation_config", generation), ("config", config)]:
        if content is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert stop_ids(tmp_path) == expected


@pytest.mark.parametrize("value", ["</s>", [2, "3"], -1, True, 2.5, 2**31])
def test_stop_ids_refuses(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with raises("eos_token_id must be", repr(value)):
        stop_ids(tmp_path)


GREEDY = {"temperature": 0.0, "repetition_penalty": 1.0}
DRAWN = {"temperature": 1.0, "top_k": 50}


@pytest.mark.parametrize(
    ("config", "named", "others"),
    [
        ({}, GREEDY, {}),
        (
            {"eos_token_id": 2, "max_new_tokens": 9, "transformers_version": "5"},
            GREEDY,
            {},
        ),
        ({"temperature": 0.6, "top_p": 0.9}, GREEDY, {}),  # not asked to draw
        ({"do_sample": False, "temperature": 0.6}, GREEDY, {}),
        ({"repetition_penalty": 1.1}, GREEDY | {"repetition_penalty": 1.1}, {}),
        ({"do_sample": True}, DRAWN, {}),
        (
            dict(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, min_p=0),
            dict(temperature=0.7, top_p=0.8, top_k=20, min_p=0),
            {},
        ),
        ({"do_sample": True, "temperature": None, "top_k": None}, DRAWN, {}),
        ({"do_sample": True, "top_k": 20.0}, DRAWN | {"top_k": 20}, {}),
        ({"do_sample": True, "temperature": 0}, DRAWN | {"temperature": 0}, {}),
        (
            {"num_beams": 4, "no_repeat_ngram_size": 3, "typical_p": 0.9, "new": 1},
            GREEDY,
            {"num_beams": 4, "no_repeat_ngram_size": 3, "typical_p": 0.9, "new": 1},
        ),
        (
            {"num_beams": 1, "no_repeat_ngram_size": 0, "typical_p": 1.0, "x": False},
            GREEDY,
            {},
        ),
    ],
)
def test_drawing(tmp_path, config, named, others):
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    found = drawing(tmp_path)
    assert found == (named, others)
    assert all(type(found[0][n]) is type(named[n]) for n in named)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", -1, "at least 0, found -1"),
        ("temperature", "0.6", "found '0.6'"),
        ("temperature", True, "found True"),
        ("temperature", float("nan"), "found nan"),
        ("top_k", 2.5, "whole number of at least 0, found 2.5"),
        ("top_k", -1, "found -1"),
        ("top_p", 0, "above 0 and at most 1, found 0"),
        ("top_p", 1.5, "found 1.5"),
        ("min_p", 2, "at least 0 and at most 1, found 2"),
        ("repetition_penalty", 0, "above 0, found 0"),
    ],
)
def test_drawing_refuses(tmp_path, name, value, words):
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with raises(f"generation_config.json: {name} must be a", words):
        drawing(tmp_path)
