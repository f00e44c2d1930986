"""The rows of `predictions.csv`, and what is still to be read where some are damaged.

A row ends with a line break outside quotes, so a row that has lost a quote would take
what follows with it. Therefore each row is read by itself: what is none is a damaged
row, and the next one begins at the first line from which a whole row can be read.
"""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

COLUMNS = (
    "method",
    "budget",
    "budget_tokens",
    "task",
    "length",
    "depth",
    "index",
    "score",
    "exact",
    "prompt_tokens",
    "output_tokens",
    "truncated",
    "cache_bytes",
    "outputs",
    "prediction",
)
KEY = ("method", "budget", "task", "length", "depth", "index")

MOST_CHARACTERS = 2**31 - 1  # of a field; by default less than a long output has

Key = tuple[str, ...]
Text = Mapping[str, str]


class Damage(NamedTuple):
    """Lines of a file that are no row.

    Attributes:
      row: its number, from 1; the header is none, and what is damaged in a row is one.
      line: of the file, from 1, where it begins.
      text: as it lies there; bytes that are no UTF-8 are surrogates.
    """

    row: int
    line: int
    text: str


class Rows(NamedTuple):
    """What a file holds.

    Attributes:
      rows: each once, as it comes first, all columns as text.
      damaged: what is no row, as the end of one whose writer was stopped.
      repeated: how many rows have come before.
    """

    rows: list[dict[str, str]]
    damaged: list[Damage]
    repeated: int

    @property
    def sound(self) -> bool:
        """Whether the file holds these rows and nothing else."""
        return not (self.damaged or self.repeated)

    def faults(self) -> list[str]:
        """Return what is wrong, a part of a sentence each."""
        found = []
        if self.damaged:
            few = [f"{d.row} ({_lines(d)})" for d in self.damaged[:5]]
            more = len(self.damaged) - len(few)
            rest = f" and {more} more" if more else ""
            many = len(self.damaged) > 1
            rows, verb = ("rows", "are") if many else ("row", "is")
            found.append(f"{rows} {', '.join(few)}{rest} {verb} damaged")
        if self.repeated:
            verb = "rows are" if self.repeated > 1 else "row is"
            found.append(f"{self.repeated} {verb} there more than once")
        return found


def _lines(damage: Damage) -> str:
    more = damage.text.count("\n")
    if not more:
        return f"line {damage.line}"
    return f"lines {damage.line} to {damage.line + more}"


def key(row: Mapping[str, Any]) -> Key:
    """Return what tells a row from all others."""
    return tuple(str(row[name]) for name in KEY)


def to_text(rows: Iterable[Mapping[str, Any]], *, header: bool) -> str:
    """Return rows as they stand in the file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def parse(content: bytes) -> Rows:
    """Read a file.

    Args:
      content: what `to_text` has made, whatever has become of it since.

    Raises:
      ValueError: the file begins with other columns.
    """
    csv.field_size_limit(MOST_CHARACTERS)
    lines = content.decode("utf-8", errors="surrogateescape").split("\n")
    if _fields(lines[0]) != list(COLUMNS):
        raise ValueError(f"has other columns than {', '.join(COLUMNS)}.")
    rows: dict[Key, dict[str, str]] = {}
    damaged: list[Damage] = []
    repeated = 0
    for number, (first, last, row) in enumerate(_pieces(lines), 1):
        if row is None:
            text = "\n".join(lines[first:last])
            damaged.append(Damage(row=number, line=first + 1, text=text))
        else:
            repeated += key(row) in rows
            rows.setdefault(key(row), row)
    return Rows(list(rows.values()), damaged, repeated)


def _pieces(
    lines: Sequence[str],
) -> Iterator[tuple[int, int, dict[str, str] | None]]:
    """Yield first line, line after the last, and the row or None; without the header.

    What stands behind the last line break belongs to a row that was not finished.
    """
    ends = _ends(lines)
    first, count = 1, len(lines) - 1  # of whole lines
    while first < count:
        if not lines[first].rstrip("\r"):  # an empty line is nothing
            first += 1
            continue
        last, row = _row(lines, first, ends)
        if row is None:
            last = first + 1
            while last < count and _row(lines, last, ends)[1] is None:
                last += 1
            if last == count and lines[count]:
                last += 1
        yield first, last, row
        first = last
    if first == count and lines[count]:
        yield first, len(lines), None


def _ends(lines: Sequence[str]) -> list[int]:
    """Return of each line behind which one the quotes are closed that begin there."""
    count = len(lines) - 1
    ends = [0] * count
    within = [0]  # whether each line would begin within quotes
    for line in lines[:count]:
        within.append(within[-1] ^ line.count('"') % 2)
    nearest = {0: count + 1, 1: count + 1}  # line from here on that begins like this
    for number in reversed(range(count)):
        nearest[within[number + 1]] = number + 1
        ends[number] = nearest[within[number]]
    return ends


def _row(
    lines: Sequence[str], first: int, ends: Sequence[int]
) -> tuple[int, dict[str, str] | None]:
    """Return where the row ends that begins at a line, and the row if it is one."""
    last = ends[first]
    if last > len(lines) - 1:
        return last, None
    text = "\n".join(lines[first:last])
    fields = _fields(text)
    if len(fields) != len(COLUMNS) or not _is_text(text):
        return last, None
    row = dict(zip(COLUMNS, fields, strict=True))
    try:
        typed(row)
    except ValueError:
        return last, None
    return last, row


def _fields(text: str) -> list[str]:
    try:
        (fields,) = csv.reader(io.StringIO(text, newline=""), strict=True)
    except (csv.Error, ValueError):
        return []
    return fields


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def typed(row: Text) -> dict[str, Any]:
    """Return a row with numbers for what was text.

    Raises:
      ValueError: something is no number, or a score is none between 0 and 1.
    """
    whole = ["length", "index", "exact", "truncated"]
    whole += ["prompt_tokens", "output_tokens", "cache_bytes"]
    numbers: dict[str, Any] = {name: int(row[name]) for name in whole}
    numbers["score"] = float(row["score"])
    numbers["depth"] = float(row["depth"]) if row["depth"] else None
    numbers["budget_tokens"] = int(row["budget_tokens"] or 0) or None
    if not 0 <= numbers["score"] <= 1 or numbers["exact"] not in (0, 1):
        raise ValueError(f"scores are from 0 to 1, got {row['score']}, {row['exact']}")
    if not math.isfinite(numbers["depth"] or 0):
        raise ValueError(f"depths are from 0 to 1, got {row['depth']}")
    return dict(row) | numbers


def cut(text: str, characters: int) -> str:
    """Return a text of so many characters at most; 0 leaves it whole."""
    if characters == 0 or len(text) <= characters:
        return text
    return text[: characters - 1] + "…"


def was_cut(text: str, characters: int) -> bool:
    """Return whether `cut` has, or may have, made this of a longer text."""
    return 0 < characters == len(text) and text.endswith("…")
