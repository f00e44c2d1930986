"""Questions are drawn and tokenised once, and files in RULER's format are read."""

import json

import numpy as np
import pytest

from jaxkv.evaluation.questions import (
    Cell,
    counter,
    draw_questions,
    draw_sample,
    judge,
    read_task_file,
)


def test_a_question_is_the_sample_of_its_number(tiny_lm):
    cells = [Cell(task="vt", length=300), Cell(task="ledger", length=100)]
    made = []
    questions = draw_questions(tiny_lm, cells, samples=2, seed=7, advance=made.append)
    assert made == [2, 4]
    assert [(q.cell.task, q.index) for q in questions] == [
        ("vt", 0),
        ("vt", 1),
        ("ledger", 0),
        ("ledger", 1),
    ]
    count = counter(tiny_lm.tokenizer)
    for q in questions:
        sample = draw_sample(q.cell, count, seed=7, index=q.index)
        assert q.sample == sample
        want = tiny_lm.tokenizer(sample.prompt)["input_ids"]
        np.testing.assert_array_equal(q.ids, want)
        assert q.answer_tokens == count(sample.answer) < sample.max_new_tokens
    assert [q.by_lines for q in questions] == [False, False, True, True]
    sample = questions[0].sample
    assert judge(sample, sample.answer, by_lines=False) == (True, 1.0)
    sample = questions[2].sample
    assert judge(sample, sample.answer, by_lines=True) == (True, 1.0)
    assert not judge(sample, sample.answer + "\nmore", by_lines=True)[0]


def test_the_fast_count_is_the_slow_one(tiny_lm):
    class Slow:
        def __call__(self, text, add_special_tokens):
            return tiny_lm.tokenizer(text, add_special_tokens=add_special_tokens)

    for text in ("", " kimalo", "\n7. naïve 東京", "a b c"):
        fast = counter(tiny_lm.tokenizer)(text)
        assert fast == counter(Slow())(text)


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_depth_places_the_needle_and_changes_nothing_else(tiny_lm, depth):
    def drawn(depth):
        cell = Cell(task="niah_single_1", length=600, depth=depth)
        count = counter(tiny_lm.tokenizer)
        return draw_sample(cell, count, seed=3, index=1)

    sample, other = drawn(depth), drawn(None)
    lines = sample.prompt.split("\n")
    (place,) = [i for i, line in enumerate(lines) if "One of the special" in line]
    before, behind = len("".join(lines[1:place])), len("".join(lines[place + 1 : -1]))
    assert before / (before + behind) == pytest.approx(depth, abs=0.02)
    assert sorted(sample.prompt.replace("\n", " ").split()) == sorted(
        other.prompt.replace("\n", " ").split()
    )
    assert sample.outputs == other.outputs


def write(path, *records):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_task_files(tiny_lm, tmp_path):
    path = write(
        tmp_path / "qa_1.jsonl",
        {"input": "What?", "outputs": ["Red", "blue"], "others": 1, "length": 50},
        "",
        {"index": 7, "input": "Who", "answer_prefix": " is", "outputs": ["x"]},
    )
    first, second = read_task_file(tiny_lm, path, max_new_tokens=9)
    assert first.cell == Cell(task="qa_1", length=50)
    assert second.cell == Cell(task="qa_1", length=max(len(first.ids), len(second.ids)))
    assert (first.index, second.index) == (0, 7)
    assert second.ids.tolist() == tiny_lm.tokenizer("Who is")["input_ids"]
    assert second.sample.max_new_tokens == 9
    sample = first.sample
    assert not first.by_lines
    assert judge(sample, "it is RED", by_lines=False) == (False, 0.5)
    assert judge(sample, "it is RED", by_lines=False, match="any") == (True, 1.0)
    assert judge(sample, "green", by_lines=False, match="any") == (False, 0.0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", r"t\.jsonl:2: not valid JSON"),
        ([1], r"t\.jsonl:2: expected an object, got list"),
        ({"outputs": ["a"]}, r't\.jsonl:2: "input" must be of type str'),
        ({"input": "", "outputs": ["a"]}, '"input" must be of type str and not empty'),
        ({"input": "a"}, r't\.jsonl:2: "outputs" must be a list of texts'),
        ({"input": "a", "outputs": []}, '"outputs" must be a list'),
        ({"input": "a", "outputs": [""]}, '"outputs" must be a list'),
        ({"input": "a", "outputs": "a"}, '"outputs" must be a list'),
        ({"input": "a", "outputs": ["a"], "index": "1"}, '"index" must be of type int'),
        ({"input": "a", "outputs": ["a"], "length": True}, '"length" must be of type'),
        ({"input": "a", "outputs": ["a"], "length": 0}, '"length" is a number of tok'),
        ({"input": "a", "outputs": ["a"], "length": 2**40}, r't\.jsonl:2: "length" is'),
        ({"input": "\ud800", "outputs": ["a"]}, r"t\.jsonl:2: .* half of a pair"),
        ({"input": "a", "outputs": ["\udfff"]}, "half of a pair"),
        ({"input": "a", "outputs": ["a"], "index": 0}, "index 0 has come before"),
    ],
)
def test_bad_lines_are_refused_with_their_number(tiny_lm, tmp_path, record, message):
    good = {"input": "a", "outputs": ["b"], "index": 0, "answer_prefix": ""}
    path = write(tmp_path / "t.jsonl", good, record)
    with pytest.raises(ValueError, match=message):
        read_task_file(tiny_lm, path, max_new_tokens=9)


def test_bad_files_are_refused(tiny_lm, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no line with a question"):
        read_task_file(tiny_lm, path, max_new_tokens=9)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_task_file(tiny_lm, path, max_new_tokens=9)


def test_a_model_without_tokenizer_is_named(tiny_lm):
    class Bare:
        name, tokenizer = "bare", None

    with pytest.raises(ValueError, match="bare has no tokenizer"):
        draw_questions(Bare(), [], samples=1, seed=0)
