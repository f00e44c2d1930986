"""`jaxkv generate`: results on stdout, one line on stderr."""

import io
import json
import shutil
import sys

import pytest

import jaxkv
from jaxkv.cli import answers
from jaxkv.text.chat import encode_chat
from jaxkv.text.terminal import TextStream

PROMPT = "The magic number is"


@pytest.fixture
def stdin(monkeypatch):
    def feed(content: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return feed


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_version(jaxkv_):
    assert jaxkv_("--version") == (0, f"jaxkv {jaxkv.__version__}\n", "")


def test_without_a_command_help_is_shown(jaxkv_):
    code, out, err = jaxkv_()
    assert (code, err) == (0, "")
    for name in ("demo", "generate", "eval", "study", "train", "convert", "bench"):
        assert f"  {name} " in out


def test_text_is_that_of_the_library_and_one_line_says_what_ran(jaxkv_, tiny, tiny_lm):
    code, out, err = jaxkv_("generate", tiny, "--prompt", PROMPT)
    assert code == 0
    assert out == jaxkv.generate(tiny_lm, PROMPT).text[0] + "\n"
    first, second = err.splitlines()
    assert first == f"jaxkv: {tiny} on cpu, float32, prefill=xla, decode=xla"
    assert second.endswith("see --chat")


def test_json_schema(jaxkv_, tiny, tiny_lm):
    flags = ["--max-new-tokens", "8", "--budget", "16", "--json", "--seed", "5"]
    flags += ["--prefill", "streaming-llm:n_sink=2"]
    flags += ["--decode", "streaming-llm:n_sink=2"]
    code, out, err = jaxkv_("generate", tiny, "--prompt", PROMPT, *flags)
    (record,) = records(out)
    policy = jaxkv.StreamingLLM(n_sink=2)
    want = jaxkv.generate(
        tiny_lm, PROMPT, max_new_tokens=8, budget=16, prefill=policy, decode=policy
    )
    timing = record.pop("timing")
    versions = record.pop("versions")
    assert (code, err.count("\n")) == (0, 2)  # and that it speaks in chats
    assert record == {
        "text": want.text[0],
        "token_ids": list(want.tokens[0]),
        "prompt_tokens": len(tiny_lm.tokenizer(PROMPT)["input_ids"]),
        "finish_reason": "length",
        "cache_bytes": want.stats.cache_bytes,
        "batch_size": 1,
        "seed": 5,
        "prefill_implementation": "xla",
        "decode_implementation": "xla",
        "drafts": None,
        "model": str(tiny),
        "dtype": "float32",
        "device": "cpu",
        "options": {
            "max_new_tokens": 8,
            "sampler": {"name": "Greedy", "repetition_penalty": 1.0},
            "stop_ids": None,
            "prefill_implementation": None,
            "decode_implementation": None,
            "budget": 16,
            "compression_ratio": None,
            "prefill": {"name": "StreamingLLM", "n_sink": 2},
            "decode": {"name": "StreamingLLM", "n_sink": 2},
            "speculate": None,
            "accept": {"name": "Exact"},
        },
    }
    assert set(timing) == {"compile_s", "prefill_s", "decode_s", "tokens_per_s"}
    assert all(isinstance(seconds, float) for seconds in timing.values())
    assert {"python", "jax", "jaxkv"} <= set(versions)


def test_drafts_change_nothing_and_are_told_of(jaxkv_, tiny):
    text = "one two three one two three one two"
    common = ["generate", tiny, "--prompt", text, "--json", "--max-new-tokens", "20"]
    drafts = ["--speculate", "aligned:num_draft_tokens=6,depth=3,break_even=0"]
    (plain,), (record,) = (records(jaxkv_(*common, *more)[1]) for more in ([], drafts))
    assert record["token_ids"] == plain["token_ids"]
    told = record["drafts"]
    assert told["steps"] >= told["steps_with_draft"]
    assert told["mal_with_bonus"] == pytest.approx(19 / told["steps"])
    assert sum(told["drafted_by_depth"]) == told["drafted"]
    assert sum(told["drafted_by_kind"].values()) == told["drafted"]
    assert 0 <= told["unexpected"] <= 1
    assert told["matcher_ms"] > 0
    _, _, err = jaxkv_(*common, *drafts)
    assert f"{told['accepted']} of {told['drafted']} drafted tokens accepted" in err
    assert err.count("\n") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--speculate", "magic"], "unknown 'magic'; choose one of none, prompt"),
        (["--speculate", "none:depth=3"], "unknown 'none:depth=3'; choose one of none"),
        (["--speculate", "tree:depth=0"], "depth must be at least 1"),
        (["--accept", "top-k"], "does nothing without drafts; add --speculate"),
        (["--speculate=tree", "--decode=h2o", "--budget=64"], "cannot verify drafts"),
        (["--accept", "typical:mass=1"], "no option of typical"),
        (
            ["--speculate=tree", "--accept=conditional", "--temperature=1"],
            "is lossy, and defined for greedy",
        ),
        (
            ["--speculate=tree", "--decode=streaming-llm", "--budget=8"],
            "does not fit into the 8 slots",
        ),
    ],
)
def test_bad_speculation_gets_one_line(jaxkv_, tiny, flags, message):
    assert message in jaxkv_.error("generate", tiny, "--prompt", PROMPT, *flags)


def test_outputs_do_not_depend_on_the_batch_size(jaxkv_, tiny):
    prompts = [f"--prompt=number {i}" for i in range(3)]
    common = [*prompts, "--json", "--temperature", "1.5", "--top-k", "50", "--seed=7"]
    by_size = [
        records(jaxkv_("generate", tiny, *common, "--batch-size", size)[1])
        for size in (1, 2)
    ]
    one, two = ([r["token_ids"] for r in rows] for rows in by_size)
    assert one == two
    assert [r["seed"] for r in by_size[1]] == [7, 8, 9]
    assert [r["batch_size"] for r in by_size[1]] == [2, 2, 1]
    # A row can be had again alone, with the seed that it reports.
    alone = jaxkv_("generate", tiny, *common[2:], "--seed", "9")[1]
    assert records(alone)[0]["token_ids"] == one[2]
    assert records(alone)[0]["cache_bytes"] == by_size[1][0]["cache_bytes"]


def test_several_texts_are_separated_by_an_empty_line(jaxkv_, tiny, tiny_lm):
    _, out, _ = jaxkv_(
        *("generate", tiny, "--prompt=a b", "--prompt=c d", "--prompt=e f"),
        *("--batch-size", "2", "--max-new-tokens", "3"),
    )
    texts = jaxkv.generate(tiny_lm, ["a b", "c d", "e f"], max_new_tokens=3).text
    assert out == "\n".join(text + "\n" for text in texts)


def test_prompts_of_every_source_are_the_same(jaxkv_, tiny, tiny_lm, stdin, tmp_path):
    ids = tiny_lm.tokenizer(PROMPT)["input_ids"]
    (tmp_path / "a.txt").write_text(PROMPT + "\n")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + PROMPT.encode() + b"\r\n")
    lines = [{"prompt": PROMPT}, {"input": PROMPT, "outputs": ["7"]}, {"prompt": ids}]
    (tmp_path / "c.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    files = [f"--prompt-file={tmp_path / n}" for n in ("a.txt", "bom.txt", "c.jsonl")]
    flags = ["--json", "--max-new-tokens", "4"]
    rows = records(jaxkv_("generate", tiny, "--prompt", PROMPT, *files, *flags)[1])
    stdin(PROMPT.encode() + b"\n")
    rows += records(jaxkv_("generate", tiny, *flags)[1])
    assert len(rows) == 7
    assert {tuple(row["token_ids"]) for row in rows} == {tuple(rows[0]["token_ids"])}
    assert {row["prompt_tokens"] for row in rows} == {len(ids)}


def test_nothing_of_a_record_is_dropped(jaxkv_, tiny, tiny_lm, tmp_path):
    """Prompts of known formats are those of the same texts put together by hand."""
    user = [{"role": "user", "content": "a b?"}]
    given = [
        {"input": "a b?", "answer_prefix": " It is", "outputs": ["c"], "length": 9},
        {"input": "b?", "context": "a", "answers": ["c"], "length": 9},
        {"context": "a ", "question": "b?", "answer_prefix": "It is", "answer": ["c"]},
        {"turns": ["a b?"], "question_id": 1, "category": "qa"},
        {"messages": user},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, given)))
    flags = ["--prompt-file", tmp_path / "x.jsonl", "--json", "--max-new-tokens=4"]
    plain, chat = (
        [r["token_ids"] for r in records(jaxkv_("generate", tiny, *flags, *more)[1])]
        for more in ([], ["--chat"])
    )
    texts = ["a b? It is", "a\n\nb?", "a b? It is"]
    begun = tiny_lm.tokenizer.apply_chat_template(
        user, add_generation_prompt=True, tokenize=False
    )
    begun = {
        prefix: tiny_lm.tokenizer(begun + prefix, add_special_tokens=False)["input_ids"]
        for prefix in ("", " It is")
    }
    out = jaxkv.generate(tiny_lm, [*texts, *begun.values()], max_new_tokens=4).tokens
    assert list(map(tuple, plain)) == [*out[:3], out[3], out[3]]
    assert tuple(chat[0]) == tuple(chat[2]) == out[4]
    assert chat[3:] == plain[3:]


def test_turns_are_asked_behind_each_answer(jaxkv_, tiny, tiny_lm, tmp_path):
    given = [{"turns": ["a b?", "c?", "d?"]}, {"turns": ["e"]}, {"turns": ["f", "g"]}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, given)))
    flags = ["--prompt-file", tmp_path / "x.jsonl", "--max-new-tokens=5", "--seed=3"]
    flags += ["--temperature=1"]
    rows = records(jaxkv_("generate", tiny, *flags, "--json")[1])
    asked = [(row.get("prompt"), row.get("turn"), row["seed"]) for row in rows]
    first = [(0, 0, 3), (None, None, 4), (2, 0, 5)]
    assert asked == [*first, (0, 1, 3), (2, 1, 5), (0, 2, 3)]
    said = [{"role": "user", "content": "a b?"}]
    for row, turn in zip([rows[0], rows[3], rows[5]], ["c?", "d?", ""], strict=True):
        ids = encode_chat(tiny_lm, said)
        out = jaxkv.generate(
            *(tiny_lm, [ids]),
            max_new_tokens=5,
            seed=[3],
            sampler=jaxkv.Categorical(temperature=1.0),
        )
        assert row["token_ids"] == list(out.tokens[0])
        assert row["prompt_tokens"] == len(ids)
        said += [{"role": "assistant", "content": row["text"]}]
        said += [{"role": "user", "content": turn}]
    # The text has the same answers, with an empty line between two.
    _, text, _ = jaxkv_("generate", tiny, *flags)
    assert text == "\n".join(row["text"] + "\n" for row in rows)


def test_chat(jaxkv_, tiny, tiny_lm):
    message = [{"role": "user", "content": PROMPT}]
    text = tiny_lm.tokenizer.apply_chat_template(
        message, add_generation_prompt=True, tokenize=False
    )
    ids = tiny_lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    _, out, _ = jaxkv_("generate", tiny, "--prompt", PROMPT, "--chat", "--json")
    assert records(out)[0]["prompt_tokens"] == len(ids)
    assert records(out)[0]["token_ids"] == list(
        jaxkv.generate(tiny_lm, [ids]).tokens[0]
    )


def test_system(jaxkv_, tiny, tiny_lm, tmp_path):
    """It goes in front of prompts in a chat, and of conversations in files."""
    user = {"role": "user", "content": PROMPT}
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": [user]}) + "\n")
    ids = encode_chat(tiny_lm, [{"role": "system", "content": "be brief"}, user])
    answer = list(jaxkv.generate(tiny_lm, [ids]).tokens[0])
    for prompt in (["--chat", "--prompt", PROMPT], ["--prompt-file", file]):
        flags = ["generate", tiny, *prompt, "--system=be brief", "--json"]
        _, out, _ = jaxkv_(*flags)
        assert records(out)[0]["prompt_tokens"] == len(ids)
        assert records(out)[0]["token_ids"] == answer
    err = jaxkv_.error("generate", tiny, "--prompt", PROMPT, "--system=x")
    assert "--prompt 1: --system goes with --chat" in err
    said = [{"role": "system", "content": "be long"}, user]
    file.write_text(json.dumps({"messages": said}) + "\n")
    err = jaxkv_.error("generate", tiny, "--prompt-file", file, "--system=x")
    assert "chats.jsonl:1: the conversation has a system's message" in err


def test_a_model_made_for_chats_says_so(jaxkv_, tiny, tmp_path):
    ids = tmp_path / "ids.jsonl"
    ids.write_text('{"prompt": [3, 4, 5]}\n')
    line = f"jaxkv: {tiny} has a chat template, and is asked without; see --chat\n"
    few = ["--max-new-tokens=1"]
    for model, flags, said in (
        (tiny, ["--prompt=a"], True),
        (tiny, ["--prompt=a", "--chat"], False),
        (tiny, ["--prompt-file", ids], False),
        ("needle", ["--prompt=a"], False),
    ):
        code, _, err = jaxkv_("generate", model, *flags, *few)
        assert (code, line in err) == (0, said), (model, flags)


def test_stop_id(jaxkv_, tiny, tiny_lm):
    tokens = jaxkv.generate(tiny_lm, PROMPT).tokens[0]
    stops = ["--stop-id", "3", "--stop-id", tokens[0]]
    _, out, _ = jaxkv_("generate", tiny, "--prompt", PROMPT, "--json", *stops)
    assert records(out)[0]["finish_reason"] == "stop"
    assert records(out)[0]["token_ids"] == [tokens[0]]


def test_streamed_text_is_the_whole_text(jaxkv_, tiny, monkeypatch):
    common = ["generate", tiny, "--prompt", PROMPT, "--temperature", "2", "--seed", "3"]
    pieces = []
    monkeypatch.setattr(answers, "_write", pieces.append)
    assert jaxkv_(*common, "--stream")[0] == 0
    streamed = list(pieces)
    pieces.clear()
    jaxkv_(*common, "--no-stream")
    assert len(streamed) > 2
    assert "".join(streamed) == "".join(pieces)


def test_stream_holds_back_half_a_character(tiny_lm):
    text = "naïve 東京 🙂 end"
    written = []
    stream = TextStream(tiny_lm.tokenizer, written.append)
    for token in tiny_lm.tokenizer(text, add_special_tokens=False)["input_ids"]:
        stream([[token]])
    stream.finish(text)
    assert "".join(written) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in written)


def test_checkpoint_without_tokenizer(jaxkv_, tiny, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare, ignore=shutil.ignore_patterns("*token*"))
    ids = tmp_path / "ids.jsonl"
    ids.write_text('{"prompt": [5, 6, 7]}')
    code, out, _ = jaxkv_("generate", bare, "--prompt-file", ids, "--max-new-tokens=2")
    assert code == 0 and all(part.isdecimal() for part in out.split())
    for flags in (["--prompt=x"], ["--chat", "--prompt=x"], ["--stream"]):
        flags = flags if "--prompt=x" in flags else [*flags, "--prompt-file", ids]
        assert "no " in jaxkv_.error("generate", bare, *flags)
    assert "no tokenizer" in jaxkv_.error("demo", bare)
    assert "no tokenizer" in jaxkv_.error("eval", bare)
