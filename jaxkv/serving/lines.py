"""Files of lines that are too long for the memory: read one by one, answered once."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxkv.provenance import write_json

_LONGEST = 64 * 2**20  # bytes of a line
_HEAD = 4096  # bytes that tell one file from another
_SETTINGS = ".job"  # behind the name of the output


class Line(NamedTuple):
    """A line of a file.

    Attributes:
      number: from 1.
      text: without the line break; "" if there is an error.
      error: what is wrong with it, or None.
    """

    number: int
    text: str
    error: str | None


class Chunk(NamedTuple):
    """Lines of a file that follow each other.

    Attributes:
      offset: of the first one's first byte.
      first: its number.
      lines: how many they are.
    """

    offset: int
    first: int
    lines: int


def check_files(source: Path, out: Path) -> None:
    """Check that lines can be read more than once, and answers be gone on with.

    Args:
      source: the lines.
      out: the answers; it need not exist.

    Raises:
      ValueError: one is a device, a pipe or a folder, or they are the same.
    """
    for path in (source, out):
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no ordinary file; name one.")
    if out.exists() and source.exists() and out.samefile(source):
        raise ValueError(f"{out} has the prompts; name another file for the answers.")


def chunks(path: Path, size: int) -> Iterator[Chunk]:
    """Yield the chunks of a file, of `size` lines each but for the last one."""
    offset, first, count, end = 0, 1, 0, 0
    with open(path, "rb") as file:
        while raw := file.readline(_LONGEST):
            end += len(raw)
            if not raw.endswith(b"\n"):
                continue  # the file's last line, or one that is too long
            count += 1
            if count == size:
                yield Chunk(offset, first, count)
                offset, first, count = end, first + count, 0
    if end > offset:
        yield Chunk(offset, first, size)


def read_lines(path: Path, chunk: Chunk | None = None) -> Iterator[Line]:
    """Yield the lines of a file that hold something, one in memory at a time.

    Args:
      path: of the file.
      chunk: of it; None is all of it.
    """
    with open(path, "rb") as file:
        file.seek(chunk.offset if chunk else 0)
        number = chunk.first - 1 if chunk else 0
        while raw := file.readline(_LONGEST + 1):
            number += 1
            if chunk and number == chunk.first + chunk.lines:
                return
            error, text = None, ""
            if len(raw) > _LONGEST:
                error = f"the line has more than {_LONGEST} bytes; shorten it."
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(_LONGEST)
            else:
                raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                try:
                    text = raw.decode().strip()
                except UnicodeDecodeError as bad:
                    error = f"the line is no UTF-8 text (byte {bad.start}); convert it."
            if text or error:
                yield Line(number, text, error)


def count_lines(path: Path) -> int:
    """Return how many lines a file has, empty ones included."""
    count, last = 0, b"\n"
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            count, last = count + part.count(b"\n"), part[-1:]
    return count + (last != b"\n")


class Numbers:
    """A set of line numbers that takes a bit for each line."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def __len__(self) -> int:
        """Return how many there are."""
        return self._count

    def __contains__(self, number: int) -> bool:
        """Return whether this one is there."""
        byte, bit = divmod(number, 8)
        return byte < len(self._bits) and bool(self._bits[byte] >> bit & 1)

    def add(self, number: int) -> None:
        """Put a number in."""
        if number in self:
            return
        byte, bit = divmod(number, 8)
        self._bits.extend(bytes(max(0, byte + 1 - len(self._bits))))
        self._bits[byte] |= 1 << bit
        self._count += 1


class Journal:
    """Answers on disk, one line each; what is there tells what is left.

    A line is written at once and whole, so that a process may be killed at any time:
    what it was writing is cut off by the next one. (It is not forced onto the disk, so
    that a loss of power may cost the newest answers, which then are given again.)

    Attributes:
      done: numbers of the lines that have been answered.
      failed: how many of these by an error.
    """

    def __init__(self, file: int, done: Numbers, failed: int):
        self._file, self.done, self.failed = file, done, failed

    def write(self, number: int, answer: Mapping[str, Any]) -> None:
        """Append the answer to a line, unless it has one."""
        if number in self.done:
            return
        text = json.dumps({"line": number} | dict(answer), allow_nan=False)
        left = memoryview(f"{text}\n".encode())
        while left:
            left = left[os.write(self._file, left) :]
        self.done.add(number)
        self.failed += "error" in answer


@contextlib.contextmanager
def journal(out: Path, source: Path, settings: Mapping[str, Any]) -> Iterator[Journal]:
    """Begin a file of answers, or go on with it.

    Args:
      out: the file; one beside it says what it was begun with.
      source: the lines.
      settings: what the answers depend on, ready for JSON.

    Raises:
      ValueError: the file is another one's, or was begun with other settings.
      OSError: nothing can be written there.
    """
    beside = out.with_name(out.name + _SETTINGS)
    _check_settings(out, beside, source, settings)
    file = os.open(out, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        # A number takes as many bits as there are lines: none is beyond the last byte.
        done, failed, end = _answered(out, source.stat().st_size)
        os.ftruncate(file, end)
        yield Journal(file, done, failed)
    finally:
        os.close(file)


def _check_settings(
    out: Path, beside: Path, source: Path, settings: Mapping[str, Any]
) -> None:
    """Raise unless the answers that are there were begun with these settings."""
    now = json.loads(json.dumps(settings))
    with open(source, "rb") as file:
        head = file.read(_HEAD)
    empty = not out.exists() or not out.stat().st_size
    if empty or not beside.exists():
        if not empty:
            raise ValueError(
                f"{out} exists, and no {beside.name} says how it was made; name "
                "another file, or remove it."
            )
        write_json(beside, {"settings": now, "head": _digest(head), "bytes": len(head)})
        return
    try:
        before = json.loads(beside.read_bytes())
        settings, size, digest = (before[k] for k in ("settings", "bytes", "head"))
        names = sorted({*settings, *now})
        changed = [n for n in names if settings.get(n) != now.get(n)]
        same = _digest(head[:size]) == digest
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{beside} is damaged; remove it and {out} to begin anew."
        ) from error
    if changed:
        raise ValueError(
            f"{out} was begun with other settings ({', '.join(changed)}); name another "
            f"file, give the same ones, or remove {out} and {beside} to begin anew."
        )
    if not same:
        raise ValueError(
            f"{out} was begun for another file than {source}; name another file, or "
            f"remove {out} and {beside} to begin anew."
        )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _answered(out: Path, most: int) -> tuple[Numbers, int, int]:
    """Return what has been answered, how much by errors, and where whole lines end."""
    done, failed, end = Numbers(), 0, 0
    with open(out, "rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                break  # the process was killed while it wrote
            try:
                answer = json.loads(raw)
                if type(answer["line"]) is not int or not 1 <= answer["line"] <= most:
                    raise ValueError
                done.add(answer["line"])
                failed += "error" in answer
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{out} holds a line that is no answer (byte {end}); name another "
                    "file, or remove it."
                ) from error
            end += len(raw)
    return done, failed, end


class Pace:
    """What is said of the progress of a file."""

    def __init__(self, total: int, done: int, clock: Callable[[], float]):
        self._total, self._before, self._clock = total, done, clock
        self._begin, self._tokens = clock(), 0

    def add(self, tokens: int) -> None:
        """Note tokens that were generated."""
        self._tokens += tokens

    def told(self, done: int) -> str:
        """Return rate and time left, where `done` lines have been answered."""
        seconds = max(self._clock() - self._begin, 1e-9)
        new = done - self._before
        if not new:
            return "lines"
        left = (self._total - done) * seconds / new
        hours, minutes = divmod(round(left / 60), 60)
        return (
            f"lines, {new / seconds:.3g}/s, {self._tokens / seconds:.3g} tokens/s, "
            f"{hours}:{minutes:02} h left"
        )
