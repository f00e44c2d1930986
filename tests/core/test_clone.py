"""Python started where the sources lie, with nothing installed or something older."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def start(tmp_path):
    """Run a line of Python in a clone of some folders; return its result."""

    def run(line: str, *folders: str) -> subprocess.CompletedProcess:
        for folder in folders:
            (tmp_path / folder).symlink_to(ROOT / folder)
        return subprocess.run(
            # Without `site` an editable install of ours is not found.
            [sys.executable, "-S", "-c", line],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_a_clone_is_complete(start, tmp_path):
    line = (
        "import jaxkv.kernels; from jaxkv.language_model import needle_folder; "
        "print(jaxkv.kernels.__file__, needle_folder())"
    )
    done = start(line, "jaxkv", "kernels", "models")
    places = tmp_path / "kernels" / "__init__.py", tmp_path / "models" / "needle"
    assert done.stdout.split() == list(map(str, places)), done.stderr


def test_half_a_clone_says_what_is_missing(start):
    last = start("import jaxkv", "jaxkv").stderr.splitlines()[-1]
    assert "without kernels and models" in last
    assert last.startswith("ImportError: ") and "start Python in another folder" in last
