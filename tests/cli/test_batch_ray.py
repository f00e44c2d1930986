"""`jaxkv batch --ray` on a cluster of two workers, one of which is killed."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from jaxkv.serving.lines import Chunk, chunks, read_lines

FLAGS = ["--max-new-tokens=12", "--max-prompt=64", "--batch-size=1"]


@pytest.mark.parametrize("ending", ["", "\n"])
def test_chunks_hold_each_line_once(tmp_path, ending):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(["a", "", "c", "d", "é", "f", "g"]) + ending)
    parts = list(chunks(path, 3))
    assert parts == [Chunk(0, 1, 3), Chunk(5, 4, 3), Chunk(12, 7, 3)]
    found = [line for part in parts for line in read_lines(path, part)]
    assert found == list(read_lines(path))


def test_without_ray(jaxkv_, tiny, tmp_path, monkeypatch):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}')
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    error = jaxkv_.error("batch", source, out, tiny, "--ray=local")
    assert '--ray needs ray; pip install "jaxkv[ray]"' in error
    error = jaxkv_.error("batch", source, out, tiny, "--ray-workers=2")
    assert "--ray-workers does nothing without --ray" in error


def descends(pid: int, ancestor: int) -> bool:
    """Return whether a process was started by another one, or by one of its."""
    while pid > 1 and pid != ancestor:
        status = Path(f"/proc/{pid}/status").read_text()
        pid = int(status.split("PPid:")[1].split()[0])
    return pid == ancestor


def workers() -> list[int]:
    """Return the workers of this process's cluster."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes()
            if name.startswith(b"ray::MapWorker") and descends(
                int(folder.name), os.getpid()
            ):
                found.append(int(folder.name))
        except OSError:
            continue  # it has ended
    return found


@pytest.mark.slow
@pytest.mark.parametrize("order", [[], ["--ordered"]])
def test_a_killed_worker_loses_nothing(jaxkv_, tiny, tmp_path, order):
    pytest.importorskip("ray")
    source, out, other = (tmp_path / f"{n}.jsonl" for n in ("in", "out", "other"))
    prompts = [{"prompt": [n % 4000, n % 7, n % 11]} for n in range(300)]
    source.write_text("\n".join(map(json.dumps, prompts)) + "\nbad\n")
    killed = []

    def kill():
        while not out.exists() or out.read_bytes().count(b"\n") < 40:
            time.sleep(0.05)
        killed.extend(workers()[:1])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    flags = [source, out, tiny, *FLAGS, *order]
    code, _, err = jaxkv_("batch", *flags, "--ray=local", "--ray-workers=2")
    killer.join(60)
    assert code == 2 and "1 of 301 lines" in err
    assert len(killed) == 1
    assert jaxkv_("batch", source, other, tiny, *FLAGS, "--ordered")[0] == 2
    answers, wanted = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (out, other)
    )
    if not order:
        answers.sort(key=lambda answer: answer["line"])
    said = wanted[-1].pop("error")
    assert answers[-1].pop("error").endswith(said[-40:])
    assert answers == wanted
