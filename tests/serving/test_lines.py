"""Files of lines, and the journal of their answers."""

import json
import os
from pathlib import Path

import pytest

from jaxkv.serving import lines
from jaxkv.serving.lines import Line, Numbers, Pace, count_lines, journal, read_lines


def test_lines_are_read_one_by_one_and_bad_ones_named(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "_LONGEST", 20)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\n  \n" + b"x" * 90 + b"\n\xff\nsix \xc2\x85")
    one, long, bad, six = read_lines(path)
    assert (one, six) == (Line(1, "one", None), Line(6, "six", None))
    assert long == Line(4, "", "the line has more than 20 bytes; shorten it.")
    assert bad == Line(5, "", "the line is no UTF-8 text (byte 0); convert it.")
    assert count_lines(path) == 6
    path.write_bytes(b"")
    assert (list(read_lines(path)), count_lines(path)) == ([], 0)


def test_numbers_are_a_set():
    numbers, wanted = Numbers(), {1, 8, 9, 4000, 17}
    for number in (*wanted, 8, 17):
        numbers.add(number)
    assert {n for n in range(5000) if n in numbers} == wanted
    assert len(numbers) == 5


@pytest.fixture
def files(tmp_path):
    """An output that does not exist yet, and the lines that it is for."""
    source = tmp_path / "in.jsonl"
    source.write_text("1\n2\n3\n")
    return tmp_path / "out.jsonl", source


def test_a_journal_goes_on_where_it_was_cut_off(files):
    out, source = files
    with journal(out, source, {"seed": 0}) as written:
        written.write(2, {"text": "two"})
        written.write(3, {"error": "bad"})
        written.write(2, {"text": "again"})
    with open(out, "ab") as file:
        file.write(b'{"line": 1, "te')
    with open(source, "a") as file:
        file.write("4\n")  # more to do
    with journal(out, source, {"seed": 0}) as written:
        assert (len(written.done), written.failed) == (2, 1)
        assert [n for n in range(1, 5) if n not in written.done] == [1, 4]
        written.write(1, {"text": "one"})
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["line"] for answer in found] == [2, 3, 1]
    assert found[0]["text"] == "two"


def refused(files, settings, said):
    with pytest.raises(ValueError, match=said), journal(*files, settings):
        pass


def test_a_journal_of_something_else_is_left_alone(files):
    out, source = files
    out.write_text("mine\n")
    refused(files, {}, r"out.jsonl exists, and no out.jsonl.job says how it was made")
    assert out.read_text() == "mine\n"
    out.unlink()
    with journal(out, source, {"seed": 7}):
        pass  # what has no answers yet binds nobody
    with journal(out, source, {"seed": 0, "chat": None}) as written:
        written.write(1, {})
    refused(files, {"seed": 1}, r"other settings \(seed\); name another file")
    source.write_text("7\n")
    refused(files, {"seed": 0}, "begun for another file than")
    source.write_text("1\n2\n3\n")
    far = '{"line": 99999999999999}'  # that many bits were asked for
    for what in ("mine", "[1]", '{"line": "1"}', '{"line": -1}', far, "[" * 100_000):
        out.write_text(f"{what}\n")
        refused(files, {"seed": 0}, r"a line that is no answer \(byte 0\)")
    out.with_name("out.jsonl.job").write_text("{}")
    refused(files, {"seed": 0}, "out.jsonl.job is damaged")


def test_files_that_cannot_be_gone_on_with(files):
    out, source = files
    lines.check_files(source, out)
    link = source.with_name("link")
    link.symlink_to(source)
    os.mkfifo(pipe := source.with_name("pipe"))
    # /dev/full was read for answers, without an end
    for one, other, said in (
        (source, Path("/dev/full"), "/dev/full is no ordinary file"),
        (source, source.parent, "is no ordinary file"),
        (pipe, out, "pipe is no ordinary file"),
        (source, link, "link has the prompts; name another file"),
    ):
        with pytest.raises(ValueError, match=said):
            lines.check_files(one, other)


def test_what_is_told_of_progress():
    now = iter([0.0, 10.0, 20.0])
    pace = Pace(100, 40, lambda: next(now))
    pace.add(500)
    assert pace.told(40) == "lines"
    assert pace.told(43) == "lines, 0.15/s, 25 tokens/s, 0:06 h left"
