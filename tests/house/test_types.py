"""Type checkers take what users write: the documents', the notebooks', and more."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    path
    for path in ROOT.rglob("*.md")
    if "results" not in path.parts and not any(p.startswith(".") for p in path.parts)
]
FOLDERS = ["programs", "wrong"]  # what has no error of types, and what has some
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WRONG = """
import jaxkv
lm = jaxkv.load()
jaxkv.generate(lm, 3)
jaxkv.generate(lm, "a", prefill=jaxkv.LongFlow())
jaxkv.generate(lm, "a", decode=jaxkv.SnapKV)
jaxkv.generate(lm, "a").text[0].shout()
jaxkv.generate(lm, "a", speculate=jaxkv.Greedy())
jaxkv.DapQ(window=3)
"""
MYPY = """
[mypy]
python_version = 3.11
mypy_path = {library}
strict = true
allow_untyped_defs = true
allow_untyped_calls = true
follow_imports = silent
[mypy-flax.*,huggingface_hub.*,jax.*,matplotlib.*,optax.*,orbax.*,scipy.*,transformers.*,yaml.*]
# They are slow to follow, and what users write of ours is what is checked here.
follow_imports = skip
ignore_missing_imports = true
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder with what users write, and beside it the library as it is installed."""
    base = tmp_path_factory.mktemp("types")
    library, folder = base / "library", base / "programs"
    (library / "jaxkv").mkdir(parents=True)
    folder.mkdir()
    for path in [*(ROOT / "jaxkv").iterdir(), ROOT / "kernels", ROOT / "models"]:
        (library / "jaxkv" / path.name).symlink_to(path)
    for path in DOCUMENTS:
        blocks = re.findall(
            r"^```python\n(.*?)^```", path.read_text("utf-8"), re.M | re.S
        )
        name = "_".join(path.relative_to(ROOT).with_suffix("").parts)
        for number, block in enumerate(blocks):
            (folder / f"{name}_{number}.py").write_text(block, "utf-8")
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        (folder / f"{path.stem}.py").write_text("\n\n".join(code), "utf-8")
    uses = (ROOT / "tests" / "typed_uses.py").read_text("utf-8")
    (folder / "typed_uses.py").write_text(uses, "utf-8")
    (base / "wrong").mkdir()
    (base / "wrong" / "wrong.py").write_text(WRONG, "utf-8")
    return base


def mypy(base):
    """Return what mypy says."""
    pytest.importorskip("mypy")
    (base / "mypy.ini").write_text(MYPY.format(library=base / "library"), "utf-8")
    return run(base, "mypy", "--config-file", "mypy.ini", *FOLDERS)


def pyright(base):
    """Return what pyright says, with its own rules."""
    pytest.importorskip("basedpyright")
    config = dict(
        include=FOLDERS,
        extraPaths=["library"],
        typeCheckingMode="standard",
        pythonVersion="3.11",
    )
    (base / "pyrightconfig.json").write_text(json.dumps(config), "utf-8")
    return run(base, "basedpyright", "--pythonpath", sys.executable)


def run(base, *command):
    """Run a module in the folder `base`, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=base,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_mistakes_of_users_are_found_and_nothing_else(checker, programs):
    said = checker(programs)
    errors = re.findall(r"^ *\S*?(\w+\.py):(\d+)\b.*\berror\b", said, re.M)
    expected = {("wrong.py", str(line)) for line in range(4, 10)}
    assert set(errors) == expected, said
    # Nor is there an error without a line, or one in another form.
    total = re.search(r"(\d+) errors?", said)
    assert total and int(total[1]) == len(errors), said
