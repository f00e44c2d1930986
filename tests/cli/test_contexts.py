"""`jaxkv compress`, and the commands that take what it has made."""

import io
import json
import re

import pytest

import jaxkv
from jaxkv.text.chat import encode_chat

DOCUMENT = "The number is 7. " * 20
QUESTION = "What is it?"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contexts")
    (folder / "doc.txt").write_text(DOCUMENT + "\n")
    return folder


@pytest.fixture(scope="module")
def folder(tiny, files):
    """A context of a document that begins a user's message."""
    lm = jaxkv.load(tiny)
    context = jaxkv.compress(lm, DOCUMENT, chat=True)
    jaxkv.save_context(context, files / "chat")
    return files / "chat"


def test_a_document_is_compressed_and_asked(jaxkv_, tiny, files):
    out = files / "context"
    command = ("compress", tiny, out, "--prompt-file", files / "doc.txt")
    cut = ("--budget", "10%", "--prefill", "knorm")
    code, printed, said = jaxkv_(*command, *cut)
    assert (code, printed) == (0, "")
    assert "10 of 102 tokens kept by KNorm()" in said
    asked = ("generate", "--context", out, "--json", "--max-new-tokens", 4)
    record = json.loads(jaxkv_(*asked, "--prompt", QUESTION)[1])
    lm = jaxkv.load(tiny)
    context = jaxkv.load_context(out, lm)
    want = jaxkv.generate(lm, QUESTION, context=context, max_new_tokens=4)
    assert tuple(record["token_ids"]) == want.tokens[0]
    assert record["prompt_tokens"] == want.stats.prompt_tokens[0]
    assert "KNorm" in record["context"]
    assert "already holds a context" in jaxkv_.error(*command, *cut)
    assert jaxkv_(*command, "--budget", 3, "--prefill", "tova", "--overwrite")[0] == 0
    assert "3 of" in repr(jaxkv.load_context(out, lm))


def test_a_budget_alone_takes_what_fits_the_protocol(jaxkv_, tiny, files):
    command = ("compress", tiny, "--prompt-file", files / "doc.txt", "--overwrite")
    cut = (files / "alone", "--budget", "10%")
    said = jaxkv_(*command, *cut)[2]
    assert "10 of 102 tokens kept by KVzip(" in said
    said = jaxkv_(*command, *cut, "--question", QUESTION)[2]
    assert "10 of 102 tokens kept by DapQ(" in said
    said = jaxkv_(*command, files / "alone")[2]
    assert "102 of 102 tokens kept by Full()" in said


def test_a_conversation_begins_with_a_document(jaxkv_, tiny, folder, monkeypatch):
    lm = jaxkv.load(tiny)
    chat = jaxkv.Chat.begin(lm, context=jaxkv.load_context(folder, lm))
    plain = jaxkv.Chat.begin(lm)
    for said in (QUESTION, "And now?"):
        chat, out = chat.say(said, max_new_tokens=4)
        whole = said if plain.messages else f"{DOCUMENT}\n\n{said}"
        plain, want = plain.say(whole, max_new_tokens=4)
        assert out.tokens == want.tokens
        assert chat.tokens == plain.tokens
    assert chat.messages[0]["content"] == QUESTION
    evicting = chat.with_budget(len(chat.tokens) + 60)
    _, out = evicting.say("And?", max_new_tokens=4)
    assert out.tokens == plain.say("And?", max_new_tokens=4)[1].tokens
    asked = jaxkv.generate(lm, QUESTION, context=chat.context, max_new_tokens=4)
    prompt = [{"role": "user", "content": f"{DOCUMENT}\n\n{QUESTION}"}]
    want = jaxkv.generate(lm, [encode_chat(lm, prompt)], max_new_tokens=4)
    assert asked.tokens == want.tokens
    typed = ("chat", "--context", folder, "--max-new-tokens", 4)
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION + "\n"))
    assert jaxkv_(*typed)[1].strip() == want.text[0].strip()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("compress", "MODEL", "new", "--budget", "0%"), "--budget takes a number of"),
        (("compress", "MODEL", "new", "--budget", "x"), "--budget takes a number of"),
        (("compress", "MODEL", "new", "--prefill", "tova"), "evicts and needs --budg"),
        (("compress", "MODEL", "new", "--system", "x"), "--system goes with --chat"),
        (("compress", "MODEL", "absent/new"), "is not a folder; make it first"),
        (
            ("compress", "MODEL", "new", "--prompt-file", "chat.jsonl"),
            "chat.jsonl:1: a document is a text, not a conversation",
        ),
        (("generate", "--context", "absent"), "holds no context"),
        (("generate", "--context", "CHAT", "--chat"), "pass them to jaxkv compress"),
        (("generate", "--context", "CHAT", "--document", 1), "has 1 documents, from"),
        (("generate", "--document", 1), "--document does nothing without --context"),
        (
            ("generate", "needle", "--context", "CHAT"),
            "weights are not those of",
        ),
        (
            ("generate", "--context", "CHAT", "--prompt-file", "chat.jsonl"),
            "chat.jsonl:1: a context is asked by prompts",
        ),
        (
            ("generate", "--context", "CHAT", "--budget", 9),
            "--budget with --context is that of a decode policy that evicts",
        ),
        (
            ("generate", "--context", "CHAT", "--max-new-tokens", 2000),
            "has . tokens, which with --max-new-tokens 2000 do .* positions of 2048",
        ),
        (("chat", "--context", "CHAT", "--system", "x"), "pass it to jaxkv compress"),
    ],
)
def test_bad_input_is_one_line(
    jaxkv_, tiny, folder, tmp_path, monkeypatch, command, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}]})
    )
    places = {"MODEL": tiny, "CHAT": folder}
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a b")))
    said = jaxkv_.error(*(places.get(word, word) for word in command))
    assert re.search(message, said), said


def test_a_conversation_refuses_other_contexts(tiny_lm):
    with pytest.raises(ValueError, match="read without a chat template"):
        jaxkv.Chat.begin(tiny_lm, context=jaxkv.compress(tiny_lm, "a b"))
    two = jaxkv.compress(tiny_lm, ["a", "b"], chat=True)
    with pytest.raises(ValueError, match=r"has 2; choose one by context.take\(\[0\]\)"):
        jaxkv.Chat.begin(tiny_lm, context=two)
    with pytest.raises(ValueError, match="chat=True takes a list of texts"):
        jaxkv.compress(tiny_lm, [[5]], chat=True)
    with pytest.raises(ValueError, match="system= does nothing without chat=True"):
        jaxkv.compress(tiny_lm, "a", system="b")
