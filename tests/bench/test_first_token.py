"""`benchmarks/first_token.py`, stopped in the middle and run again."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "first_token.py"
SIZES = ["--model", "needle", "--batch", "1", "--length", "128", "--budget", "32"]


@pytest.fixture
def start(tmp_path):
    def run(*flags):
        command = [sys.executable, "-u", SCRIPT, tmp_path / "out.json", *SIZES, *flags]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    return run


def rows(folder):
    return json.loads((folder / "out.json").read_text("utf-8"))["rows"]


@pytest.mark.slow
def test_what_was_measured_survives_a_stop(start, tmp_path):
    with start("--methods", "tova", "--repeats", "3") as process:
        for line in process.stdout:
            if "compiling" in line and "query-agnostic" in line:
                process.send_signal(signal.SIGTERM)
            if "stopped while" in line:
                break
    assert "stopped while compiling tova, 1 at once, query-agnostic" in line
    assert process.returncode == 128 + signal.SIGTERM
    (first,) = rows(tmp_path)
    assert first["protocol"] == "query-aware"
    assert len(first["each"]["first_token_seconds"]) == 3
    assert first["first_token_seconds"] in first["each"]["first_token_seconds"]
    with start("--methods", "tova", "--repeats", "1") as process:
        process.communicate()
    assert process.returncode == 0
    kept, second = rows(tmp_path)
    assert kept == first
    assert second["protocol"] == "query-agnostic" and second["document_seconds"] > 0
