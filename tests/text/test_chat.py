"""Conversations through chat templates, which are programs and may fail in any way."""

import copy
import dataclasses
import re

import pytest

from jaxkv.text.chat import encode_chat, encode_documents, encode_question

SYSTEM = {"role": "system", "content": "Be  brief."}
USER = {"role": "user", "content": "The number is 5. "}
ANSWER = {"role": "assistant", "content": "<think>so</think> 5"}


def with_template(lm, template):
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = template
    return dataclasses.replace(lm, tokenizer=tokenizer)


def test_a_conversation_is_what_the_template_says(tiny_lm):
    messages = [SYSTEM, USER, ANSWER, USER]
    want = tiny_lm.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    ids = encode_chat(tiny_lm, messages)
    assert ids == want
    assert ids.count(tiny_lm.tokenizer.bos_token_id) == 1
    prefixed = encode_chat(tiny_lm, messages, answer_prefix=" It is")
    text = tiny_lm.tokenizer.decode(ids) + " It is"
    assert tiny_lm.tokenizer.decode(prefixed) == text
    assert prefixed[: len(ids)] == ids


def test_a_template_may_trim_and_take_out_reasoning(tiny_lm):
    lm = with_template(
        tiny_lm,
        "{% for m in messages %}{{ m.content.split('</think>')[-1] | trim }}|"
        "{% endfor %}",
    )
    ids = encode_chat(lm, [SYSTEM, USER, ANSWER, USER])
    want = "Be  brief.|The number is 5.|5|The number is 5.|"
    assert lm.tokenizer.decode(ids) == want


FAILING = {  # a template, and how the message goes on
    "TypeError": ("{{ messages[0]['content'] + ['x'] }}", "TypeError: "),
    "ZeroDivisionError": ("{{ 1 // 0 }}", "ZeroDivisionError: "),
    "IndexError": ("{{ ''[messages | length:] .x.y }}", "UndefinedError: "),
    "KeyError": ("{{ '%(a)s' | format(b=1) }}", "KeyError: "),
    "OverflowError": ("{% for i in range(10 ** 30) %}{% endfor %}", "OverflowError: "),
    "syntax": ("{% if %}", "TemplateSyntaxError: "),
    "its own": ("{{ raise_exception('no system\nhere') }}", "TemplateError: no system"),
    "filter": ("{{ messages | frobnicate }}", "TemplateAssertionError: "),
    "unsafe": ("{{ messages.__class__.mro() }}", "SecurityError: "),
    "several, none of them the default": ({"tool_use": "x"}, "ValueError: "),
    "recursion": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "RecursionError: ",
    ),
}


@pytest.mark.parametrize(("template", "message"), FAILING.values(), ids=FAILING)
def test_a_template_that_fails_is_named(tiny_lm, template, message):
    said = f"the chat template of {tiny_lm.name} fails: {message}"
    with pytest.raises(ValueError, match=re.escape(said)):
        encode_chat(with_template(tiny_lm, template), [USER])


@pytest.mark.parametrize(("left_out", "number"), [("system", 1), ("user", 2)])
def test_a_template_that_leaves_a_message_out_is_refused(tiny_lm, left_out, number):
    lm = with_template(
        tiny_lm,
        "{% for m in messages if m.role != '"
        + left_out
        + "' %}{{ m.content }}{% endfor %}",
    )
    said = f"leaves out message {number}, of the role {left_out}"
    with pytest.raises(ValueError, match=said):
        encode_chat(lm, [SYSTEM, USER])


@pytest.mark.parametrize(
    "encode",
    [
        lambda lm, bad: encode_chat(lm, [USER], answer_prefix=bad),
        lambda lm, bad: encode_chat(lm, [SYSTEM | {"content": bad}, USER]),
        lambda lm, bad: encode_documents(lm, ["fine", bad]),
        lambda lm, bad: encode_question(lm, bad),
    ],
    ids=["prefix", "message", "document", "question"],
)
def test_half_of_a_pair_is_refused(tiny_lm, encode):
    said = r"a conversation is no valid Unicode: it has '\udcff', half of a pair"
    with pytest.raises(ValueError, match=re.escape(said)):
        encode(tiny_lm, "a \udcff b")


@pytest.mark.parametrize("template", [None, ""])
def test_no_template(tiny_lm, template):
    with pytest.raises(ValueError, match="has no chat template; write prompts"):
        encode_chat(with_template(tiny_lm, template), [USER])
    bare = dataclasses.replace(tiny_lm, tokenizer=None)
    with pytest.raises(ValueError, match="has no chat template"):
        encode_chat(bare, [USER])


@pytest.mark.parametrize("mark", ["\ue000jaxkv\ue000", "\ue0000\ue001", "\ue0000"])
@pytest.mark.parametrize("where", ["system", "document", "question", "template"])
def test_a_document_and_its_question_are_a_message_whatever_they_say(
    tiny_lm, mark, where
):
    said = {"system": "Brief.", "document": "It is 5.", "question": "Which?"}
    before = mark if where == "template" else ""
    lm = with_template(
        tiny_lm,
        before + "{% for m in messages %}<{{ m.content }}>{% endfor %}" + before,
    )
    if where in said:
        said[where] = f"{mark} {said[where]} {mark}"
    system, document, question = said.values()
    (head,) = encode_documents(lm, [document], system=system)
    tail = encode_question(lm, question)
    whole = f"{before}<{system}><{document}\n\n{question}>{before}"
    assert lm.tokenizer.decode(head) + lm.tokenizer.decode(tail) == whole
