"""`jaxkv serve`, and `jaxkv chat --server`."""

import dataclasses
import importlib.util
import io
import os
import signal
import subprocess
import sys
import urllib.request

import pytest
from server.http_served import Running, wait_until

from jaxkv.text.chat import encode_chat

for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)
pytest.importorskip("openai")


@pytest.fixture(scope="module")
def served(wide_lm):
    with Running(wide_lm, key="the key") as it:
        yield it


@pytest.fixture
def key(tmp_path):
    (tmp_path / "key").write_text("the key\n")
    return tmp_path / "key"


@pytest.fixture
def talk(jaxkv_, monkeypatch, served, key):
    def with_lines(*lines, flags=()):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        given = ["--server", served.url, "--api-key-file", key, "--max-new-tokens=9"]
        return jaxkv_("chat", *given, *flags)

    return with_lines


def test_a_conversation_with_a_server(talk, served, tiny_lm):
    lines = [
        "/stats",
        "one",
        "two",
        "/budget 5",
        "three",
        "/budget all",
        "/reset",
        "one",
        "/x",
        "/exit",
    ]
    code, out, err = talk(*lines, flags=["--system", "S"])
    assert code == 0
    first = out.partition("\n")[0]
    assert out.endswith(f"\n{first}\n")  # greedy, and the system's words stay
    said = [{"role": "system", "content": "S"}, {"role": "user", "content": "one"}]
    tokens = len(encode_chat(tiny_lm, said))
    assert err.count(f"{tokens} tokens read, 9 written (budget the server's)") == 2
    said += [
        {"role": "assistant", "content": first},
        {"role": "user", "content": "two"},
    ]
    assert f"{len(encode_chat(tiny_lm, said))} tokens read" in err
    assert "nothing said yet" in err
    # The server has no budget, and says so; the turn is forgotten.
    assert "the server says: This server has no budget" in err


def test_what_a_conversation_with_a_server_refuses(jaxkv_, talk, served, monkeypatch):
    for flag in ("--prefill=snapkv", "--document=1", "--use-generation-config"):
        said = jaxkv_.error("chat", "--server", served.url, flag)
        assert f"{flag.partition('=')[0]} is the server's" in said
    assert "does nothing without --server" in jaxkv_.error("chat", "--api-key-file=x")
    assert "Incorrect API key" in jaxkv_.error("chat", "--server", served.url)
    assert "nothing answers there" in jaxkv_.error(
        "chat", "--server", "http://127.0.0.1:9"
    )
    code, _, err = talk("x", flags=["--temperature=0.5", "--top-k=3", "--seed=4"])
    assert code == 0 and "tokens read" in err
    _, _, err = talk("x" * 2000)
    assert "the server says: A prompt may have 128 tokens here" in err
    before = served.service._terms
    served.service._terms = dataclasses.replace(before, name="no")
    _, _, err = talk("x", flags=["else"])
    served.service._terms = before
    assert "the server says: There is no model of this name" in err
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "needs openai; pip install" in jaxkv_.error("chat", "--server", served.url)
    assert "jaxkv serve needs prometheus_client" in jaxkv_.error("serve", "needle")


def test_what_serve_refuses(jaxkv_, served, tiny, tmp_path):
    (tmp_path / "two").write_text("a\nb\n")
    (tmp_path / "none").write_text("\n")
    for name in ("two", "none"):
        file = tmp_path / name
        assert "must have one line" in jaxkv_.error(
            "serve", tiny, "--api-key-file", file
        )
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    said = jaxkv_.error("serve", tiny, "--api-key-file", tmp_path / "binary")
    assert "binary is no UTF-8 text" in said
    said = jaxkv_.error("serve", tiny, "--host=no.such.invalid")
    assert "no.such.invalid" in said
    assert "evicts and needs --budget" in jaxkv_.error(
        "serve", tiny, "--prefill=snapkv"
    )
    said = jaxkv_.error("serve", tiny, "--max-prompt=2000", "--max-new-tokens=100")
    assert "need more than the 2048 positions that tiny was made for" in said
    said = jaxkv_.error("serve", tiny, f"--port={served.port}", "--max-new-tokens=8")
    assert "Address already in use" in said
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny.iterdir():
        if "token" not in file.name:
            (bare / file.name).write_bytes(file.read_bytes())
    assert "bare has no tokenizer, and answers are texts" in jaxkv_.error("serve", bare)


@pytest.mark.slow
def test_the_command_from_start_to_signal(tiny, tmp_path):
    """With a budget and drafts, in a process of its own."""
    import openai

    flags = ["--port=0", "--rows=2", "--max-prompt=96", "--max-new-tokens=16"]
    flags += ["--budget=64", "--prefill=snapkv", "--speculate=tree", "--name=mine"]
    flags += ["--top-logprobs=1"]
    program = [sys.executable, "-m", "jaxkv", "--no-compilation-cache", "serve"]
    log = tmp_path / "log"
    with log.open("w") as err:
        process = subprocess.Popen(
            [*program, str(tiny), *flags], stderr=err, cwd=tmp_path, env=os.environ
        )
        wait_until(lambda: "/v1;" in log.read_text() or process.poll(), 200)
        (url,) = [w for w in log.read_text().split() if w.startswith("http")]
        url = url.rstrip(";")
        with openai.OpenAI(base_url=url, api_key="-", max_retries=0) as client:
            asked = dict(model="mine", prompt=list(range(5, 95)), max_tokens=16)
            one = client.completions.create(**asked, seed=1)
            assert one.usage.completion_tokens == 16
            small = client.completions.create(
                **asked, temperature=0, extra_body={"budget": 8}
            )
            large = client.completions.create(**asked, temperature=0)
            assert small.choices[0].text != large.choices[0].text
            with pytest.raises(openai.BadRequestError, match="between 1 and 64"):
                client.completions.create(**asked, extra_body={"budget": 65})
            with pytest.raises(openai.BadRequestError, match="has a budget"):
                client.completions.create(**asked, echo=True, logprobs=0)
        assert urllib.request.urlopen(url[:-3] + "/health").status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert str(tiny) not in log.read_text() and "Traceback" not in log.read_text()
