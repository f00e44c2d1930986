"""`jaxkv batch`: each line is answered once, whatever happens on the way."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import jaxkv

FLAGS = ["--max-new-tokens=12", "--max-prompt=64", "--batch-size=2", "--temperature=1"]


@pytest.fixture
def lines(tmp_path):
    """A file of 12 lines, of which one is empty and three are bad."""
    records = [{"prompt": f"number {n}", "id": f"n{n}"} for n in range(12)]
    records[3] = {"messages": [{"role": "user", "content": "hello"}]}
    records[5] = {"prompt": list(range(65))}
    records[6] = {"turns": ["one", "two"]}
    texts = [json.dumps(record) for record in records]
    texts[2], texts[9] = "", "{"
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(texts))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_is_answered_and_gone_on_with(jaxkv_, tiny, tiny_lm, lines, tmp_path):
    out = tmp_path / "out.jsonl"
    command = ["batch", lines, out, tiny, *FLAGS, "--ordered"]
    meshes = "--mesh=model=1, data=1", "--mesh=auto"  # two words for one mesh
    err = jaxkv_(*command, meshes[0])
    assert err[:2] == (2, "")
    *said, last = err[2].splitlines()
    assert "3 of 11 lines of" in last and "Traceback" not in err[2]
    for number, what in ((6, "the prompt has 65 tokens"), (7, "several turns")):
        assert any(f"in.jsonl:{number}: " in line and what in line for line in said)
    whole = read(out)
    assert [a["line"] for a in whole] == [1, 2, *range(4, 13)]
    assert [a["line"] for a in whole if "error" in a] == [6, 7, 10]
    assert [a.get("id") for a in whole[:3]] == ["n0", "n1", None]
    alone = jaxkv.generate(
        tiny_lm,
        ["number 4"],
        max_new_tokens=12,
        sampler=jaxkv.Categorical(),
        seed=4,
    )
    fifth = whole[3]
    assert (fifth["text"], fifth["seed"]) == (alone.text[0], 4)
    assert tuple(fifth["token_ids"]) == alone.tokens[0]
    # Killed in the middle of a line, and the command once more.
    kept = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(kept[:5]) + kept[5][:9])
    assert jaxkv_(*command, meshes[1])[0] == 2
    assert read(out) == whole
    error = jaxkv_.error(*command, "--seed=1")
    assert "other settings (--mesh, --seed);" in error


def test_a_share_of_each_prompt_may_be_removed(jaxkv_, tiny, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "one two three four five six seven"}')
    share = ["--compression-ratio=0.5", "--prefill=streaming-llm"]
    assert jaxkv_("batch", source, out, tiny, "--max-new-tokens=3", *share)[0] == 0
    (answer,) = read(out)
    text = "one two three four five six seven"
    alone = jaxkv.generate(
        jaxkv.load(tiny),
        [text],
        max_new_tokens=3,
        compression_ratio=0.5,
        prefill=jaxkv.StreamingLLM(),
    )
    assert tuple(answer["token_ids"]) == alone.tokens[0]


def test_lines_may_be_questions_about_a_context(jaxkv_, tiny, tmp_path):
    source, out, folder = (tmp_path / n for n in ("in.jsonl", "out.jsonl", "context"))
    source.write_text('{"prompt": "one two"}\n{"messages": 3}\n{"prompt": [5, 6]}')
    lm = jaxkv.load(tiny)
    context = jaxkv.compress(lm, ["a b c d e f g"], budget=4, prefill=jaxkv.KNorm())
    jaxkv.save_context(context, folder)
    command = ["batch", source, out, "--context", folder, "--max-new-tokens=3"]
    assert jaxkv_(*command)[0] == 2
    first, bad, last = sorted(read(out), key=lambda answer: answer["line"])
    questions = ["one two", [5, 6]]
    alone = jaxkv.generate(lm, questions, context=context, max_new_tokens=3)
    assert tuple(tuple(a["token_ids"]) for a in (first, last)) == alone.tokens
    assert '"messages" must be a list' in bad["error"]
    error = jaxkv_.error(*command, "--chat")
    assert "--chat and --system come before the document" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--compression-ratio=2", "is the fraction removed, in [0, 1); got 2.0"),
        ("--stop-id=4096", "4096, which ends nothing"),
    ],
)
def test_what_no_line_could_have_is_refused_once(jaxkv_, tiny, tmp_path, flag, said):
    """It was written as the answer of each line, which then counted as answered."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert said in jaxkv_.error("batch", source, out, tiny, flag)
    assert not out.exists() or not out.read_text()


@pytest.mark.slow  # half a minute of processes
def test_a_killed_process_loses_and_repeats_nothing(jaxkv_, tiny, tmp_path):
    source, out, other = (tmp_path / f"{n}.jsonl" for n in ("in", "out", "other"))
    prompts = [{"prompt": [n % 4000, n % 7, n % 11]} for n in range(600)]
    source.write_text("\n".join(map(json.dumps, prompts)))
    flags = ["batch", source, out, tiny, *FLAGS]
    for wanted in (40, 200):
        run = subprocess.Popen([sys.executable, "-m", "jaxkv", *map(str, flags)])
        while not out.exists() or out.read_bytes().count(b"\n") < wanted:
            assert run.poll() is None
            time.sleep(0.05)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        assert wanted <= out.read_bytes().count(b"\n") < 600
    assert jaxkv_(*flags)[0] == 0
    assert jaxkv_("batch", source, other, tiny, *FLAGS, "--ordered")[0] == 0
    assert sorted(read(out), key=lambda answer: answer["line"]) == read(other)
    assert len(read(other)) == 600
