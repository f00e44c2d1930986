"""The folder of results: what it refuses, what it mends, and that it loses nothing."""

import errno
import io

import pytest
import yaml

from jaxkv.evaluation import folder
from jaxkv.evaluation.folder import Predictions
from jaxkv.evaluation.rows import COLUMNS

CONFIG = {"kind": "ruler", "model": "tiny", "dtype": "float32", "seed": 5}
CONFIG |= {"cells": [(1, 2)], "methods": []}


def row(index, prediction='a\nb,"c" é'):
    values = dict.fromkeys(COLUMNS, 1) | {"depth": "", "prediction": prediction}
    return values | {"index": index}


def test_a_folder_can_be_gone_on_with(tmp_path):
    first = Predictions(tmp_path, CONFIG)
    first.append([row(0), row(1)])
    second = Predictions(tmp_path, CONFIG)
    assert second.done == first.done and len(second.done) == 2
    second.append([row(2)])
    rows = folder.read(tmp_path).rows
    assert [r["index"] for r in rows] == ["0", "1", "2"]
    assert rows[0]["prediction"] == row(0)["prediction"]
    assert folder.read_config(tmp_path)["cells"] == [[1, 2]]


@pytest.mark.parametrize("lost", [1, 2, 5, 9, 12, 20])
def test_a_row_that_was_not_finished_is_set_aside(tmp_path, lost):
    Predictions(tmp_path, CONFIG).append([row(0), row(1)])
    path = tmp_path / "predictions.csv"
    path.write_bytes(path.read_bytes()[:-lost])
    again = Predictions(tmp_path, CONFIG)
    assert {key[-1] for key in again.done} == {"0"}
    assert "row 2 (line" in again.mended
    again.append([row(1)])
    assert [r["index"] for r in folder.read(tmp_path).rows] == ["0", "1"]
    assert (tmp_path / folder.DAMAGED).exists()


def test_damaged_and_repeated_rows_are_mended_and_nothing_is_lost(tmp_path):
    Predictions(tmp_path, CONFIG).append([row(0), row(1), row(2), row(1)])
    path = tmp_path / "predictions.csv"
    text = path.read_bytes().replace(b"1,,0,1,", b"1,,\xff,1,")
    path.write_bytes(text)
    again = Predictions(tmp_path, CONFIG)
    assert {key[-1] for key in again.done} == {"1", "2"}
    assert again.mended == (
        f"{path}: row 1 (lines 2 to 3) is damaged, and 1 row is there more than once; "
        "mended, what was damaged now lies in predictions.damaged.csv and is asked "
        "again."
    )
    set_aside = (tmp_path / folder.DAMAGED).read_bytes()
    assert set_aside.startswith(b"1,1,1,1,1,,\xff,1,") and set_aside.count(b"\n") == 2
    assert folder.read(tmp_path).sound
    mended = path.stat().st_mtime_ns
    assert Predictions(tmp_path, CONFIG).mended == ""
    assert path.stat().st_mtime_ns == mended  # what is sound is not written again


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    first = Predictions(tmp_path, CONFIG)
    first.append([row(0)])
    before = (tmp_path / "predictions.csv").read_bytes()

    written = []

    class Full(io.FileIO):
        def write(self, content):
            if written:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(super().write(content[:20]))
            return written[0]

    def small(path, *_, **__):
        return Full(path, "r+b")

    monkeypatch.setattr(folder, "open", small, raising=False)
    message = r"No space left on device: '.*predictions\.csv'"
    with pytest.raises(OSError, match=message):
        first.append([row(1)])
    assert (tmp_path / "predictions.csv").read_bytes() == before
    assert len(first.done) == 1
    monkeypatch.undo()
    first.append([row(1)])
    assert [r["index"] for r in folder.read(tmp_path).rows] == ["0", "1"]
    (tmp_path / "predictions.csv").unlink()  # by somebody, meanwhile
    with pytest.raises(FileNotFoundError, match=r"predictions\.csv"):
        first.append([row(2)])


def test_what_is_made_of_predictions_goes_when_there_are_more(tmp_path):
    """A killed run leaves no numbers and no pictures of fewer predictions."""
    made = [tmp_path / "metrics.json", tmp_path / "pictures" / "budgets.png"]
    made += [tmp_path / "pictures" / "heatmap__a__6pct.csv"]
    others = [tmp_path / "pictures" / "mine.png", tmp_path / "notes.txt"]
    left = tmp_path / "metrics.json.77-0123abcd.partial"
    (tmp_path / "pictures").mkdir()
    for path in (*made, *others, left):
        path.touch()
    predictions = Predictions(tmp_path, CONFIG)
    assert not left.exists()
    assert all(path.exists() for path in (*made, *others))
    predictions.append([row(0)])
    assert not any(path.exists() for path in made)
    assert all(path.exists() for path in others)


def test_a_run_without_results_binds_nobody(tmp_path):
    """As after a mistake in its flags that showed only later."""
    Predictions(tmp_path, CONFIG)
    Predictions(tmp_path, CONFIG | {"seed": 6})
    assert folder.read_config(tmp_path)["seed"] == 6
    (tmp_path / "predictions.csv").unlink()  # now it may be somebody else's
    with pytest.raises(ValueError, match="holds results with seed=6"):
        Predictions(tmp_path, CONFIG)


CELL = {"task": "vt", "length": 300, "depth": None, "questions": 3, "digest": "a" * 32}
WHOLE = CONFIG | {
    "jaxkv": "1.0",
    "weights": "b" * 32,
    "network": "c" * 32,
    "tokenizer": "d" * 32,
    "stop_ids": [1],
    "samples": 3,
    "cells": [CELL],
}
OTHER = {
    "weights": (
        {"weights": "e" * 32},
        r"other weights \(digest bbbbbbbb, .* eeeeeeee\)",
    ),
    "network": ({"network": "e" * 32}, "another network configuration"),
    "tokenizer": ({"tokenizer": None}, r"another tokenizer \(.* this run has none\)"),
    "stop ids": ({"stop_ids": [2]}, r"stop_ids=\[1\], this run has stop_ids=\[2\]"),
    "version": ({"jaxkv": "1.1"}, 'jaxkv="1.0", this run has jaxkv="1.1"'),
    "dtype": ({"dtype": "f16", "weights": "e"}, r'^[^;]*has dtype="f16"; choose'),
    "model": (
        {"model": "m", "weights": "e", "tokenizer": "e", "stop_ids": [], "cells": []},
        r'model="tiny", this run has model="m"',
    ),
    "questions": (
        {"cells": [CELL | {"digest": "e" * 32}]},
        r"other questions in vt at 300 \(3 of digest aaaaaaaa, .* 3 of .* eeeeeeee\)",
    ),
    "a question more": (
        {"cells": [CELL | {"questions": 4, "digest": "e" * 32, "depth": None}]},
        "this run has 4 of digest",
    ),
    "samples": (
        {"samples": 4, "cells": [CELL | {"questions": 4, "digest": "e"}]},
        r"^[^;]*samples=3, this run has samples=4; choose",
    ),
    "cells": ({"cells": [CELL | {"length": 9}]}, r'cells=\[.*"length": 9'),
    "two things": (
        {"weights": "e" * 32, "cells": [CELL | {"digest": "e" * 32}]},
        "other questions in vt at 300 .*; other weights",
    ),
}


@pytest.mark.parametrize("case", OTHER)
def test_what_has_changed_is_named(tmp_path, case):
    Predictions(tmp_path, WHOLE).append([row(0)])
    changed, message = OTHER[case]
    with pytest.raises(ValueError, match=message) as refused:
        Predictions(tmp_path, WHOLE | changed)
    assert str(refused.value).endswith(
        "choose another --out, or bring back what that run had to go on with it."
    )
    assert len(Predictions(tmp_path, WHOLE).done) == 1


def test_what_is_known_of_a_run_is_compared_before_its_questions_are_made(tmp_path):
    Predictions(tmp_path, WHOLE).append([row(0)])
    known = {name: value for name, value in WHOLE.items() if name != "cells"}
    folder.refuse_other(tmp_path, known)
    with pytest.raises(ValueError, match="holds results with other weights"):
        folder.refuse_other(tmp_path, known | {"weights": "e"})


def test_a_folder_without_digests_cannot_be_gone_on_with(tmp_path):
    Predictions(tmp_path, CONFIG).append([row(0)])
    message = "made before jaxkv wrote digests of weights and questions, so nothing"
    with pytest.raises(ValueError, match=message):
        Predictions(tmp_path, WHOLE)


def test_another_experiment_is_refused(tmp_path):
    Predictions(tmp_path, CONFIG).append([row(0)])
    with pytest.raises(ValueError, match="seed=5, this run has seed=6; choose another"):
        Predictions(tmp_path, CONFIG | {"seed": 6})
    (tmp_path / "config.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="it lacks cells, dtype, kind, methods"):
        Predictions(tmp_path, CONFIG)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not valid YAML"):
        Predictions(tmp_path, CONFIG)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"predictions but no config\.yaml"):
        Predictions(tmp_path, CONFIG)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({}))
    (tmp_path / "predictions.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has other columns than method"):
        folder.read(tmp_path)
    (tmp_path / "predictions.csv").write_text('"a')
    with pytest.raises(ValueError, match="has other columns than method"):
        folder.read(tmp_path)


@pytest.mark.parametrize("text", ["[", "{}", "[1]", '{"runs": 1}', '{"runs": [1]}'])
def test_broken_circumstances_are_named(tmp_path, text):
    (tmp_path / "run_meta.json").write_text(text)
    with pytest.raises(ValueError, match=r"run_meta\.json holds no JSON object"):
        folder.begin_run(tmp_path, {})


def test_a_run_is_there_from_its_beginning(tmp_path):
    folder.begin_run(tmp_path, {"n": 1})
    folder.begin_run(tmp_path, {"n": 2})
    folder.end_run(tmp_path, {"n": 3})
    assert folder.run_meta(tmp_path) == {"runs": [{"n": 1}, {"n": 3}]}


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no predictions\.csv"):
        folder.read(tmp_path)
    with pytest.raises(ValueError, match=r"holds no config\.yaml"):
        folder.read_config(tmp_path)


def test_names_of_files():
    assert folder.safe_name("org/model") == "org--model"
    assert folder.safe_name("tova:a=8,b=1") == "tova-a=8-b=1"
    assert folder.safe_name("12.5%") == "12.5pct"
    assert folder.safe_name("::") == "-"
