"""`benchmarks/compare_methods.py`, with a stub in place of `jaxkv`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "compare_methods.py"
STUB = """#!{python}
import json, os, pathlib, sys, time
def say():
    with open({log!r}, "a") as log:
        line = sys.argv[1:], os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
        log.write(json.dumps(line) + "\\n")
methods = sys.argv[sys.argv.index("--methods") + 1] if "--methods" in sys.argv else ""
if "slow" not in methods:
    say()
else:
    try:
        say()
        time.sleep(60)
    except KeyboardInterrupt:
        with open({log!r}, "a") as log:
            log.write(json.dumps("stopped") + "\\n")
        sys.exit(130)
if "bad" in methods:
    sys.exit("no such method")
"""


@pytest.fixture
def heeding_interrupts():
    """Started by a shell in the background, pytest ignores them, and so would these."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def start(tmp_path, heeding_interrupts):
    """Return a function that starts the script, and one that reads the stub's calls."""
    log = tmp_path / "calls"
    stub = tmp_path / "bin" / "jaxkv"
    stub.parent.mkdir()
    stub.write_text(STUB.format(python=sys.executable, log=str(log)))
    stub.chmod(0o755)

    def run(*flags):
        command = [sys.executable, SCRIPT, tmp_path / "out", *flags]
        return subprocess.Popen(
            [*command, "--", "ruler", "needle", "--samples", "2"],
            env=os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def calls():
        return [json.loads(line) for line in log.read_text().splitlines()]

    return run, calls


def test_parts_are_run_and_those_that_worked_merged(start, tmp_path):
    run, calls = start
    process = run("--methods", "full,a:x=1,y=2;bad;c", "--processes", "2")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "no such method" in err
    assert sorted(out.splitlines()) == [
        "part 0: done",
        "part 1: failed",
        "part 2: done",
    ]
    folder = tmp_path / "out"
    *parts, (merge, _) = calls()
    assert sorted(arguments for arguments, _ in parts) == sorted(
        [
            *("eval", "ruler", "needle", "--samples", "2", "--methods", methods),
            *("--out", str(folder / "parts" / str(number))),
        ]
        for number, methods in enumerate(["full,a:x=1,y=2", "bad", "c"])
    )
    assert {memory for _, memory in parts} == {"0.450"}
    worked = [str(folder / "parts" / number) for number in ("0", "2")]
    assert merge == ["eval", "merge", str(folder / "merged"), *worked]


def test_an_interrupt_stops_all_parts_and_merges_nothing(start, tmp_path):
    run, calls = start
    process = run("--methods", "slow;slow,b")
    log = tmp_path / "calls"
    until = time.monotonic() + 60
    while not log.exists() or len(calls()) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in err and "Traceback" not in err
    assert [call for call in calls() if call == "stopped"] == ["stopped"] * 2
    assert len(calls()) == 4  # no merge


def test_nothing_to_run_is_named(start, monkeypatch):
    run, _ = start
    process = run("--methods", ";")
    assert "--methods names no method" in process.communicate(timeout=60)[1]
    assert process.returncode == 1
    monkeypatch.setenv("PATH", "")
    process = subprocess.run(
        [sys.executable, SCRIPT, "out", "--", "ruler"], capture_output=True, text=True
    )
    assert "no command jaxkv on the PATH" in process.stderr
