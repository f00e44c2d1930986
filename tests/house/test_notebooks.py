"""The notebooks run from top to bottom, wherever they are opened."""

import importlib.metadata
import json
import os
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


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, capsys):
    names = {}
    for source in cells(path):
        exec(compile(source, path.name, "exec"), names)
    assert capsys.readouterr().out


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
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **_: [])
    monkeypatch.setattr(shutil, "which", lambda _: None)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("opened", [".", "notebooks", "..", "jaxkv/cli"])
def test_the_first_cell_installs_the_clone(path, opened, clone, commands, monkeypatch):
    """Jupyter starts in the notebook's folder, Colab beside a clone."""
    monkeypatch.chdir(clone / opened)
    first, *others = cells(path)
    exec(first, {})
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    assert commands == [[*pip, str(clone)]]
    monkeypatch.setattr(shutil, "which", lambda name: name)  # a machine with a GPU
    exec(first, {})
    assert commands[1] == [*pip, f"{clone}[cuda12]"]
    assert not any("pip" in source for source in others)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_without_a_clone_the_first_cell_says_what_to_do(
    path, commands, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    first = cells(path)[0]
    with pytest.raises(
        RuntimeError, match=r"no clone of jaxkv in .* or write into SOU"
    ):
        exec(first, {})
    for source, wanted in {
        "git+https://example.org/jaxkv": "jaxkv @ git+https://example.org/jaxkv",
        "jaxkv-0.1.0-py3-none-any.whl": "jaxkv-0.1.0-py3-none-any.whl",
    }.items():
        given = first.replace('SOURCE = ""', f"SOURCE = {source!r}")
        assert given != first
        exec(given, {})
        assert commands.pop()[-1] == wanted


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_leaves_an_install_alone(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no clone: it would complain
    monkeypatch.setattr(subprocess, "run", None)
    exec(cells(path)[0], {})


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_installs_with_pip_only(path, clone, tmp_path):
    """In an environment of its own, without the packages that jaxkv needs.

    pip fetches what builds the package, as it does for everybody.
    """
    venv.create(tmp_path / "env", with_pip=True)
    python = next((tmp_path / "env").glob("[bS]*/python*"))
    done = subprocess.run(
        [python, "-c", cells(path)[0]],
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


def test_there_are_notebooks_without_outputs():
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs"), f"{path.name}: clear the outputs"
