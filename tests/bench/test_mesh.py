"""The benchmark of several devices, on simulated ones: it measures and compares."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script, *arguments, devices):
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={devices}"
    subprocess.run(
        [sys.executable, SCRIPTS / script, *arguments],
        env=os.environ | dict(JAX_PLATFORMS="cpu", XLA_FLAGS=flags),
        check=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", ["speed", "large"])
def test_the_benchmark_of_several_devices(tmp_path, part):
    out = tmp_path / "mesh.json"
    run("mesh.py", part, "--tiny", "--out", out, devices=4)
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


@pytest.mark.slow
def test_ways_of_adding_up(tmp_path):
    out = tmp_path / "sums.json"
    run("mesh_variants.py", "sums", "--tiny", "--out", out, devices=2)
    first, other = json.loads(out.read_text())
    assert other["environment"] == {"NCCL_PROTO": "LL"}
    for row in first["rows"] + other["rows"]:
        # Not every JAX knows every option, and one that does not says which.
        wanted = row.get("us", 0) > 0 or "xla_gpu_experimental_use" in row["error"]
        assert wanted, row
    assert {row["way"] for row in first["rows"] if "us" in row} >= {"default"}


@pytest.mark.slow
def test_steps_in_ways_of_adding_up(tmp_path):
    out, cases = (
        tmp_path / "steps.json",
        "2:full:chosen+default+unrecorded,2:longflow:default",
    )
    run(
        *("mesh_variants.py", "steps", "--tiny", "--alone", "2:full"),
        *("--cases", cases, "--profile", "default", "--out", out),
        devices=2,
    )
    rows = json.loads(out.read_text())["rows"]
    found = [(row["way"], row["method"], row["model"]) for row in rows]
    assert found == [
        ("default", "full", 1),
        ("chosen", "full", 2),
        ("default", "full", 2),
        ("unrecorded", "full", 2),
        ("default", "longflow", 2),
    ]
    assert all(row["step_ms"] > 0 for row in rows)
    assert [("kernels" in row) for row in rows] == [True, False, True, False, True]
