"""Run many commands side by side on the GPUs of one machine.

    python benchmarks/farm.py JOBS LOGS --seconds 500
    python benchmarks/farm.py JOBS LOGS --gpus 0 --per-gpu 2

A line of JOBS is a shell command; it may begin with a time in seconds that it is
thought to take, and `# ` begins a comment. The longest start first, on one GPU after
the other. A job sees one GPU and its share of that GPU's memory. Its output is
LOGS/NUMBER.log, and LOGS/farm.json says of each how it ended. Nothing starts that would
not end in time; a job that has not ended by then is stopped. Commands of `jaxkv eval`
go on from what their folders hold, so that the same jobs can be run again.
"""

import os
import subprocess
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from jaxkv.provenance import write_json


class Job(NamedTuple):
    """A command, and how many seconds it is thought to take."""

    number: int
    command: str
    seconds: float


class Place(NamedTuple):
    """A share of one GPU; none of `gpu` is the CPU."""

    gpu: str
    share: float


def read(path: Path) -> list[Job]:
    """Return the jobs of a file, the longest first."""
    jobs = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        first, _, rest = line.strip().partition(" ")
        if not first or first.startswith("#"):
            continue
        if first.isdigit():
            jobs.append(Job(number, rest.strip(), float(first)))
        else:
            jobs.append(Job(number, line.strip(), 0.0))
    return sorted(jobs, key=lambda job: -job.seconds)


def start(job: Job, place: Place, logs: Path) -> subprocess.Popen:
    """Start a job in a process group of its own, its output in its log."""
    own = dict(XLA_PYTHON_CLIENT_MEM_FRACTION=f"{place.share:.3f}")
    if place.gpu:
        own["CUDA_VISIBLE_DEVICES"] = place.gpu
    with (logs / f"{job.number:03d}.log").open("w", encoding="utf-8") as log:
        print(f"$ {job.command}", file=log, flush=True)
        return subprocess.Popen(
            ["bash", "-c", job.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | own,
            start_new_session=True,
        )


def stop(process: subprocess.Popen) -> None:
    """End a job and what it has started."""
    for how in ("-TERM", "-KILL"):
        subprocess.run(["kill", how, "--", f"-{process.pid}"], check=False)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue
        return


def run(
    jobs: list[Job], places: list[Place], logs: Path, seconds: float
) -> list[dict[str, Any]]:
    """Run jobs until all are done or time is up, and return how each ended."""
    begin, waiting, free = time.monotonic(), list(jobs), list(places)
    running: dict[int, tuple[subprocess.Popen, Job, Place, float]] = {}
    ends: dict[int, dict[str, Any]] = {
        job.number: {"command": job.command, "end": "not started"} for job in jobs
    }

    def note(job: Job, end: Any, since: float) -> None:
        spent = round(time.monotonic() - since, 1)
        ends[job.number] |= {"end": end, "seconds": spent}
        write_json(logs / "farm.json", {"jobs": [ends[n] for n in sorted(ends)]})

    while waiting or running:
        left = seconds - (time.monotonic() - begin)
        for place in list(free):
            fitting = [job for job in waiting if job.seconds <= left]
            if not fitting or left <= 0:
                break
            job = fitting[0]
            waiting.remove(job)
            free.remove(place)
            process = start(job, place, logs)
            running[process.pid] = (process, job, place, time.monotonic())
        for pid, (process, job, place, since) in list(running.items()):
            if process.poll() is None and left <= 0:
                stop(process)
                note(job, "stopped", since)
            elif process.poll() is not None:
                note(job, process.returncode, since)
            else:
                continue
            del running[pid]
            free.append(place)
        if not running and not any(job.seconds <= left for job in waiting):
            break
        time.sleep(0.2)
    return [ends[number] for number in sorted(ends)]


def main(
    jobs: Annotated[Path, typer.Argument(exists=True, help="A command a line.")],
    logs: Annotated[Path, typer.Argument(help="Folder; it may be new.")],
    gpus: Annotated[str, typer.Option(help="By number, with commas; none: CPU.")] = "",
    per_gpu: Annotated[int, typer.Option(min=1, help="Jobs that share one.")] = 1,
    seconds: Annotated[float, typer.Option(help="Time for all.")] = 540.0,
) -> None:
    """Run many commands side by side on the GPUs of one machine."""
    logs.mkdir(parents=True, exist_ok=True)
    share = 0.9 / per_gpu
    places = [Place(gpu, share) for _ in range(per_gpu) for gpu in gpus.split(",")]
    ends = run(read(jobs), places, logs, seconds)
    for end in ends:
        print(f"{end['end']!s:>12} {end.get('seconds', 0):7.1f} s  {end['command']}")
    failed = sum(end["end"] != 0 for end in ends)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
