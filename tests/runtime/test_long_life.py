"""A process that meets ever new shapes and options of `generate`, as a server does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxkv.runtime.programs import memory_maps

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "long_lived.py"


@pytest.mark.slow
@pytest.mark.skipif(memory_maps() is None, reason="nothing tells memory maps here")
def test_five_hundred_different_calls(tmp_path):
    """From the hundredth on, maps do not grow, and memory hardly does."""
    out = tmp_path / "life.json"
    run = subprocess.run(
        [sys.executable, SCRIPT, out, "--layers=1", "--calls=500", "--every=20"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(out.read_text("utf-8"))
    lines = found["lines"]
    assert [line["calls"] for line in lines] == list(range(0, 501, 20))
    assert max(line["programs"] for line in lines) == found["most"]
    hundredth, *later = [line for line in lines if line["calls"] >= 100]
    # Programs differ in size, so that those that are kept do.
    assert max(line["maps"] for line in later) < 1.5 * hundredth["maps"]
    assert max(line["maps"] for line in lines) < found["most_maps"]
    grown = later[-1]["resident_mib"] - hundredth["resident_mib"]
    assert grown < 0.75 * (500 - 100)  # JAX keeps traces of what was let go of
