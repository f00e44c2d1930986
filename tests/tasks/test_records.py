"""One reader of prompts: what each public format means, and what is refused."""

import json
import re

import pytest

from jaxkv.tasks.records import Record, decode_text, read_records

USER = {"role": "user", "content": "Who?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWER = {"role": "assistant", "content": "Me."}

FORMATS = {  # a line, and the fields of its record that differ from the defaults
    "plain": ({"prompt": "a b", "id": "x-1"}, dict(body="a b", name="x-1")),
    "token ids": ({"prompt": [5, 6, 7]}, dict(body=(5, 6, 7))),
    "RULER": (
        {
            "index": 3,
            "input": "A text. What?",
            "answer_prefix": " It is",
            "outputs": ["1", "2"],
            "length": 60,
            "length_w_model_temp": 64,
            "token_position_answer": 9,
        },
        dict(
            body="A text. What?",
            answer_prefix=" It is",
            outputs=("1", "2"),
            index=3,
            length=60,
        ),
    ),
    "RULER, pasted as it is": (
        {"input": "a", "answer_prefix": "b"},
        dict(body="a", answer_prefix="b"),
    ),
    "RULER without a prefix": (
        {"input": "a", "answer_prefix": None, "index": 0.0},
        dict(body="a", index=0),
    ),
    "RULER in columns": (
        {
            "context": "A text.\n",
            "question": "What?",
            "answer_prefix": "It is",
            "answer": ["1"],
            "task": "niah_single_1",
            "max_new_tokens": 128,
        },
        dict(
            body="A text.\nWhat?",
            question="What?",
            answer_prefix=" It is",
            outputs=("1",),
            task="niah_single_1",
            max_new_tokens=128,
        ),
    ),
    "one answer": (
        {"context": "A.", "question": "What?", "answer": "1"},
        dict(body="A.\n\nWhat?", question="\n\nWhat?", outputs=("1",)),
    ),
    "LongBench": (
        {
            "input": "What?",
            "context": "A text.",
            "answers": ["1", "one"],
            "length": 1200,
            "dataset": "made-up",
            "language": "en",
            "all_classes": None,
            "_id": "0f",
        },
        dict(
            body="A text.\n\nWhat?",
            question="\n\nWhat?",
            outputs=("1", "one"),
            name="0f",
            length=1200,
        ),
    ),
    "LongBench's summaries": (
        {"input": "", "context": "A text."},
        dict(body="A text."),
    ),
    "Spec-Bench": (
        {"question_id": 1, "category": "qa", "turns": ["Who?"], "reference": ["I"]},
        dict(messages=(USER,), name=1),
    ),
    "Spec-Bench, two turns": (
        {"question_id": 1, "category": "qa", "turns": ["Who?", "Why?", "So?"]},
        dict(messages=(USER,), later_turns=("Why?", "So?"), name=1),
    ),
    "chat": (
        {"messages": [SYSTEM, USER, ANSWER, USER], "id": 7},
        dict(messages=(SYSTEM, USER, ANSWER, USER), name=7),
    ),
    "chat in parts": (
        {
            "messages": [
                {
                    "role": "user",
                    "name": None,
                    "content": [
                        {"type": "text", "text": "Wh"},
                        {"type": "text", "text": "o?"},
                    ],
                }
            ]
        },
        dict(messages=(USER,)),
    ),
}


def lines(*records) -> bytes:
    return "\n".join(map(json.dumps, records)).encode()


@pytest.mark.parametrize(("line", "want"), FORMATS.values(), ids=FORMATS)
def test_formats(line, want):
    (record,) = read_records(lines(line), "x.jsonl")
    assert record == Record(where="x.jsonl:1", **want)


@pytest.mark.parametrize("line", [line for line, _ in FORMATS.values()], ids=FORMATS)
@pytest.mark.parametrize("key", ["system", "context", "few_shot", "messages", "Input"])
def test_what_is_unknown_beside_a_prompt_is_refused_by_name(line, key):
    """A key that is known, but of another format, either is read or is refused."""
    if key in line:
        return
    given = line | {key: "text that belongs to it"}
    if key == "context" and "input" in line:
        given["answer_prefix"] = "x"  # else it is LongBench's
        key = "answer_prefix"
    refused = "messages" if key == "messages" else key
    with pytest.raises(ValueError, match=r"x\.jsonl:1: unknown ") as error:
        read_records(lines(given), "x.jsonl")
    others = set(line) if refused == "messages" else {refused}
    assert any(f'"{other}"' in str(error.value) for other in others)


def test_the_prompt_of_a_record():
    assert Record(where="x", body="a", answer_prefix=" b").prompt == "a b"
    assert Record(where="x", body=(1, 2)).prompt == (1, 2)
    with pytest.raises(ValueError, match="x:1: a conversation needs a chat template"):
        _ = Record(where="x:1", messages=(USER,)).prompt


def test_files_as_other_systems_write_them():
    """A byte order mark, CRLF, empty lines, and separators within strings."""
    content = b'\xef\xbb\xbf{"prompt": "a\xe2\x80\xa8b"}\r\n\r\n{"prompt": "c"}\r\n'
    first, second = read_records(content, "f")
    assert (first.body, second.body) == ("a\u2028b", "c")
    assert (first.where, second.where) == ("f:1", "f:3")
    assert decode_text(b"\xef\xbb\xbfa\r\n", "f") == "a\r\n"


BAD = {  # a line as bytes or as JSON, and what is said behind its number
    "no JSON": (b"{", "not valid JSON"),
    "a NUL": (b'{"prompt": "a"}\x00', "not valid JSON"),
    "nested without end": (b"[" * 100_000, "not valid JSON"),
    "a long number": (b'{"prompt": [' + b"9" * 5000 + b"]}", "not valid JSON"),
    "a key twice": (
        b'{"prompt": "a", "prompt": "b"}',
        'not valid JSON: "prompt" comes twice in an object',
    ),
    "a list": ([1], 'expected an object, such as {"prompt": "..."}, got [1]'),
    "no key": (
        {"text": "a", "label": 1},
        'expected an object with "prompt", "input", "context" and "question", "turns" '
        'or "messages", got the keys "text", "label"',
    ),
    "nothing": ({}, "got the keys none"),
    "a number": ({"prompt": 5}, '"prompt" must be a text, got 5'),
    "null": ({"prompt": None}, "the prompt is empty"),
    "white space": ({"input": " \n"}, "the prompt is empty"),
    "no ids": ({"prompt": []}, "the prompt is empty"),
    "truth for an id": ({"prompt": [1, True]}, "got true in the list"),
    "texts for ids": ({"prompt": ["a"]}, 'got "a" in the list'),
    "both empty": ({"context": "", "input": ""}, "the prompt is empty"),
    "half a pair": ({"input": "a\ud800"}, '"input" is no valid Unicode: character 1'),
    "half a pair in gold": ({"input": "a", "outputs": ["\ud800"]}, '"outputs" is no'),
    "prefix": ({"input": "a", "answer_prefix": 3}, '"answer_prefix" must be a text'),
    "no list": ({"input": "a", "outputs": "a"}, '"outputs" must be a list of texts'),
    "no gold": ({"input": "a", "outputs": []}, '"outputs" must be a list of texts'),
    "empty gold": ({"input": "a", "answers": ["a", ""]}, '"answers" must be a list'),
    "two golds": (
        {"input": "a", "outputs": ["a"], "answer": "b"},
        '"outputs", "answer" are two kinds of right answers',
    ),
    "index": ({"input": "a", "index": "1"}, '"index" must be a whole number'),
    "half an index": ({"input": "a", "index": 1.5}, "from 0 to 2147483647, got 1.5"),
    "negative": ({"input": "a", "index": -1}, "must be a whole number from 0 to"),
    "length": ({"input": "a", "length": True}, '"length" must be a whole number'),
    "no length": ({"input": "a", "length": 0}, "whole number from 1 to 2147483647"),
    "huge": ({"input": "a", "max_new_tokens": 2**40}, '"max_new_tokens" must be a who'),
    "turns": ({"turns": "Who?"}, '"turns" must be a list of texts, got "Who?"'),
    "no turns": ({"turns": []}, '"turns" must be a list of texts'),
    "empty turn": ({"turns": ["a", " "]}, "turn 2 is empty"),
    "turn": ({"turns": ["a", 2]}, "turn 2 must be a text, got 2"),
    "messages": ({"messages": "hi"}, '"messages" must be a list of objects'),
    "no messages": ({"messages": []}, '"messages" must be a list of objects'),
    "no message": ({"messages": ["hi"]}, "message 1 must be an object with"),
    "role": (
        {"messages": [{"role": "tool", "content": "a"}]},
        'message 1 must have a role among system, user, assistant, got "tool"',
    ),
    "key of a message": (
        {"messages": [USER | {"tool_calls": [1]}]},
        'message 1 has "tool_calls", which is not read here',
    ),
    "content": (
        {"messages": [{"role": "user", "content": 5}]},
        "the content of message 1 must be a text, got 5",
    ),
    "empty message": ({"messages": [USER | {"content": ""}]}, "message 1 is empty"),
    "picture": (
        {"messages": [USER | {"content": [{"type": "image_url", "text": "a"}]}]},
        'message 1 has a part of type "image_url", not "text"',
    ),
    "another part": (
        {"messages": [USER | {"content": [{"type": "text"}]}]},
        'message 1 may have parts {"type": "text", "text": ...} only',
    ),
    "part": (
        {"messages": [USER | {"content": [{"type": "text", "text": 3}]}]},
        "a part of message 1 must be a text, got 3",
    ),
    "answered": (
        {"messages": [USER, ANSWER]},
        'the last message is of the role "assistant", but a model answers a user',
    ),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD)
def test_bad_lines_are_refused_by_number(line, message):
    line = line if isinstance(line, bytes) else json.dumps(line).encode()
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_records(b'{"prompt": "a"}\n' + line, "x.jsonl")
    assert str(error.value).startswith("x.jsonl:2: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_bad_files():
    with pytest.raises(ValueError, match="f: holds no prompt; write a JSON object"):
        read_records(b"\n \r\n", "f")
    with pytest.raises(ValueError, match=r"f is not UTF-8 text \(byte 1 is 0xff\)"):
        read_records(b"a\xff", "f")
