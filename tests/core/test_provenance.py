"""Where a measurement was made, and that a file is whole or is the old one."""

from pathlib import Path

import pytest

from jaxkv.provenance import write_json, write_whole


def test_a_new_file_in_a_new_folder(tmp_path):
    file = tmp_path / "new" / "a.csv"
    write_whole(file, "één\r\n")
    assert file.read_bytes() == "één\r\n".encode()  # no line break is translated
    assert list(file.parent.iterdir()) == [file]  # nothing half-written is left


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_crash_leaves_the_old_file(tmp_path, monkeypatch, step):
    file = tmp_path / "a.json"
    write_whole(file, "old")

    def crash(path, content):
        if step == "write_bytes":
            with open(path, "wb") as half:
                half.write(content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, step, crash)
    with pytest.raises(OSError, match="No space left"):
        write_json(file, {"new": 1})
    assert file.read_text() == "old"
