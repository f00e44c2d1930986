"""`jaxkv eval niah|ruler|reasoning|file|report`: from flags to a folder of results."""

import csv
import json

import pytest
import yaml

import jaxkv
from jaxkv import figures
from jaxkv.cli import evaluate
from jaxkv.evaluation import folder as results
from jaxkv.evaluation import sweep
from jaxkv.evaluation.questions import REPORT_SEED, Cell, draw_questions
from jaxkv.registry import PREFILL
from jaxkv.text.planning import row_budgets

RULER = ["eval", "ruler", "--tasks=vt,niah_single_1", "--lengths=300", "--samples=3"]
TWO = "--methods=full,streaming-llm"
FILES = {"config.yaml", "metrics.json", "predictions.csv", "run_meta.json"}


def read(folder):
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.slow
def test_ruler_with_the_real_model(jaxkv_, tiny, tiny_lm, tmp_path):
    flags = ["--methods=streaming-llm:n_sink=2", "--budgets=10%", "--tasks=vt"]
    code, out, err = jaxkv_(*RULER, tiny, *flags, "--batch-size=2", "--out", tmp_path)
    assert code == 0 and "| streaming-llm:n_sink=2 | 10% |" in out
    assert "prefill=xla" in err and str(tmp_path) in err
    rows = read(tmp_path)
    assert [row["index"] for row in rows] == ["0", "1", "2"]
    cells = [Cell(task="vt", length=300)]
    questions = draw_questions(tiny_lm, cells, samples=2, seed=REPORT_SEED)
    want = jaxkv.generate(
        tiny_lm,
        [question.ids for question in questions],  # the first batch
        budget=30,
        prefill=jaxkv.StreamingLLM(n_sink=2),
        max_new_tokens=int(rows[0]["output_tokens"]),
    )
    assert tuple(row["prediction"] for row in rows[:2]) == want.text
    assert rows[0]["budget_tokens"] == "30"
    (meta,) = json.loads((tmp_path / "run_meta.json").read_text())["runs"]
    assert {"commit", "device", "seconds", "peak_bytes", "versions"} <= set(meta)


def test_ruler_table_and_report(jaxkv_, tiny, tmp_path, reader):
    out = tmp_path / "out"
    flags = [TWO, "--budgets=25%,200", "--batch-size=4", "--no-pictures"]
    code, text, _ = jaxkv_(*RULER, tiny, *flags, "--out", out)
    assert code == 0 and {path.name for path in out.iterdir()} == FILES
    rows = read(out)
    assert len(rows) == 2 * 3 * (1 + 2)
    found = {(r["method"], r["budget"], r["length"]): r for r in metrics(out)["macro"]}
    assert found["full", "full", 300]["score"] == 1
    # An answer is right if the needle stands among the last tokens, which are kept.
    some = [found["streaming-llm", budget, 300]["score"] for budget in ("25%", "200")]
    assert some[0] < some[1] < 1
    assert len({call["max_new_tokens"] for call in reader}) == 1
    assert yaml.safe_load((out / "config.yaml").read_text())["seed"] == 2_000_003
    code, again, _ = jaxkv_("eval", "report", out, "--baseline", "full")
    assert code == 0 and "### 300 tokens" in text
    assert again.startswith(text.rstrip("\n").partition("By task")[0][:200])
    error = jaxkv_.error("eval", "report", out, "--baseline", "magic")
    assert "no results of a method 'magic'" in error


def test_ruler_compares_all_methods_by_default(jaxkv_, tiny, tmp_path, reader):
    flags = ["--budgets=10%,30%", "--samples=1", "--no-pictures", "--out", tmp_path]
    assert jaxkv_(*RULER, tiny, *flags)[0] == 0
    assert {row["method"] for row in read(tmp_path)} == set(PREFILL)
    # All budgets of a method share its program.
    for call in reader:
        assert call["budget"] == (None if call["prefill"] == jaxkv.Full() else [30, 90])


def test_a_run_is_gone_on_with_where_it_ended(jaxkv_, tiny, tmp_path, reader):
    flags = [*RULER, tiny, TWO, "--budgets=10%,20%,40%", "--batch-size=2"]
    flags += ["--no-pictures", "--out", tmp_path]
    code, _, err = jaxkv_(*flags, "--seconds=0")
    assert code == 0 and "--seconds is over" in err and not reader
    assert (
        json.loads((tmp_path / "run_meta.json").read_text())["runs"][0]["complete"]
        is False
    )
    assert jaxkv_(*flags)[0] == 0
    calls, rows = len(reader), read(tmp_path)
    assert calls > 3
    path = tmp_path / "predictions.csv"
    text = path.read_bytes()
    path.write_bytes(text[: len(text) * 2 // 3])
    kept = len(results.read(tmp_path).rows)
    assert 0 < kept < len(rows)
    assert jaxkv_(*flags)[0] == 0
    missing = len(rows) - kept
    assert missing / 2 <= len(reader) - calls < missing
    again = read(tmp_path)
    assert sorted(map(str, again)) == sorted(map(str, rows))
    runs = json.loads((tmp_path / "run_meta.json").read_text())["runs"]
    assert [run["complete"] for run in runs] == [False, True, True]
    assert "samples=3, this run has samples=4" in jaxkv_.error(*flags, "--samples=4")
    assert jaxkv_(*flags)[0] == 0
    assert missing / 2 <= len(reader) - calls < missing


def test_an_interrupt_keeps_what_is_there(jaxkv_, tiny, tmp_path, reader, monkeypatch):
    answer = sweep.generate

    def generate(*arguments, **options):
        if len(reader) == 2:
            raise KeyboardInterrupt
        return answer(*arguments, **options)

    monkeypatch.setattr(sweep, "generate", generate)
    flags = [*RULER, tiny, TWO, "--budgets=10%", "--batch-size=2", "--no-pictures"]
    code, out, err = jaxkv_(*flags, "--out", tmp_path)
    assert (code, out) == (130, "") and len(read(tmp_path)) == 4
    assert err == f"jaxkv: interrupted; the same command goes on in {tmp_path}\n"


CARD = ["eval", "card", "--tasks=vt,ledger", "--lengths=300", "--answers=100"]
CARD += ["--samples=3", "--batch-size=2"]
SNAPKV = ["--prefill=snapkv:window_size=4", "--compression-ratio=0.3"]


def test_a_card_is_gone_on_with_reported_and_merged(jaxkv_, tiny, tmp_path, reader):
    one, two = tmp_path / "one", tmp_path / "two"
    code, text, _ = jaxkv_(*CARD, tiny, "--out", one)
    assert code == 0 and "### full\n" in text
    rows, calls = read(one), len(reader)
    path = one / "predictions.csv"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    missing = len(rows) - len(results.read(one).rows)
    assert 0 < missing < len(rows)
    assert jaxkv_(*CARD, tiny, "--out", one)[:2] == (0, text)
    assert 0 < len(reader) - calls <= missing
    assert sorted(map(str, read(one))) == sorted(map(str, rows))
    error = jaxkv_.error(*CARD, tiny, "--samples=4", "--out", one)
    assert "samples=3, this run has samples=4; choose another --out" in error
    assert jaxkv_("eval", "report", one)[:2] == (0, text)
    assert "leave --baseline out" in jaxkv_.error(
        "eval", "report", one, "--baseline=full"
    )
    assert jaxkv_(*CARD, tiny, *SNAPKV, "--out", two)[0] == 0
    code, text, _ = jaxkv_("eval", "merge", tmp_path / "both", one, two)
    assert code == 0 and "### snapkv:window_size=4 at 70%\n" in text
    assert text.count("| vt | 300 |") == 2 == text.count("| ledger | 100 |")


def test_a_card_s_ratio_is_of_each_prompt(jaxkv_, tiny, tmp_path, reader):
    assert jaxkv_(*CARD, tiny, *SNAPKV, "--out", tmp_path)[0] == 0
    rows = read(tmp_path)
    lengths = [int(row["prompt_tokens"]) for row in rows]
    assert len(set(lengths)) > 2
    kept = row_budgets(None, 0.3, [[0] * length for length in lengths], evicts=False)
    assert [int(row["budget_tokens"]) for row in rows] == list(kept)


def test_an_interrupted_card_promises_nothing(jaxkv_, tiny, monkeypatch):
    def generate(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "generate", generate)
    assert jaxkv_(*CARD, tiny) == (130, "", "")


def test_niah_grid(jaxkv_, tiny, tmp_path, reader):
    flags = ["--lengths=300,500", "--depths=0,50,100", "--samples=2", "--budgets=20%"]
    flags += ["--out", tmp_path, "--no-pictures", "--json", "--development"]
    code, out, _ = jaxkv_("eval", "niah", tiny, *flags)
    printed = json.loads(out)
    assert code == 0 and printed["cells"] == metrics(tmp_path)["cells"]
    scores = {
        (c["method"], c["length"], c["depth"]): c["score"] for c in printed["cells"]
    }
    assert len(scores) == 12
    for length in (300, 500):
        assert scores["full", length, 0.0] == scores["full", length, 1.0] == 1
        assert scores["streaming-llm", length, 0.0] == 0
        assert scores["streaming-llm", length, 1.0] == 1
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {
        "heatmap__full__full.csv",
        "heatmap__streaming-llm__20pct.csv",
    }
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 1_000_003


def test_pictures_are_drawn_where_matplotlib_is(jaxkv_, tiny, tmp_path, reader):
    pytest.importorskip("matplotlib")
    flags = ["--lengths=300", "--depths=0,100", "--samples=1", "--budgets=20%"]
    assert jaxkv_("eval", "niah", tiny, *flags, "--out", tmp_path / "a")[0] == 0
    assert len(list((tmp_path / "a" / "pictures").iterdir())) == 2 * 3
    flags = [*RULER, tiny, TWO, "--budgets=20%", "--out", tmp_path / "b"]
    assert jaxkv_(*flags)[0] == 0
    names = {path.name for path in (tmp_path / "b" / "pictures").iterdir()}
    assert names == {"budgets.png", "budgets.svg"}


def test_without_matplotlib_one_line_says_so(
    jaxkv_, tiny, tmp_path, reader, monkeypatch
):
    monkeypatch.setattr(figures, "available", lambda: False)
    flags = [*RULER, tiny, TWO, "--budgets=20%", "--out", tmp_path]
    code, _, err = jaxkv_(*flags)
    assert code == 0 and "no pictures without matplotlib; pip install" in err
    assert "need matplotlib" in jaxkv_.error(*flags, "--pictures")
    assert "need matplotlib" in jaxkv_.error("eval", "report", tmp_path, "--pictures")


def test_reasoning(jaxkv_, tiny, tmp_path, reader):
    flags = ["--lengths=100", "--samples=2", "--budgets=50%", "--no-pictures"]
    code, out, _ = jaxkv_("eval", "reasoning", tiny, *flags, "--out", tmp_path)
    assert code == 0 and "Whole answers right" in out and "100 tokens of answer" in out
    rows = read(tmp_path)
    assert {row["task"] for row in rows} == {"ledger", "machine"}
    for row in rows:
        whole = int(row["prompt_tokens"]) + 100
        if row["method"] != "full":
            assert 0.4 * whole < int(row["budget_tokens"]) < 0.6 * whole
    policies = {(call["prefill"], call["decode"]) for call in reader}
    assert policies == {
        (jaxkv.Full(), jaxkv.Full()),
        (jaxkv.SnapKV(), jaxkv.StreamingLLM()),
    }


@pytest.mark.parametrize("named", [True, False])
def test_a_file_of_questions(jaxkv_, tiny, tmp_path, reader, named):
    path = tmp_path / "mine.jsonl"
    lines = [
        {"input": "the sky is red and the sea", "outputs": ["Red", "blue"]},
        {"input": "the sky is red", "answer_prefix": " and", "outputs": ["red"]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    flags = [tiny, "--task-file", path, "--max-new-tokens=5", "--out", tmp_path / "out"]
    command = ["eval", "file"] if named else ["eval"]
    assert jaxkv_(*command, *flags, "--no-pictures")[0] == 0
    rows = read(tmp_path / "out")
    assert [(r["task"], r["score"], r["exact"]) for r in rows] == [
        ("mine", "0.5", "0"),
        ("mine", "1.0", "1"),
    ]
    assert reader[0]["max_new_tokens"] == 5
    path.write_text('{"input": "a"}')
    assert f"{path}:1:" in jaxkv_.error(*command, *flags[:-1], tmp_path / "other")


def test_questions_in_a_chat(jaxkv_, tiny, tmp_path, reader):
    flags = [*RULER, tiny, "--methods=full", "--no-pictures", "--out"]
    code, _, err = jaxkv_(*flags, tmp_path / "plain")
    assert code == 0 and "has a chat template, and is asked without; see --chat" in err
    code, _, err = jaxkv_(*flags, tmp_path / "chat", "--chat", "--system=be brief")
    assert code == 0 and "see --chat" not in err
    plain, chat = (read(tmp_path / name) for name in ("plain", "chat"))
    for before, after in zip(plain, chat, strict=True):
        assert int(after["prompt_tokens"]) > int(before["prompt_tokens"])
    config = yaml.safe_load((tmp_path / "chat" / "config.yaml").read_text())
    assert (config["chat"], config["system"]) == (True, "be brief")


def test_the_folder_has_a_name_by_default(jaxkv_, tiny, tmp_path, reader, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate.flags, "load_model", lambda *_, **__: jaxkv.load(tiny))
    jaxkv_(*RULER, "org/model", "--budgets=20%", "--no-pictures")
    (folder,) = (tmp_path / "results").iterdir()
    assert folder.name == "ruler__300__org--model"


BAD = {
    "task": (["ruler", "--tasks=ledger"], "unknown task 'ledger'"),
    "reasoning task": (["reasoning", "--tasks=vt"], "unknown task 'vt'"),
    "needle": (["niah", "--task=vt"], "--task takes one of niah_single_1"),
    "depth": (["niah", "--depths=0,150"], "--depths takes per cent"),
    "no depth": (["niah", "--depths=x"], "--depths takes per cent"),
    "lengths": (["ruler", "--lengths=0"], "--lengths takes positive numbers"),
    "budget": (["ruler", "--budgets=200%"], "--budgets takes tokens"),
    "method": (["ruler", "--methods=magic"], "unknown 'magic'"),
    "decode": (["ruler", "--decode=magic"], "unknown 'magic'"),
    "prefill": (["reasoning", "--prefill=magic"], "unknown 'magic'"),
    "too long": (
        ["ruler", "--methods=full", "--max-new-tokens=1900", "--lengths=300"],
        "positions",
    ),
    "offset": (
        ["ruler", "--methods=full,dapq:offset=9999", "--lengths=300", "--tasks=vt"],
        "dapq:offset=9999 at 1.5%: generate: a prompt of",
    ),
    "endless": (["ruler", "--lengths=300,99999999999"], "samples of 99999999999 tok"),
    "too small": (["ruler", "--lengths=300", "--budgets=2"], "at least 5"),
    "no file": (["file"], "--task-file"),
    "match": (["file", "--task-file=x", "--match=some"], "--match"),
    "budget of a card": (["card", "--budget=9"], "--budget does nothing where nothing"),
    "ratio of a card": (
        ["card", "--compression-ratio=0.5"],
        "--compression-ratio does nothing where nothing evicts; add --prefill",
    ),
    "ratio and decode": (
        ["card", "--compression-ratio=0.5", "--decode=streaming-llm"],
        "--compression-ratio is a fraction of each prompt, but the decode policy evi",
    ),
    "ratio and budget": (
        ["card", "--compression-ratio=0.5", "--budget=9", "--prefill=snapkv"],
        "not both",
    ),
    "system": (["ruler", "--system=x"], "--system goes with --chat"),
    "no folder": (["report", "/no/such"], "holds no predictions.csv"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(jaxkv_, tiny, tmp_path, case):
    (command, *flags), message = BAD[case]
    place = [] if command == "report" else [tiny, f"--out={tmp_path}"]
    if command in ("ruler", "reasoning", "niah"):
        place.append("--samples=1")
    assert message in jaxkv_.error("eval", command, *place, *flags)


def test_help_names_the_commands(jaxkv_):
    code, out, _ = jaxkv_("eval", "--help")
    assert code == 0
    for name in ("card", "niah", "ruler", "reasoning", "file", "report"):
        assert f"  {name} " in out


def test_programs_side_by_side_are_refused_on_a_gpu(jaxkv_, tiny, monkeypatch):
    monkeypatch.setattr("jaxkv.cli.sweep.jax.default_backend", lambda: "gpu")
    error = jaxkv_.error("eval", "ruler", tiny, "--side-by-side", "2")
    assert "--side-by-side does not work on a GPU" in error
