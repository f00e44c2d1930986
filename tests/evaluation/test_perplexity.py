"""`jaxkv eval perplexity`: windows, records that are gone on with, tables, errors."""

import json

import numpy as np
import pytest

import jaxkv
from jaxkv.cli.main import main
from jaxkv.evaluation import perplexity
from jaxkv.evaluation.lock import one_writer
from jaxkv.evaluation.methods import Budget, Method

FULL = Method(name="full")
STREAM = Method(name="streaming-llm", decode=jaxkv.StreamingLLM(n_sink=1))
SIZES = [Budget(name="24", value=24), Budget(name="50%", value=50)]


@pytest.fixture(scope="module")
def lm(tiny_lm):
    return tiny_lm


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(5, 4000, (3, 64)).astype(np.int32)


def measured(lm, tokens, methods=(FULL, STREAM), file=None, **changes):
    given = dict(prompt=16, batch_size=2, config={"seed": 0}) | changes
    return perplexity.measure(lm, tokens, methods, SIZES, file=file, **given)


def test_each_method_and_budget_once(lm, tokens):
    shown = []
    record = measured(lm, tokens, show=lambda *what: shown.append(what))
    cases = [(entry["method"], entry["budget"]) for entry in record["results"]]
    stream = [("streaming-llm", "24"), ("streaming-llm", "50%")]
    assert cases == [("full", "full"), *stream]
    assert [entry["budget_tokens"] for entry in record["results"]] == [None, 24, 32]
    assert all(np.shape(entry["losses"]) == (3, 32) for entry in record["results"])
    assert shown[-1] == ("streaming-llm 50%", 2, 3)
    alone = measured(lm, tokens[2:], (STREAM,))  # a batch that was filled up
    np.testing.assert_allclose(
        alone["results"][0]["losses"][0], record["results"][1]["losses"][2], atol=1e-4
    )


def test_a_record_is_gone_on_with(lm, tokens, tmp_path, monkeypatch):
    file = tmp_path / "record.json"
    first = measured(lm, tokens, (FULL,), file=file)
    assert json.loads(file.read_text()) == first
    monkeypatch.setattr(perplexity, "losses", None)  # nothing runs again
    again = measured(lm, tokens, (FULL,), file=file)
    assert again["results"] == first["results"] and len(again["run_meta"]) == 2
    changed = tokens.copy()
    changed[1, 40] += 1
    with pytest.raises(ValueError, match="holds results with tokens="):
        measured(lm, changed, (FULL,), file=file)
    with pytest.raises(ValueError, match="holds results with prompt=16"):
        measured(lm, tokens, (FULL,), file=file, prompt=8)
    file.write_text('{"config": 3}')
    with pytest.raises(ValueError, match="no record of eval perplexity"):
        measured(lm, tokens, (FULL,), file=file)


def test_losses_that_are_no_numbers_are_no_result(lm, tokens, tmp_path, monkeypatch):
    file = tmp_path / "record.json"

    def losses(lm, tokens, method, count, **_):
        found = np.ones((len(tokens), 48))
        found[1, 5] = np.nan if count == 32 else 1
        return found

    monkeypatch.setattr(perplexity, "losses", losses)
    message = "streaming-llm at 50%: losses are NaN or infinite in 1 of 3 windows; all"
    with pytest.raises(ValueError, match=message):
        measured(lm, tokens, file=file)
    kept = json.loads(file.read_text())["results"]
    assert [entry["budget"] for entry in kept] == ["full", "24"]


def test_one_process_writes_a_record(tmp_path, capsys):
    file = tmp_path / "a.json"
    command = ["eval", "perplexity", "needle", "--out", str(file)]
    with one_writer(tmp_path, name="a.json"):
        assert main(command) == 2
    assert f"error: {file} is being written by process" in capsys.readouterr().err
    with one_writer(tmp_path, name="b.json"):  # another record
        assert main([*command, "--prompt", "4096"]) == 2
    assert "--prompt must lie between" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_tables_by_hand():
    def entry(method, budget, losses):
        return {"method": method, "budget": budget, "losses": losses}

    config = dict(
        model="m", dtype="float32", texts=2, length=40, prompt=8, evict="output"
    )
    whole = [[1.0, 1.0, 1.0, 2.0], [3.0, 3.0, 3.0, 2.0]]
    other = [[1.5, 1.5, 1.5, 2.0], [3.5, 3.5, 3.5, 3.0]]
    results = [entry("full", "full", whole), entry("a", "8", other)]
    text = perplexity.report({"config": config, "results": results})
    assert "Everything kept: 2.0000 (perplexity 7.39)." in text
    assert "| a | +0.500 ± 1.588 |" in text  # 0.375 and 0.625, of two texts
    assert "| a | +0.500 ± 6.353 |" in text  # 0 and 1
    alone = perplexity.report({"config": config, "results": results[1:]})
    assert "| a | 2.500 ± 11.118 |" in alone


def test_development_and_report_share_no_window(lm):
    texts = [" ".join(map(str, range(300)))]
    options = dict(length=64)
    chosen = perplexity.chosen_windows(lm, texts, development=True, **options)
    reported = perplexity.chosen_windows(lm, texts, development=False, **options)
    assert not {row.tobytes() for row in chosen} & {row.tobytes() for row in reported}
    with pytest.raises(ValueError, match="one window of"):
        perplexity.chosen_windows(lm, texts, length=500, development=True)


def test_python_brings_a_text():
    (text,) = perplexity.read_texts(["pydoc"])
    assert len(text) > 400_000 and "assert" in text


def test_a_picture(lm, tokens, tmp_path):
    pytest.importorskip("matplotlib")
    files = perplexity.draw(measured(lm, tokens), tmp_path / "loss")
    assert {file.suffix for file in files} == {".png", ".svg"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--evict", "prompt", "--prefill", "snapkv"], "--prefill goes with"),
        (["--length", "100000"], "--length 100000 exceeds"),
        (["--text", "absent.txt"], "absent.txt"),
        (["--out", "."], "--out takes a file"),
        (["--length", "64", "--prompt", "64"], "--prompt must lie between 1 and 63"),
        (["--length", "64", "--budgets", "8", "--methods", "longflow"], "longflow at"),
        (["--methods", "dapq"], "dapq"),
    ],
)
def test_bad_flags_are_named(flags, message, capsys):
    assert main(["eval", "perplexity", "needle", *flags]) == 2
    complaint = capsys.readouterr().err
    assert message in complaint and complaint.count("\n") == 1
