"""`jaxkv eval`: a folder of results is never wrong, and nothing in it is ever lost."""

import csv
import errno
import json
import os
import shutil
import threading

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from jaxkv.cli import evaluate
from jaxkv.cli.progress import shown
from jaxkv.evaluation import digests, folder, sweep
from jaxkv.evaluation.lock import one_writer
from jaxkv.soundness import LogitsError

COUNT = 6
FLAGS = ["--methods=full", "--batch-size=2", "--max-new-tokens=8", "--no-pictures"]


def write_questions(path, gold="7123", count=COUNT, **more):
    records = [
        {"input": f"The number of cat-{i} is 7123{i}. What is it?", "outputs": [gold]}
        | {name: value(i) for name, value in more.items()}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def place(tmp_path, tiny, reader):
    """A folder with questions, a model, and results of a run."""
    shutil.copytree(tiny, tmp_path / "model")
    write_questions(tmp_path / "q.jsonl")
    return tmp_path


@pytest.fixture
def run(place, jaxkv_):
    """Return a function that runs the command, and its arguments."""
    arguments = ["eval", place / "model", "--task-file", place / "q.jsonl", *FLAGS]
    arguments += ["--out", place / "r"]
    return lambda *more: jaxkv_(*arguments, *more)


def rows(place):
    with open(place / "r" / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def change_weights(place, change):
    (file,) = (place / "model").glob("*.safetensors")
    tensors = {name: change(name, x) for name, x in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_bit(name, tensor):
    if "norm" in name and tensor.ndim == 1:
        tensor = tensor.copy()
        tensor.view(np.uint8)[0] ^= 1
    return tensor


CHANGES = {
    "gold answers": (
        lambda place: write_questions(place / "q.jsonl", gold="nothing"),
        "other questions in q at",
    ),
    "a line more": (
        lambda place: write_questions(place / "q.jsonl", count=COUNT + 1),
        f"({COUNT} of digest",
    ),
    "a text": (
        lambda place: (place / "q.jsonl").write_text(
            (place / "q.jsonl").read_text().replace("71234", "71239")
        ),
        "other questions in q at",
    ),
    "weights of zero": (
        lambda place: change_weights(place, lambda _, x: np.zeros_like(x)),
        "other weights (digest",
    ),
    "one bit of the weights": (
        lambda place: change_weights(place, one_bit),
        "other weights (digest",
    ),
    "a setting of the network": (
        lambda place: edit_json(place / "model" / "config.json", rms_norm_eps=1e-3),
        "another network configuration (digest",
    ),
    "the tokenizer": (
        lambda place: edit_json(place / "model" / "tokenizer.json", decoder=None),
        "another tokenizer (digest",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_has_changed_behind_a_path_is_named(place, run, reader, case):
    assert run()[0] == 0
    before, calls = (place / "r" / "predictions.csv").read_bytes(), len(reader)
    change, message = CHANGES[case]
    change(place)
    code, out, err = run()
    assert (code, out) == (2, "") and message in err
    assert "choose another --out, or bring back what that run had" in err
    assert err.count("\n") == 1 and len(reader) == calls
    assert (place / "r" / "predictions.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--dtype=bfloat16",
            '--dtype "float32", this run has --dtype "bfloat16"; choose',
        ),
        ("--max-new-tokens=9", "--max-new-tokens 8, this run has --max-new-tokens 9"),
        ("--match=any", 'match="all", this run has match="any"'),
    ],
)
def test_other_flags_are_named(run, flag, message):
    assert run()[0] == 0
    code, _, err = run(flag)
    assert code == 2 and message in err


def test_another_version_is_named(run, monkeypatch):
    assert run()[0] == 0
    monkeypatch.setattr(digests, "__version__", "9.9")
    assert 'this run has jaxkv="9.9"' in run()[2]


def test_a_folder_of_before_digests_is_refused_but_reported(place, run, jaxkv_):
    assert run()[0] == 0
    path = place / "r" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    for name in ("jaxkv", "weights", "network", "tokenizer", "stop_ids"):
        del config[name]
    config["cells"] = []
    path.write_text(yaml.safe_dump(config))
    code, _, err = run()
    assert code == 2 and "made before jaxkv wrote digests of weights" in err
    code, out, err = jaxkv_("eval", "report", place / "r")
    assert (code, err) == (0, "") and "| full | full | 100.0" in out


def test_lengths_of_samples_make_one_table_and_batches(place, run, reader):
    """RULER writes each sample's own count into "length"."""
    write_questions(place / "q.jsonl", length=lambda i: 120 + 7 * i, index=lambda i: i)
    code, out, _ = run()
    assert code == 0 and out.count("### ") == 1
    assert "| full | 100.0 ± 39.0 |" in out and len(reader) == COUNT // 2


def damage(place, number=3):
    path = place / "r" / "predictions.csv"
    pieces = path.read_bytes().split(b"\r\nfull,")
    pieces[number] = pieces[number].rpartition(b",")[0] + b',"a"b'
    path.write_bytes(b"\r\nfull,".join(pieces))
    return path.read_bytes()


def test_a_damaged_row_is_named_kept_and_asked_again(place, run, jaxkv_, reader):
    assert run()[0] == 0
    whole, path = rows(place), place / "r" / "predictions.csv"
    before = damage(place)
    code, out, err = jaxkv_("eval", "report", place / "r")
    assert code == 0 and "row 3 (line 4) is damaged; not counted here" in err
    assert "[5 of 6] |" in out and "**Unfinished: 5 of 6 rows.**" in out
    assert path.read_bytes() == before
    (place / "q.jsonl").rename(place / "gone.jsonl")
    assert run()[0] == 2
    assert path.read_bytes() == before  # nothing has been mended by what did not run
    (place / "gone.jsonl").rename(place / "q.jsonl")
    calls = len(reader)
    code, out, err = run()
    assert code == 0 and "row 3 (line 4) is damaged; mended, what was damaged" in err
    assert "Unfinished" not in out and len(reader) == calls + 1
    assert sorted(map(str, rows(place))) == sorted(map(str, whole))
    assert b'"a"b' in (place / "r" / folder.DAMAGED).read_bytes()


def test_rows_that_two_processes_wrote_count_once(place, run, jaxkv_):
    assert run()[0] == 0
    path = place / "r" / "predictions.csv"
    text = path.read_bytes()
    path.write_bytes(text + text.partition(b"\r\n")[2])
    once = jaxkv_("eval", "report", place / "r")
    assert "6 rows are there more than once; not counted here" in once[2]
    assert "**Unfinished" not in once[1] and "100.0 ± 39.0" in once[1]
    code, out, err = run()
    assert code == 0 and "more than once; mended." in err and "100.0 ± 39.0" in out
    assert path.read_bytes() == text


def test_a_second_writer_is_refused_and_may_look(place, run, jaxkv_, reader):
    assert run()[0] == 0
    (place / "r" / "metrics.json").unlink()
    with one_writer(place / "r"):
        calls = len(reader)
        code, out, err = run()
        assert (code, out) == (2, "") and f"written by process {os.getpid()} on" in err
        assert len(reader) == calls
        code, out, err = jaxkv_("eval", "report", place / "r")
        assert code == 0 and "| full | full | 100.0" in out
        assert "not made anew" in err and f"process {os.getpid()}" in err
        assert not (place / "r" / "metrics.json").exists()
        error = jaxkv_.error("eval", "merge", place / "r", place / "r")
        assert f"written by process {os.getpid()}" in error
    assert jaxkv_("eval", "report", place / "r")[0] == 0
    assert (place / "r" / "metrics.json").exists()


def test_a_folder_that_cannot_be_written_is_reported(place, run, jaxkv_, monkeypatch):
    assert run()[0] == 0

    def write_report(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(place / "r"))

    monkeypatch.setattr(evaluate, "write_report", write_report)
    code, out, err = jaxkv_("eval", "report", place / "r")
    assert code == 0 and "| full | full | 100.0" in out
    assert f"not made anew: {place / 'r'} cannot be written" in err
    error = jaxkv_.error("eval", "report", place / "r", "--pictures")
    assert "Read-only file system" in error


def test_a_disk_that_gets_full_loses_nothing(place, run, monkeypatch):
    fsync, count = os.fsync, [0]

    def full(file):
        if "predictions.csv" in os.readlink(f"/proc/self/fd/{file}"):
            count[0] += 1
            if count[0] == 4:  # the header is the first
                raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(folder.os, "fsync", full)
    code, out, err = run()
    assert (code, out) == (2, "")
    stopped, error = err.splitlines()
    assert stopped == f"jaxkv: stopped; the same command goes on in {place / 'r'}"
    path = place / "r" / "predictions.csv"
    assert error == f"jaxkv: error: {path}: No space left on device"
    assert len(rows(place)) == 4 and not (place / "r" / "metrics.json").exists()
    monkeypatch.undo()


def test_an_unfinished_sweep_says_so_and_how_to_go_on(place, run, jaxkv_, monkeypatch):
    monkeypatch.setattr("sys.orig_argv", ["python", "/x/jaxkv", "eval", "--out", "a b"])
    assert run("--methods=full,streaming-llm", "--budgets=50%", "--seconds=0")[0] == 0
    _, out, _ = jaxkv_("eval", "report", place / "r")
    assert "**Unfinished: 0 of 12 rows.**" in out
    assert "Nothing yet of full, streaming-llm at 50%." in out
    assert "goes on where it stopped: `jaxkv eval --out 'a b'`." in out
    assert "| streaming-llm | [0 of 6] |  |" in out


def test_logits_that_are_no_numbers_are_not_scored(place, run, monkeypatch):
    answer = sweep.generate

    def generate(lm, prompts, **arguments):
        text = lm.tokenizer.decode(prompts[1])
        if "cat-3" in text:
            raise LogitsError({1: 0}, "take bfloat16.")
        return answer(lm, prompts, **arguments)

    monkeypatch.setattr(sweep, "generate", generate)
    code, out, err = run()
    assert (code, out) == (2, "")
    stopped, error = err.splitlines()
    assert "stopped; the same command goes on in" in stopped
    assert "error: full, question 3 of q at" in error and "take bfloat16." in error
    assert [row["index"] for row in rows(place)] == ["0", "1"]


def test_what_does_not_fit_into_the_memory(place, run, monkeypatch):
    answer = sweep.generate

    def generate(lm, prompts, **arguments):
        if len(prompts) > 1 or arguments["budget"]:
            raise MemoryError("RESOURCE_EXHAUSTED")
        return answer(lm, prompts, **arguments)

    monkeypatch.setattr(sweep, "generate", generate)
    code, out, err = run("--methods=full,streaming-llm", "--budgets=50%")
    assert code == 2 and "**Unfinished: 6 of 12 rows.**" in out
    first, *_, last = err.splitlines()
    assert "full, " in first and "out of memory with 2 rows at a time, goes on with 1"
    assert last.startswith("jaxkv: error: out of memory: streaming-llm at 50%, ")
    assert "6 rows could not run, all others have. Lower --batch-size" in last
    assert {row["method"] for row in rows(place)} == {"full"}
    meta = json.loads((place / "r" / "run_meta.json").read_text())
    assert meta["runs"][-1]["complete"] is False
    monkeypatch.setattr(sweep, "generate", answer)
    code, out, _ = run("--methods=full,streaming-llm", "--budgets=50%")
    assert code == 0 and "Unfinished" not in out


def test_a_log_gets_a_line_now_and_then(capsys):
    seen, threads = "", threading.active_count()
    with shown("begins", every=0.001) as show:
        while "jaxkv: 0 min: begins\n" not in seen:
            seen += capsys.readouterr().err
        show("full 300", 2, 9)
        while "jaxkv: 0 min: full 300, 2 of 9\n" not in seen:
            seen += capsys.readouterr().err
    assert threading.active_count() == threads
    capsys.readouterr()
    with shown("begins") as show:
        show("full", 1, 2)
    assert capsys.readouterr().err == ""
