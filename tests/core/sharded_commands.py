"""Run by test_sharding.py, where JAX finds four devices: commands with `--mesh`.

Prints "equal" where `jaxkv batch` writes what it writes on one device, and `jaxkv
bench` measures over the mesh. Works in the folder of a checkpoint.
"""

import json
from pathlib import Path

import sharded_generation

from jaxkv.cli.main import main
from jaxkv.models import public_shapes

MESH = "data=2,model=2"
BENCH = ["--shape", "qwen3-8b", "--dtype", "float32", "--mesh", MESH, "--repeats", "1"]


def run(*arguments):
    assert main(list(map(str, arguments))) == 0, arguments


def answers(name, *flags):
    """Return the lines that `jaxkv batch` writes, and how it was told to."""
    out = Path(name)
    run("batch", "in.jsonl", out, ".", "--ordered", "--batch-size", 2, *flags)
    settings = json.loads(out.with_name(f"{name}.job").read_text())
    return out.read_text().splitlines(), settings["settings"]["--mesh"]


def measured(what, *flags):
    run("bench", what, *BENCH, *flags, "--out", f"{what}.json")
    return json.loads(Path(f"{what}.json").read_text())


def check_batch():
    prompts = [{"prompt": list(range(2, 4 + n))} for n in range(5)]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    told = ["--max-new-tokens", 6, "--max-prompt", 16, "--temperature", 1]
    alone, none = answers("alone.jsonl", *told)
    spread, mesh = answers("spread.jsonl", *told, "--mesh", MESH)
    assert len(alone) == 5 and alone == spread
    assert (none, mesh) == (None, {"data": 2, "model": 2})


def check_bench():
    public_shapes.SHAPES["qwen3-8b"] = sharded_generation.CONFIG
    steps = ["--context", 24, "--prompt", 16, "--steps", 4, "--nodes", 4]
    speculate = measured("speculate", "--batch", 2, *steps)
    assert speculate["rows"][0]["trees"][0]["step_ms"] > 0
    work = ["--prompt", 6, "--new", 40, "--budget", 16, "--ranges", 2, "--steps", 4]
    throughput = measured("throughput", *work, "--batches", 2, "--copy-gib", 0.01)
    assert all(row["fits"] for row in throughput["rows"])
    for result in (speculate, throughput):
        assert result["mesh"] == {"data": 2, "model": 2, "copies": 1}


if __name__ == "__main__":
    check_batch()
    check_bench()
    print("equal")
