"""One process writes into a folder at a time, and a dead one keeps nobody out."""

import errno
import json
import os
import subprocess
import sys

import pytest

from jaxkv.evaluation import lock
from jaxkv.evaluation.lock import NAME, FolderInUse, one_writer

HOLD = """
import pathlib, sys
from jaxkv.evaluation.lock import one_writer
with one_writer(pathlib.Path(sys.argv[1])):
    print("mine", flush=True)
    sys.stdin.read()
"""


def test_the_second_is_told_who_the_first_is(tmp_path):
    with one_writer(tmp_path):
        message = rf"is being written by process {os.getpid()} on .* since 2.*; wait"
        with pytest.raises(FolderInUse, match=message):
            with one_writer(tmp_path):
                pass
        assert (tmp_path / NAME).exists()  # the second has not taken it away
    with one_writer(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kill", [True, False])
def test_another_process_holds_it_as_long_as_it_lives(tmp_path, kill):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "mine\n"
    with pytest.raises(FolderInUse, match=f"process {process.pid} on"):
        with one_writer(tmp_path):
            pass
    if kill:
        process.kill()
    process.communicate()
    assert (tmp_path / NAME).exists() == kill
    with one_writer(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_new_folder_goes_again_if_nothing_is_in_it(tmp_path):
    with one_writer(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with one_writer(tmp_path / "new"):
        (tmp_path / "new" / "a").touch()
    assert (tmp_path / "new" / "a").exists()


@pytest.mark.parametrize(
    ("whose", "free"),
    [
        ("", True),  # of a process that was killed at once
        ("[1]", True),
        ({"pid": 2**22 + 1}, True),  # more than Linux gives
        ({"pid": "x"}, True),
        ({"pid": os.getpid()}, False),
        ({"pid": 1}, False),  # somebody else's
        ({"host": "another", "pid": 2**22 + 1}, False),
    ],
)
@pytest.mark.parametrize("how", ["no locks", "no fcntl"])
def test_where_no_file_can_be_locked_it_is_asked_who_lives(
    tmp_path, monkeypatch, whose, free, how
):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if how == "no locks":
        monkeypatch.setattr(lock.fcntl, "flock", flock)
    else:
        monkeypatch.setattr(lock, "fcntl", None)
    if isinstance(whose, dict):
        whose = json.dumps({"host": lock.platform.node()} | whose)
    (tmp_path / NAME).write_text(whose)
    if free:
        with one_writer(tmp_path):
            pass
        return
    with pytest.raises(FolderInUse, match=rf"remove .*{NAME}"):
        with one_writer(tmp_path):
            pass
    assert (tmp_path / NAME).read_text() == whose


def test_a_lock_that_is_taken_away_meanwhile_is_made_anew(tmp_path, monkeypatch):
    """As the one who had it does between our opening the file and locking it."""
    ours, removed = lock._lock, []

    def late(file):
        if not removed:
            removed.append((tmp_path / NAME).unlink())
        return ours(file)

    monkeypatch.setattr(lock, "_lock", late)
    with one_writer(tmp_path):
        assert (tmp_path / NAME).exists() and removed


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock.os, "write", write)
    with pytest.raises(OSError, match=rf"No space left on device: '.*{NAME}'"):
        with one_writer(tmp_path):
            pass
    assert not list(tmp_path.iterdir())
