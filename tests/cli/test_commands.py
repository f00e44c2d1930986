"""Every command but `generate` and the comparisons, and the process around them."""

import csv
import dataclasses
import json
import os
import subprocess
import sys

import pytest
import typer
import yaml

from jaxkv.cli import checkpoints
from jaxkv.cli import main as cli
from jaxkv.language_model import needle_folder
from jaxkv.needle import training

PROMPT = "The magic number is"
SMALL = ["--budget", "16", "--prefill", "streaming-llm", "--decode", "streaming-llm"]


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_demo(jaxkv_, tiny, tmp_path):
    picture = tmp_path / "new" / "kept.png"
    flags = ["--length", "500", "--seed", "1", "--picture", picture]
    code, out, err = jaxkv_("demo", tiny, *flags)
    assert (code, err.count("\n")) == (0, 1)
    assert "What is the" in out and "Find all" in out
    assert out.count(" full ") == out.count(" small ") == 4
    assert "lines right" in out
    *_, last, drawn = out.splitlines()
    assert last.startswith("Full cache: 0 of 4 right") and last.endswith("in all.")
    assert drawn == f"{picture}: what is kept of the first document in 62 tokens"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_eval_card(jaxkv_, tiny, tmp_path):
    out = tmp_path / "deep" / "out"
    common = ["eval", "card", tiny, "--tasks=vt,ledger", "--lengths=300"]
    common += ["--answers=128", "--samples=3", "--batch-size=2", *SMALL]
    code, text, err = jaxkv_(*common, "--out", out)
    assert (code, err.count("\n")) == (0, 3)
    names = {"predictions.csv", "metrics.json", "config.yaml", "run_meta.json"}
    assert {path.name for path in out.iterdir()} == names
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cells = [("vt", "300"), ("ledger", "128")]
    found = sorted((r["task"], r["length"], r["index"]) for r in rows)
    assert found == sorted((*cell, i) for cell in cells for i in "012")
    assert len(json.loads(max(rows, key=lambda row: row["task"])["outputs"])) == 5
    metrics, meta = (
        json.loads((out / f"{name}.json").read_text())
        for name in ("metrics", "run_meta")
    )
    config = yaml.safe_load((out / "config.yaml").read_text())
    (method,) = config["methods"]
    assert method["decode"] == {"name": "StreamingLLM", "n_sink": 4}
    assert method["name"] == "streaming-llm+streaming-llm"
    ledger = {"task": "ledger", "length": 128, "depth": None, "questions": 3}
    assert ledger.items() < config["cells"][1].items()
    assert {"command", "date", "device", "versions", "seconds"} <= set(meta["runs"][0])
    # 2 layers, 2 heads, 16 slots: keys and values of 8 floats, a position; a target.
    for row in metrics["cells"]:
        assert row["cache_bytes"] == 2 * 2 * (16 * (2 * 8 * 4 + 4) + 4)
        assert (row["samples"], row["exact"]) == (3, 0)
    # The table has the cells as they were asked for.
    lines = [line.split(" | ")[:3] for line in text.splitlines() if line[:1] == "|"]
    assert lines[2:] == [["| vt", "300", "0.0"], ["| ledger", "128", "0.0"]]
    # Without a command, `eval` is `card`; without a folder nothing is kept.
    before = sorted(tmp_path.rglob("*"))
    printed = json.loads(jaxkv_("eval", *common[2:], "--json")[1])
    assert printed["metrics"] == metrics and printed["config"] == config
    assert {"command", "date", "device", "versions"} <= set(printed["run_meta"])
    assert sorted(tmp_path.rglob("*")) == before


def test_convert(jaxkv_, tiny, tmp_path):
    copy = tmp_path / "copy"
    assert jaxkv_("convert", tiny, copy)[0] == 0
    assert "already holds" in jaxkv_.error("convert", tiny, copy)
    assert "copy already" in jaxkv_.error("convert", copy, tmp_path / "b")
    assert jaxkv_("convert", tiny, copy, "--overwrite")[0] == 0
    outputs = [
        jaxkv_("generate", folder, "--prompt", PROMPT)[1] for folder in (tiny, copy)
    ]
    assert outputs[0] == outputs[1]


def test_convert_keeps_the_dtype(jaxkv_, tiny, tmp_path):
    half = tmp_path / "half"
    assert jaxkv_("convert", tiny, half, "--dtype=bfloat16")[0] == 0
    assert json.loads((half / "jaxkv.json").read_text())["dtype"] == "bfloat16"


def test_train(jaxkv_, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(training, "train", lambda *a, **k: calls.append((a, k)))
    assert jaxkv_("train", tmp_path, "--steps-scale=0.01", "--workers=3")[0] == 0
    ((recipe, out), options) = calls[0]
    default = training.Recipe()
    assert [s.steps for s in recipe.stages] == [
        round(s.steps / 100) for s in default.stages
    ]
    assert recipe.warmup == default.warmup // 100
    assert dataclasses.replace(
        recipe, stages=default.stages, warmup=default.warmup
    ) == (default)
    assert out == tmp_path
    assert options == {
        "tokenizer_folder": needle_folder(),
        "workers": 3,
        "save_every": 1000,
    }


def test_train_without_optax(jaxkv_, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.importlib.util, "find_spec", lambda _: None)
    error = jaxkv_.error("train", tmp_path)
    assert "pip install 'jaxkv[train]'" in error


@pytest.fixture
def stub_bench(monkeypatch):
    app = typer.Typer()
    seen = []

    @app.command()
    def decode(batch: str = "1", json: bool = False):
        seen.append((batch, json))
        if batch == "0":
            raise ValueError("batch")
        if batch == "2":
            raise typer.Exit(2)

    monkeypatch.setattr(cli, "bench_commands", lambda: app)
    return seen


def test_bench_is_handed_its_flags(jaxkv_, stub_bench):
    assert jaxkv_("bench", "decode", "--batch", "1,8", "--json")[0] == 0
    assert stub_bench == [("1,8", True)]
    assert jaxkv_("bench", "decode", "--batch", "2")[0] == 2
    jaxkv_.error("bench", "decode", "--batch", "0")
    code, out, _ = jaxkv_("bench", "decode", "--help")
    assert code == 0 and "jaxkv bench decode" in out


@pytest.mark.slow
def test_processes(tiny, tmp_path):
    """A cold run fills the cache; a warm one meets a reader that has gone."""
    program = [
        sys.executable,
        "-c",
        "from jaxkv.cli.main import main; raise SystemExit(main())",
    ]
    command = [*program, "generate", str(tiny), "--prompt", PROMPT, "--json"]
    settings = {
        "stdin": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
        # Buffered, as for users; unbuffered, nothing would be left for the end.
        "env": os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONUNBUFFERED": ""},
        "text": True,
        # In the repository `python -c` would find the folder, not the package.
        "cwd": tmp_path,
    }
    cold = subprocess.run(command, stdout=subprocess.PIPE, check=True, **settings)
    assert len(records(cold.stdout)) == 1
    assert cold.stderr.count("\n") == 2, cold.stderr
    assert len(list((tmp_path / "jaxkv" / "programs").iterdir())) > 2
    # The JSON is flushed as it is printed, the version at the end.
    for arguments in (command, [*command[:3], "--version"]):
        read_end, write_end = os.pipe()
        os.close(read_end)
        gone = subprocess.run(arguments, stdout=write_end, check=False, **settings)
        os.close(write_end)
        assert (gone.returncode, gone.stderr) == (1, "")
