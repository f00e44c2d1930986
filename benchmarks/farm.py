"""Run many commands side by side on the GPUs of one machine.

    python benchmarks/farm.py JOBS LOGS --seconds 500
    python benchmarks/farm.py FIRST.jobs THEN.jobs LOGS --gpus 0,1 --per-gpu 8

A line of JOBS is a shell command; it may begin with a time in seconds that it is
thought to take, and `# ` begins a comment. Of a file the longest start first, on one
GPU after the other, and all of a file before the next one's. A job sees one GPU, its
share of that GPU's memory and of the cores that tokenise. Its output is
LOGS/FILE-LINE.log, and LOGS/farm.json says of each how it ended.

Nothing starts that would not end in time; a job that has not ended by then is stopped.
`$LEFT` is the seconds that a job has to itself: with `--seconds $LEFT`, `jaxkv eval`
ends by itself and can go on in another run, so that such a job starts as long as
`LEAST` seconds are left. Run the same jobs again: what is whole is left out.
"""

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from jaxkv.provenance import write_json

LEAST = 90.0  # in which a job that goes on where it stopped gets something done
SPARE = 25.0  # seconds to load a model, end a batch and write a report


class Job(NamedTuple):
    """A command, and how many seconds it is thought to take."""

    name: str
    command: str
    seconds: float

    @property
    def least(self) -> float:
        """Seconds without which it does not start."""
        return min(self.seconds, LEAST) if "$LEFT" in self.command else self.seconds

    @property
    def done(self) -> bool:
        """Whether it is a comparison whose folder is whole."""
        named = re.search(r"--out (\S+)", self.command)
        if not self.command.startswith("jaxkv eval ") or named is None:
            return False
        metrics = Path(os.path.expandvars(named[1])) / "metrics.json"
        if not metrics.is_file():
            return False
        found = json.loads(metrics.read_text("utf-8"))
        return found["rows"] == found["wanted"]


class Place(NamedTuple):
    """A share of one GPU; none of `gpu` is the CPU."""

    gpu: str
    share: float
    threads: int


def read(path: Path) -> list[Job]:
    """Return the jobs of a file, the longest first."""
    jobs = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        first, _, rest = line.strip().partition(" ")
        if not first or first.startswith("#"):
            continue
        if first.isdigit():
            jobs.append(Job(name(path, number), rest.strip(), float(first)))
        else:
            jobs.append(Job(name(path, number), line.strip(), 0.0))
    return sorted(jobs, key=lambda job: -job.seconds)


def name(path: Path, number: int) -> str:
    """Return what a line of a file is known by."""
    return f"{path.stem}-{number:03d}"


def start(job: Job, place: Place, logs: Path, left: float) -> subprocess.Popen:
    """Start a job in a process group of its own, its output in its log."""
    own = dict(
        XLA_PYTHON_CLIENT_MEM_FRACTION=f"{place.share:.3f}",
        RAYON_NUM_THREADS=str(place.threads),
        LEFT=str(max(0, round(left - SPARE))),
    )
    if place.gpu:
        own["CUDA_VISIBLE_DEVICES"] = place.gpu
    with (logs / f"{job.name}.log").open("w", encoding="utf-8") as log:
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
    begin, free = time.monotonic(), list(places)
    waiting = [job for job in jobs if not job.done]
    running: dict[int, tuple[subprocess.Popen, Job, Place, float]] = {}
    ends: dict[str, dict[str, Any]] = {
        job.name: {
            "command": job.command,
            "end": "not started" if job in waiting else "done before",
        }
        for job in jobs
    }

    def note(job: Job, end: Any, since: float) -> None:
        spent = round(time.monotonic() - since, 1)
        ends[job.name] |= {"end": end, "seconds": spent}
        write_json(logs / "farm.json", {"jobs": list(ends.values())})

    while waiting or running:
        left = seconds - (time.monotonic() - begin)
        for place in list(free):
            fitting = [job for job in waiting if job.least <= left]
            if not fitting or left <= 0:
                break
            job = fitting[0]
            waiting.remove(job)
            free.remove(place)
            process = start(job, place, logs, left)
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
        if not running and not any(job.least <= left for job in waiting):
            break
        time.sleep(0.2)
    return list(ends.values())


def main(
    jobs: Annotated[list[Path], typer.Argument(exists=True, help="A command a line.")],
    logs: Annotated[Path, typer.Argument(help="Folder; it may be new.")],
    gpus: Annotated[str, typer.Option(help="By number, with commas; none: CPU.")] = "",
    per_gpu: Annotated[int, typer.Option(min=1, help="Jobs that share one.")] = 1,
    seconds: Annotated[float, typer.Option(help="Time for all.")] = 540.0,
) -> None:
    """Run many commands side by side on the GPUs of one machine."""
    logs.mkdir(parents=True, exist_ok=True)
    share = 0.9 / per_gpu
    each = gpus.split(",") * per_gpu  # the first jobs on different ones
    threads = max(1, len(os.sched_getaffinity(0)) // len(each))
    places = [Place(gpu, share, threads) for gpu in each]
    ends = run([job for path in jobs for job in read(path)], places, logs, seconds)
    for end in ends:
        print(f"{end['end']!s:>12} {end.get('seconds', 0):7.1f} s  {end['command']}")
    failed = sum(end["end"] not in (0, "done before") for end in ends)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
