"""`predictions.csv`: what is read of it, whatever has become of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxkv.evaluation.rows import COLUMNS, parse, to_text, typed


def row(index, prediction='a\nb,"c" é', **changes):
    values = dict.fromkeys(COLUMNS, 1) | {"depth": "", "prediction": prediction}
    return values | {"index": index} | changes


def indices(found):
    return [int(row["index"]) for row in found.rows]


TEXTS = st.text(st.sampled_from('a",\n\r \x00é|\t1') | st.characters(codec="utf-8"))


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=6))
def test_what_is_written_is_read(texts):
    rows = [row(i, text, method=name) for i, (text, name) in enumerate(texts)]
    found = parse(to_text(rows, header=True).encode())
    assert found.sound
    assert found.rows == [{k: str(v) for k, v in one.items()} for one in rows]


DAMAGES = {
    "a lost end": lambda lines: lines[3].rpartition(b",")[0] + b',"a"b',
    "an open quote": lambda lines: lines[3].rpartition(b",")[0] + b',"a',
    "a field too many": lambda lines: lines[3] + b",1",
    "a field too few": lambda lines: lines[3].rpartition(b",")[0],
    "no number": lambda lines: lines[3].replace(b"1,,2,", b"x,,2,"),
    "no score": lambda lines: lines[3].replace(b"1,,2,1", b"1,,2,nan"),
    "no UTF-8": lambda lines: lines[3] + b"\xff\xfe",
    "nothing but noughts": lambda lines: b"\0" * len(lines[3]),
    "half a row": lambda lines: lines[3][:9],
    "two halves": lambda lines: lines[3][:9] + b"\r\n" + lines[3][9:],
    "something else": lambda lines: b"merge conflict\n=======\nHEAD",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("prediction", ["plain", "two\nlines", 'say "so",\r\nthen'])
def test_one_damaged_row_takes_no_other_with_it(damage, prediction):
    rows = [row(i, f"{prediction} {i}") for i in range(6)]
    pieces = [to_text([one], header=False).encode() for one in rows]
    lines = [to_text([], header=True).encode(), *pieces]
    whole = b"".join(lines)
    good = DAMAGES[damage]([piece.removesuffix(b"\r\n") for piece in lines])
    lines[3] = good + b"\r\n"
    damaged = b"".join(lines)
    assert damaged != whole
    found = parse(damaged)
    assert indices(found) == [0, 1, 3, 4, 5]
    assert [d.row for d in found.damaged] == [3]
    begin = whole[: whole.index(pieces[2])].count(b"\n") + 1
    assert found.damaged[0].line == begin
    last = begin + found.damaged[0].text.count("\n")
    lines = f"line {begin}" if last == begin else f"lines {begin} to {last}"
    assert found.faults() == [f"row 3 ({lines}) is damaged"]
    text = found.damaged[0].text.encode("utf-8", "surrogateescape")
    assert text.rstrip() == good.rstrip()


@given(st.lists(TEXTS, min_size=3, max_size=5), st.data())
def test_cut_anywhere_it_holds_the_rows_before(texts, data):
    rows = [row(i, text) for i, text in enumerate(texts)]
    pieces = [to_text([one], header=False).encode() for one in rows]
    head = to_text([], header=True).encode()
    content = head + b"".join(pieces)
    cut = data.draw(st.integers(len(head), len(content)))
    ends = [len(head) + sum(map(len, pieces[: n + 1])) for n in range(len(rows))]
    found = parse(content[:cut])
    assert indices(found) == [n for n, end in enumerate(ends) if end <= cut]
    whole = sum(end <= cut for end in ends)
    torn = cut not in [len(head), *ends]
    assert [d.row for d in found.damaged] == [whole + 1] * torn


@pytest.mark.parametrize("lost", [1, 2, 8, 9, 12])
def test_a_row_of_several_lines_that_is_not_finished_is_one_damage(lost):
    content = to_text([row(0), row(1, "one\r\ntwo\nthree")], header=True).encode()
    found = parse(content[:-lost])
    (damage,) = found.damaged
    assert indices(found) == [0]
    assert content[:-lost].rstrip(b"\n").endswith(damage.text.encode())
    assert damage.text.startswith("1,1,1,1,1,,1,")


def test_a_row_counts_once_however_often_it_is_there():
    rows = [row(0, "first"), row(1), row(0, "second"), row(1)]
    found = parse(to_text(rows, header=True).encode())
    assert indices(found) == [0, 1] and found.rows[0]["prediction"] == "first"
    assert found.faults() == ["2 rows are there more than once"]
    assert not found.sound


def test_line_breaks_of_an_editor_and_empty_lines_change_nothing():
    text = to_text([row(0, "a"), row(1, "b")], header=True)
    assert indices(parse(text.replace("\r\n", "\n").encode())) == [0, 1]
    assert indices(parse((text + "\r\n\r\n").encode())) == [0, 1]


def test_many_damages_are_counted():
    lines = [to_text([row(i, "a")], header=False) for i in range(20)]
    lines[1::2] = ["x\r\n"] * 10
    found = parse((to_text([], header=True) + "".join(lines)).encode())
    assert indices(found) == list(range(0, 20, 2))
    (fault,) = found.faults()
    assert fault.startswith("rows 2 (line 3), 4 (line 5)")
    assert fault.endswith("and 5 more are damaged")


@pytest.mark.parametrize("content", [b"", b"a,b\r\n1,2\r\n", b'"a', b"\xff\r\n"])
def test_another_file_is_refused(content):
    with pytest.raises(ValueError, match="has other columns than method, budget,"):
        parse(content)


def test_numbers_are_read_as_they_are_written():
    text = {name: str(value) for name, value in row(2, depth=0.5).items()}
    assert typed(text)["depth"] == 0.5 and typed(text)["index"] == 2
    text |= {"depth": "", "budget_tokens": ""}
    assert typed(text)["depth"] is None and typed(text)["budget_tokens"] is None
    for name, value in (("score", "1.5"), ("exact", "2")):
        with pytest.raises(ValueError, match="scores are from 0 to 1"):
            typed(text | {name: value})
    with pytest.raises(ValueError, match="depths are from 0 to 1"):
        typed(text | {"depth": "inf"})


def test_a_field_may_be_longer_than_csv_s_default_allows():
    content = to_text([row(0, "a" * 200_000), row(1)], header=True).encode()
    assert indices(parse(content)) == [0, 1]
