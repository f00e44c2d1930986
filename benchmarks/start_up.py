"""Time of `jaxkv generate` from its start to the first token, and to the end.

Each run is a process: without the cache of compiled programs, then with an empty one,
and then with what the runs before have left. CPU seconds are those of all threads; on
a machine that others use they say more than the clock.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxkv.provenance import provenance, write_json

RUNS = {
    "no cache": ["--no-compilation-cache"],
    "empty cache": [],
    "second process": [],
    "third process": [],
}
ASKED = ["--chat", "--prompt", "Explain in a few words why the sky is blue."]
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that a process has taken so far."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / TICKS


def timed(model: str, flags: list[str], new: int, home: str) -> dict[str, float]:
    """Run one process and return its times, in seconds."""
    command = [sys.executable, "-m", "jaxkv", *flags, "generate", model, *ASKED]
    command += ["--max-new-tokens", str(new), "--stream"]
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**os.environ, "XDG_CACHE_HOME": home},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    if not os.read(process.stdout.fileno(), 1):
        raise SystemExit(f"{model} gave no text; run jaxkv generate {model} to see why")
    first = time.perf_counter() - begin, cpu_seconds(process.pid)
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"jaxkv generate has ended with status {status}")
    found = {
        "first_token_seconds": first[0],
        "first_token_cpu_seconds": first[1],
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }
    return {name: round(value, 2) for name, value in found.items()}


def main(
    out: Annotated[Path | None, typer.Argument(help="JSON; default: none.")] = None,
    model: Annotated[str, typer.Option(help="As jaxkv generate takes it.")] = "smollm2",
    new: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 40,
) -> None:
    """Time the start of `jaxkv generate`."""
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as home:
        for name, flags in RUNS.items():
            line = {"run": name, "load": os.getloadavg()[0]}
            lines.append(line | timed(model, flags, new, home))
            print("  ".join(f"{k} {v}" for k, v in lines[-1].items()), flush=True)
    if out:
        settings = {"model": model, "max_new_tokens": new}
        write_json(out, provenance() | settings | {"lines": lines})


if __name__ == "__main__":
    typer.run(main)
