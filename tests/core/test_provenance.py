"""Where a measurement was made, and that a file is whole or is the old one."""

import os
from pathlib import Path

import pytest

from jaxkv.provenance import write_json, write_whole


def test_a_new_file_in_a_new_folder(tmp_path):
    file = tmp_path / "new" / "a.csv"
    write_whole(file, "één\r\n")
    assert file.read_bytes() == "één\r\n".encode()  # no line break is translated
    assert list(file.parent.iterdir()) == [file]  # nothing half-written is left


def test_bytes_are_written_as_they_are(tmp_path):
    write_whole(tmp_path / "a.png", b"\x89\r\n")
    assert (tmp_path / "a.png").read_bytes() == b"\x89\r\n"


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_crash_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    file = tmp_path / "a.json"
    write_whole(file, "old")

    def crash(*_):
        raise error

    monkeypatch.setattr(os if step == "fsync" else Path, step, crash)
    with pytest.raises(type(error)) as raised:
        write_json(file, {"new": 1})
    if isinstance(error, OSError):
        assert (raised.value.errno, raised.value.filename) == (28, str(file))
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]  # what is half-written is taken away
