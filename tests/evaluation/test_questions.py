"""Questions are drawn and tokenised once, and files in RULER's format are read."""

import copy
import dataclasses
import json

import numpy as np
import pytest

from jaxkv.evaluation.questions import (
    CHAT_WORDS,
    Cell,
    apart,
    as_chat,
    counter,
    draw_questions,
    draw_sample,
    judge,
)
from jaxkv.evaluation.task_files import read_task_file
from jaxkv.text.chat import encode_chat, speaks_in_chats


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


@pytest.mark.parametrize("system", [None, "be brief"])
def test_a_question_in_a_chat_is_a_turn_of_the_user(tiny_lm, system):
    cell = Cell(task="vt", length=300)
    plain = draw_questions(tiny_lm, [cell], samples=2, seed=7)
    said = [{"role": "system", "content": system}] if system else []
    for before, after in zip(
        plain, as_chat(tiny_lm, plain, system=system), strict=True
    ):
        turn = {"role": "user", "content": before.sample.prompt}
        np.testing.assert_array_equal(after.ids, encode_chat(tiny_lm, [*said, turn]))
        assert after.ids.dtype == np.int32
        assert after.sample.max_new_tokens == before.sample.max_new_tokens + CHAT_WORDS
        assert after.sample.outputs == before.sample.outputs


def test_texts_of_a_file_are_put_into_a_chat(tiny_lm, tmp_path):
    file = tmp_path / "q.jsonl"
    messages = [{"role": "user", "content": "b"}]
    rows = [{"prompt": "a", "outputs": ["x"]}, {"messages": messages, "outputs": ["x"]}]
    file.write_text("\n".join(map(json.dumps, rows)))
    first, second = read_task_file(tiny_lm, file, chat=True, system="s")
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    assert first.ids.tolist() == encode_chat(tiny_lm, asked)
    assert second.ids.tolist() == encode_chat(tiny_lm, messages)
    plain, _ = read_task_file(tiny_lm, file)
    assert plain.ids.tolist() == tiny_lm.tokenizer("a")["input_ids"]


def test_texts_of_a_file_are_tokenised_in_one_call(tiny_lm, tmp_path):
    calls = []

    class Counted(type(tiny_lm.tokenizer)):
        def __call__(self, text, **how):
            calls.append(text)
            return super().__call__(text, **how)

    tokenizer = Counted(tokenizer_object=tiny_lm.tokenizer.backend_tokenizer)
    file = tmp_path / "q.jsonl"
    asked = ["one", [5, 6], "two words", "three"]
    rows = [{"prompt": prompt, "outputs": ["x"]} for prompt in asked]
    file.write_text("\n".join(map(json.dumps, rows)))
    lm = dataclasses.replace(tiny_lm, tokenizer=tokenizer)
    found = [question.ids.tolist() for question in read_task_file(lm, file)]
    assert calls == [["one", "two words", "three"]]
    assert found == [
        prompt if isinstance(prompt, list) else tiny_lm.tokenizer(prompt)["input_ids"]
        for prompt in asked
    ]
    file.write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "prompt": [-1]}])))
    with pytest.raises(ValueError, match=r"q.jsonl:5: has token ids outside"):
        read_task_file(lm, file)


def test_the_beginning_of_an_answer_follows_the_template(tiny_lm, tmp_path):
    file = tmp_path / "q.jsonl"
    row = {"context": "The number is 7.", "question": "\nWhich?", "answer": "7"}
    file.write_text(json.dumps(row | {"answer_prefix": " It is"}))
    asked = [{"role": "user", "content": "The number is 7.\nWhich?"}]
    want = encode_chat(tiny_lm, asked, answer_prefix=" It is")
    (question,) = read_task_file(tiny_lm, file, chat=True)
    assert question.ids.tolist() == want
    (other,) = apart(tiny_lm, [question], chat=True)
    assert other.ids.tolist() == want and 0 < other.document < len(want)
    (plain,) = apart(tiny_lm, read_task_file(tiny_lm, file))
    text = tiny_lm.tokenizer.decode(plain.ids[plain.document :])
    assert text == "\nWhich? It is"


def test_needle_is_no_model_for_chats(tiny_lm):
    assert speaks_in_chats(dataclasses.replace(tiny_lm, name="other"))
    assert not speaks_in_chats(dataclasses.replace(tiny_lm, name="needle"))
    assert not speaks_in_chats(dataclasses.replace(tiny_lm, tokenizer=None))


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
    longest = max(len(first.ids), len(second.ids))
    assert first.cell == second.cell == Cell(task="qa_1", length=longest)
    assert (first.index, second.index) == (0, 7)
    assert second.ids.tolist() == tiny_lm.tokenizer("Who is")["input_ids"]
    assert second.sample.max_new_tokens == 9
    sample = first.sample
    assert not first.by_lines
    assert judge(sample, "it is RED", by_lines=False) == (False, 0.5)
    assert judge(sample, "it is RED", by_lines=False, match="any") == (True, 1.0)
    assert judge(sample, "green", by_lines=False, match="any") == (False, 0.0)


def test_the_public_formats_are_read(tiny_lm, tmp_path):
    path = write(
        tmp_path / "mine.jsonl",
        {
            "context": "A is 1.",
            "question": "A?",
            "answer_prefix": "It is",
            "answer": "1",
        },
        {"context": "B is 2.", "input": "B?", "answers": ["2", "two"], "length": 9},
        {"prompt": [5, 6, 7], "outputs": ["x"], "max_new_tokens": 30},
        {"prompt": "C", "outputs": ["x"], "task": "other"},
    )
    found = read_task_file(tiny_lm, path)
    ids = tiny_lm.tokenizer(["A is 1.\n\nA? It is", "B is 2.\n\nB?", "C"])["input_ids"]
    assert [q.ids.tolist() for q in found] == [*ids[:2], [5, 6, 7], ids[2]]
    assert [q.sample.outputs for q in found[:2]] == [("1",), ("2", "two")]
    assert [q.sample.max_new_tokens for q in found] == [128, 128, 30, 128]
    # One table: one length, and a task for each name.
    assert {q.cell.length for q in found} == {max(map(len, ids))}
    tasks = [("mine", 0), ("mine", 1), ("mine", 2), ("other", 0)]
    assert [(q.cell.task, q.index) for q in found] == tasks


def test_conversations_go_through_the_chat_template(tiny_lm, tmp_path):
    asked = [{"role": "user", "content": "Who?"}]
    path = write(tmp_path / "c.jsonl", {"messages": asked, "outputs": ["x"]})
    tokenizer = copy.deepcopy(tiny_lm.tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"c\.jsonl:1: .* has no chat template"):
        read_task_file(dataclasses.replace(tiny_lm, tokenizer=tokenizer), path)
    tokenizer.chat_template = "{{ messages[0]['content'] }}, said the user. "
    lm = dataclasses.replace(tiny_lm, tokenizer=tokenizer)
    (one,) = read_task_file(lm, path)
    said = tokenizer("Who?, said the user. ", add_special_tokens=False)
    assert one.ids.tolist() == said["input_ids"]


GOOD = {"input": "a", "outputs": ["b"], "index": 0, "answer_prefix": ""}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", r"t\.jsonl:2: not valid JSON"),
        ({"outputs": ["a"]}, r't\.jsonl:2: expected an object with "prompt"'),
        ({"input": "a"}, r't\.jsonl:2: lacks "outputs"'),
        ({"input": "a", "outputs": [""]}, r't\.jsonl:2: "outputs" must be a list'),
        ({"input": "a", "outputs": ["a"], "foo": 1}, r't\.jsonl:2: unknown "foo"'),
        (
            {"turns": ["a", "b"], "outputs": ["a"]},
            "has 1 turns behind the first answer",
        ),
        (
            {"prompt": [5, 99999], "outputs": ["a"]},
            r"t\.jsonl:2: has token ids outside",
        ),
        ({"input": "a", "outputs": ["a"], "index": 0}, "2: index 0 has come before"),
    ],
)
def test_bad_lines_are_refused_with_their_number(tiny_lm, tmp_path, record, message):
    path = write(tmp_path / "t.jsonl", GOOD, record)
    with pytest.raises(ValueError, match=message):
        read_task_file(tiny_lm, path, max_new_tokens=9)


def test_bad_files_are_refused(tiny_lm, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_task_file(tiny_lm, path, max_new_tokens=9)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_task_file(tiny_lm, path, max_new_tokens=9)


def test_a_file_s_name_may_hold_anything(tiny_lm, tmp_path):
    for name in ('a\n,|"b".jsonl', b"b\xff.jsonl".decode("utf-8", "surrogateescape")):
        (one,) = read_task_file(tiny_lm, write(tmp_path / name, GOOD))
        assert one.cell.task.encode()


def test_a_model_without_tokenizer_is_named(tiny_lm):
    class Bare:
        name, tokenizer = "bare", None

    with pytest.raises(ValueError, match="bare has no tokenizer"):
        draw_questions(Bare(), [], samples=1, seed=0)
