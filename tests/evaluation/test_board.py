"""Results as the public board takes them."""

import csv
import json

import pytest
import yaml

from jaxkv.evaluation.board import export
from jaxkv.evaluation.folder import write_yaml
from jaxkv.evaluation.rows import cut, to_text

METHODS = [
    {"name": "full", "prefill": {"name": "Full"}, "decode": {"name": "Full"}},
    {"name": "streaming-llm", "prefill": {"name": "S"}, "decode": {"name": "Full"}},
]


# The fields that the board's reader must have, and those that it may: it leaves out, in
# silence, folders with others.
NEEDED = {"dataset", "data_dir", "model", "device", "press_name", "compression_ratio"}
KNOWN = NEEDED | {"fraction", "query_aware", "press_init_command", "seed"}


def results(
    folder,
    *,
    budgets=("25%", "64"),
    aware=True,
    kind="ruler",
    rows=2,
    tasks="ab",
    characters=0,
):
    """Write a folder of two tasks with `rows` questions each, the second right."""
    cells = [{"task": t, "length": 4096, "depth": None, "questions": 2} for t in tasks]
    config = {
        **{"kind": kind, "model": "meta/Llama", "dtype": "float32", "seed": 1},
        **{"chat": True, "system": None, "query_aware": aware, "samples": 2},
        **{"methods": METHODS, "budgets": list(budgets), "cells": cells},
        "characters": characters,
    }
    points = [("full", "full", "")]
    points += [("streaming-llm", b, 1000 if "%" in b else int(b)) for b in budgets]
    lines = [
        {
            **{"method": method, "budget": budget, "budget_tokens": tokens},
            **{"task": task, "length": 4096, "depth": "", "index": index},
            **{"score": 0.5 * index, "exact": 0, "prompt_tokens": 4000},
            **{"output_tokens": 3, "truncated": 0, "cache_bytes": 10},
            **{"outputs": cut(json.dumps(["7A", "8"]), characters)},
            **{"prediction": cut(f"it is\n{'67'[index]}\na ", characters)},
        }
        for method, budget, tokens in points
        for task in tasks
        for index in range(rows)
    ]
    folder.mkdir()
    write_yaml(folder / "config.yaml", config)
    (folder / "predictions.csv").write_text(to_text(lines, header=True))
    return folder


def test_a_folder_for_each_method_and_ratio(tmp_path, jaxkv_):
    folder, out = results(tmp_path / "run"), tmp_path / "board"
    code, printed, _ = jaxkv_("eval", "export", "--board", folder, out)
    assert code == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        "ruler__4096__meta--Llama__no_press__0.00__query_aware",
        "ruler__4096__meta--Llama__streaming_llm__0.75__query_aware",
        "ruler__4096__meta--Llama__streaming_llm__0.98__query_aware",
    }
    assert printed.splitlines() == [str(out / name) for name in sorted(names)]
    place = out / "ruler__4096__meta--Llama__streaming_llm__0.75__query_aware"
    with open(place / "predictions.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 and lines[0]["predicted_answer"] == "it is\n6\na "
    assert json.loads(lines[0]["answer"].replace("'", '"')) == ["7A", "8"]
    assert {float(line["compression_ratio"]) for line in lines} == {0.75}
    metrics = json.loads((place / "metrics.json").read_text())
    assert metrics == {task: {"string_match": 25.0} for task in "ab"}
    config = yaml.safe_load((place / "config.yaml").read_text())
    assert config["press_name"] == "streaming_llm" and config["query_aware"] is True
    assert config["compression_ratio"] == 0.75 and config["data_dir"] == 4096
    assert config["press_init_command"].endswith(": streaming-llm")
    assert set(config) >= NEEDED and set(config) <= KNOWN
    own = yaml.safe_load((place / "jaxkv.yaml").read_text())
    assert own["budget"] == "25%" and own["method"]["prefill"] == {"name": "S"}


def test_scores_are_those_of_the_boards_scorer(tmp_path):
    # Half of the wanted strings, once line breaks are out; one of them will do in "qa".
    folder = results(tmp_path / "run", tasks=("vt", "qa_1"))
    for place in export(folder, tmp_path / "board"):
        metrics = json.loads((place / "metrics.json").read_text())
        assert metrics == {"vt": {"string_match": 25.0}, "qa_1": {"string_match": 50.0}}


def test_the_protocol_is_in_the_name(tmp_path):
    folder = results(tmp_path / "run", budgets=("12.5%",), aware=False)
    places = export(folder, tmp_path / "board", length=8192, model="me/mine")
    assert [place.name for place in places] == [
        "ruler__8192__me--mine__no_press__0.00",
        "ruler__8192__me--mine__streaming_llm__0.88",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rows=1), "is unfinished: 6 of 12 rows; run it to its end first"),
        (dict(kind="niah"), "is of the kind 'niah'; the board takes RULER's"),
        (dict(kind="file"), "pass --length, such as 4096"),
        (dict(characters=10), "outputs that were cut at 10 .* with --characters 0"),
        (dict(characters=9), "outputs that were cut at 9 .* with --characters 0"),
        (dict(aware=False), "the budget 64 is a number of tokens, but the board"),
    ],
)
def test_what_the_board_does_not_take(tmp_path, options, message):
    folder = results(tmp_path / "run", **options)
    with pytest.raises(ValueError, match=message):
        export(folder, tmp_path / "board")


def test_what_was_short_enough_is_whole(tmp_path):
    # `jaxkv eval` keeps 2,000 characters of an output, if nobody says otherwise.
    whole = export(results(tmp_path / "whole"), tmp_path / "a")
    for characters in (12, 2000):
        folder = results(tmp_path / f"run{characters}", characters=characters)
        out = tmp_path / f"board{characters}"
        same = export(folder, out)
        assert [place.name for place in same] == [place.name for place in whole]
        for one, two in zip(whole, same, strict=True):
            name = "predictions.csv"
            assert (one / name).read_bytes() == (two / name).read_bytes()
    folder = results(tmp_path / "said", characters=11)  # what was wanted has 11
    file = folder / "predictions.csv"
    file.write_text(file.read_text().replace("a ", "a …"))
    with pytest.raises(ValueError, match="outputs that were cut at 11"):
        export(folder, tmp_path / "c")


def test_results_of_one_name_overwrite_nothing(tmp_path):
    folder = results(tmp_path / "run", budgets=("12%", "12.5%"), aware=False)
    with pytest.raises(
        ValueError, match=r"at 12% .* and .* at 12.5% .* are both ruler"
    ):
        export(folder, tmp_path / "board")
    assert not (tmp_path / "board").exists()


def test_the_board_needs_to_know_the_protocol(tmp_path):
    folder = results(tmp_path / "run")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    del config["query_aware"], config["chat"]
    write_yaml(folder / "config.yaml", config)
    with pytest.raises(ValueError, match=r"config.yaml lacks chat, query_aware; run"):
        export(folder, tmp_path / "board")


def test_there_is_one_form(tmp_path, jaxkv_):
    said = jaxkv_.error("eval", "export", tmp_path, tmp_path / "board")
    assert "knows one form; add --board" in said
