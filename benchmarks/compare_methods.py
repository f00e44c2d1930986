"""Share one comparison of `jaxkv eval` between several processes, and merge the parts.

    python benchmarks/compare_methods.py OUT --processes 4 -- ruler needle \\
        --lengths 4096,8192 --samples 200 --budgets 1.5%,3%,6%,12.5%,25%,50% \\
        --batch-size 180 --characters 16 --no-pictures

What stands behind `--` is a command of `jaxkv eval` without `--methods` and `--out`.
Most of a comparison's time on a GPU is compiling, which the processes do side by side;
each gets an equal part of the device's memory. Parts lie in `OUT/parts` and are gone on
with if the same command is given again, after an interrupt too; `OUT/merged` has the
one table of all.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

RULER = (
    "full,dapq,dapq:window_size=1,dapq:reduction=sum,dapq:literal,dapq:tables;"
    "snapkv,snapkv:kernel_size=31,snapkv:window_size=8,kernel_size=31,"
    "snapkv:window_size=1,kernel_size=31,knorm;"
    "pyramidkv,h2o,tova,expected-attention,streaming-llm,random;"
    "laq,laq:kernel_size=31,h2o:window_size=none"
)
SHARE = 0.9  # of the device's memory; the rest is for contexts and libraries
GRACE = 30  # seconds that an interrupted part has, for what compiles at that moment


def main(
    out: Annotated[pathlib.Path, typer.Argument(help="Folder of parts and of all.")],
    command: Annotated[list[str], typer.Argument(help="Of `jaxkv eval`.")],
    methods: Annotated[
        str, typer.Option(help="As in --methods; semicolons between processes.")
    ] = RULER,
    processes: Annotated[
        int, typer.Option(min=1, help="At a time; the other parts wait.")
    ] = 4,
) -> None:
    """Run all parts, and merge those that have results."""
    if shutil.which("jaxkv") is None:
        raise SystemExit("there is no command jaxkv on the PATH; pip install . first")
    parts = [part for part in methods.split(";") if part.strip()]
    if not parts:
        raise SystemExit("--methods names no method; leave it out for the usual ones")
    folder = out / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    running: dict[int, subprocess.Popen] = {}
    try:
        failed = run_parts(folder, command, parts, processes, running)
    except KeyboardInterrupt:
        stop(list(running.values()))
        print("interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    for number in failed:
        print((folder / f"{number}.log").read_text()[-500:], file=sys.stderr)
    done = [folder / str(i) for i in range(len(parts)) if i not in failed]
    if done:
        shutil.rmtree(out / "merged", ignore_errors=True)
        merge = ["jaxkv", "eval", "merge", str(out / "merged"), *map(str, done)]
        merged = subprocess.run(merge, check=False).returncode
        failed += [-1] if merged else []
    if failed:
        raise SystemExit(1)


def run_parts(
    folder: pathlib.Path,
    command: Sequence[str],
    parts: Sequence[str],
    processes: int,
    running: dict[int, subprocess.Popen],
) -> list[int]:
    """Run all parts, so many at a time, and return the numbers of those that failed.

    Args:
      folder: of the parts and their logs.
      command: of `jaxkv eval`.
      parts: the methods of each.
      processes: at a time.
      running: filled with the processes by number; empty at the end.
    """
    memory = f"{SHARE / min(processes, len(parts)):.3f}"
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": memory}
    waiting = list(enumerate(parts))
    failed = []
    while waiting or running:
        while waiting and len(running) < processes:
            number, part = waiting.pop(0)
            with open(folder / f"{number}.log", "w") as log:
                running[number] = subprocess.Popen(
                    [
                        *("jaxkv", "eval", *command, "--methods", part),
                        *("--out", folder / str(number)),
                    ],
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        number, process = next(iter(running.items()))
        try:
            code = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            running[number] = running.pop(number)  # the next one's turn
            continue
        del running[number]
        if code:
            failed.append(number)
        print(f"part {number}: {'failed' if code else 'done'}", flush=True)
    return failed


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """Interrupt processes, and wait until they have gone.

    A terminal's Ctrl-C has reached them already, a signal to this process alone not.
    """
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        try:
            process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    typer.run(main)
