"""The benchmark of several devices, on simulated ones: it measures and compares."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "mesh.py"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["speed", "large"])
def test_the_benchmark_of_several_devices(tmp_path, part):
    out, devices = tmp_path / "mesh.json", "--xla_force_host_platform_device_count=4"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {devices}"
    subprocess.run(
        [sys.executable, SCRIPT, part, "--tiny", "--out", out],
        env=os.environ | dict(JAX_PLATFORMS="cpu", XLA_FLAGS=flags),
        check=True,
    )
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert len(result["devices"]) == 4
    assert not [row for row in rows if "error" in row]
    for row in rows:
        if row["what"] != "prefill":
            assert row["step_ms"] > 0 and row["bound_ms"] >= row["floor_ms"]
            assert (row["sums_ms"] > 0) == (row["model"] > 1)
    if part == "large":
        assert [row["batch"] for row in rows] == [2, 2]
        return
    assert all(row["ratio_to_one_device"] > 0 for row in rows)
    found = [(row["what"], row["data"], row["model"], row["batch"]) for row in rows]
    for model in (1, 2, 4):
        assert found.count(("step", 1, model, 2)) == 2
        assert found.count(("prefill", 1, model, 2)) == 1
    assert found.count(("rows", 4, 1, 8)) == found.count(("rows", 1, 1, 2)) == 2
