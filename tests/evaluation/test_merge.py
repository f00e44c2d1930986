"""`jaxkv eval merge`: one table from runs of several processes."""

import json

import pytest

from jaxkv.evaluation import folder
from jaxkv.evaluation.folder import (
    Predictions,
    begin_run,
    merge_folders,
    read,
    read_config,
    write_yaml,
)
from jaxkv.evaluation.rows import COLUMNS


def make(place, methods, indices, **changes):
    config = {
        "kind": "ruler",
        "model": "tiny",
        "dtype": "float32",
        "seed": 1,
        "methods": [{"name": name} for name in methods],
        "cells": [{"task": "vt", "length": 64, "depth": None}],
    } | changes
    rows = [
        dict.fromkeys(COLUMNS, "0")
        | dict(method=name, budget="8", task="vt", length=64, depth="", index=i)
        | dict(score=0.5)
        for name in methods
        for i in indices
    ]
    Predictions(place, config).append(rows)
    begin_run(place, {"command": methods[0]})
    return place


def test_rows_methods_cells_and_runs_come_together(jaxkv_, tmp_path):
    one = make(tmp_path / "one", ["full", "snapkv"], [0, 1])
    two = make(tmp_path / "two", ["dapq"], [0, 1, 2])
    longer = [{"task": "vt", "length": 128, "depth": None}]
    three = make(tmp_path / "three", ["dapq"], [2, 3], cells=longer)
    code, out, _ = jaxkv_("eval", "merge", tmp_path / "all", one, two, three)
    assert code == 0 and "| dapq | 8 |" in out
    rows = read(tmp_path / "all").rows
    assert [(row["method"], row["index"]) for row in rows] == [
        *[("full", "0"), ("full", "1"), ("snapkv", "0"), ("snapkv", "1")],
        *[("dapq", str(i)) for i in range(4)],
    ]
    config = read_config(tmp_path / "all")
    assert [m["name"] for m in config["methods"]] == ["full", "snapkv", "dapq"]
    assert [c["length"] for c in config["cells"]] == [64, 128]
    meta = json.loads((tmp_path / "all" / "run_meta.json").read_text())
    assert [run["command"] for run in meta["runs"]] == ["full", "dapq", "dapq"]
    assert (tmp_path / "all" / "metrics.json").is_file()
    # An experiment that may go on.
    assert Predictions(tmp_path / "all", config).done


def test_budgets_come_together(jaxkv_, tmp_path):
    one = make(tmp_path / "one", ["full"], [0], budgets=["50%", "20%"])
    two = make(tmp_path / "two", ["dapq"], [0], budgets=["20%", "35%"])
    none = make(tmp_path / "none", ["dapq"], [0])
    assert jaxkv_("eval", "merge", tmp_path / "all", one, two)[0] == 0
    config = read_config(tmp_path / "all")
    assert config["budgets"] == ["50%", "20%", "35%"]
    error = jaxkv_.error("eval", "merge", tmp_path / "other", one, none)
    assert "has budgets=null" in error


def test_refusals(jaxkv_, tmp_path):
    one = make(tmp_path / "one", ["full"], [0])
    other = make(tmp_path / "two", ["dapq"], [0], seed=2)
    error = jaxkv_.error("eval", "merge", tmp_path / "all", one, other)
    assert "seed=2" in error and "only runs of one experiment can be merged" in error
    assert not (tmp_path / "all").exists()
    error = jaxkv_.error("eval", "merge", one, one)
    assert "holds results already; choose another folder" in error
    error = jaxkv_.error("eval", "merge", tmp_path / "all", tmp_path)
    assert "holds no config.yaml" in error
    with pytest.raises(ValueError, match="holds results already"):
        merge_folders(one, [other])


@pytest.mark.parametrize("name", ["methods", "cells"])
def test_a_configuration_without_lists_is_named(jaxkv_, tmp_path, name):
    one = make(tmp_path / "one", ["full"], [0])
    config = read_config(one)
    write_yaml(one / "config.yaml", config | {name: None})
    error = jaxkv_.error("eval", "merge", tmp_path / "all", one)
    assert f"config.yaml: {name} must be a list, got null" in error
    with pytest.raises(ValueError, match=f"{name} must be a list"):
        read_config(one)


def test_a_configuration_with_a_date_is_another(jaxkv_, tmp_path):
    one = make(tmp_path / "one", ["full"], [0])
    two = make(tmp_path / "two", ["dapq"], [0])
    with open(two / "config.yaml", "a", encoding="utf-8") as file:
        file.write("when: 2020-01-01\n")
    error = jaxkv_.error("eval", "merge", tmp_path / "all", one, two)
    assert 'has when="2020-01-01"' in error


def test_other_questions_are_refused(jaxkv_, tmp_path):
    cell = {"task": "vt", "length": 64, "depth": None, "questions": 1, "digest": "a"}
    one = make(tmp_path / "one", ["full"], [0], cells=[cell])
    two = make(tmp_path / "two", ["dapq"], [0], cells=[cell | {"digest": "b"}])
    error = jaxkv_.error("eval", "merge", tmp_path / "all", one, two)
    assert f"{two} asks other questions of vt at 64 than {one}" in error


def test_a_damaged_part_is_merged_without_what_is_damaged(jaxkv_, tmp_path):
    one = make(tmp_path / "one", ["full"], [0, 1, 2])
    two = make(tmp_path / "two", ["dapq"], [0, 1, 2])
    path = one / "predictions.csv"
    before = path.read_bytes().replace(b",1,0.5,", b",1,x,")
    path.write_bytes(before)
    code, out, err = jaxkv_("eval", "merge", tmp_path / "all", one, two)
    assert code == 0 and path.read_bytes() == before
    assert err == f"jaxkv: {path}: row 2 (line 3) is damaged; left out.\n"
    assert len(read(tmp_path / "all").rows) == 5
    assert "**Unfinished: 5 of 6 rows.**" in out


def test_a_merge_that_was_stopped_can_be_done_again(jaxkv_, tmp_path, monkeypatch):
    one = make(tmp_path / "one", ["full"], [0])
    two = make(tmp_path / "two", ["dapq"], [0])
    written = []

    def stop(path, content):
        written.append(path.name)
        if path.name == "predictions.csv":
            raise KeyboardInterrupt
        ours(path, content)

    ours = folder.write_whole
    monkeypatch.setattr(folder, "write_whole", stop)
    assert jaxkv_("eval", "merge", tmp_path / "all", one, two)[0] == 130
    assert written[-1] == "predictions.csv"
    error = jaxkv_.error("eval", "report", tmp_path / "all")
    assert "holds no predictions.csv" in error
    monkeypatch.undo()
    assert jaxkv_("eval", "merge", tmp_path / "all", one, two)[0] == 0
