"""The script that samples transformers, on the CPU with a network of no size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxkv.bench import throughput_report as report

pytest.importorskip("torch")
pytest.importorskip("transformers")

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
# The shape is put in place of a real one, and the script is run as it stands.
RUN = """
import runpy, sys
from jaxkv.models import public_shapes
from jaxkv.models.config import Config
public_shapes.SHAPES["qwen3-1.7b"] = Config(
    vocab_size=10, hidden_size=8, intermediate_size=6, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=4, max_positions=64, qk_norm=True, tied=True,
)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow  # imports torch and transformers
def test_records_are_those_of_the_command(tmp_path):
    out = tmp_path / "theirs.json"
    script = FOLDER / "throughput_transformers.py"
    work = ["--prompt", "6", "--new", "40", "--steps", "4", "--batches", "1,2"]
    work += ["--dtype", "float32"]
    subprocess.run(
        [sys.executable, "-c", RUN, script, *work, "--device", "cpu", "--out", out],
        check=True,
    )
    content = report.read_transformers(out)
    assert [row["batch"] for row in content["rows"]] == [2, 1]  # the largest first
    for row in content["rows"]:
        assert row["fits"]
        assert len(row["ranges"]) == 3
        assert row["seconds"] > 0
        # Two layers, keys and values, two heads of four; no cache has the last token.
        assert row["state_bytes"] == 2 * 2 * row["batch"] * 2 * 4 * 4 * 45
    result = {key: content[key] for key in ("model", "dtype", "prompt", "new")}
    result |= {"device": content["device"], "rows": []}
    report.add_transformers(result, content)
    assert result["rows"] == content["rows"]
    assert result["transformers"]["cache"] == "DynamicCache"
    json.dumps(result)
