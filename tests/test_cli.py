"""The command line: results on stdout, one line on stderr, errors without traceback."""

import csv
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import types

import jax
import pytest
import typer

import jaxkv
from jaxkv import cli, generate_command, needle_train
from jaxkv.language_model import needle_folder
from jaxkv.models.decoder import Config, random_parameters
from jaxkv.models.hf_export import write_qwen3
from jaxkv.terminal import TextStream

CONFIG = Config(
    vocab_size=4096,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=2048,
    qk_norm=True,
    tied=True,
)
PROMPT = "The magic number is"
SMALL = ["--budget", "16", "--prefill", "streaming-llm", "--decode", "streaming-llm"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with random weights and the tokenizer of needle."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    params = random_parameters(CONFIG, jax.random.key(0), dtype=jax.numpy.float32)
    tokenizer = sorted(needle_folder().glob("*token*.json"))
    ids = {"bos_id": 0, "stop_ids": [1], "pad_id": 2}
    write_qwen3(params, CONFIG, folder, extra_files=tokenizer, **ids)
    return folder


@pytest.fixture(scope="session")
def lm(tiny):
    return jaxkv.load(tiny)


@pytest.fixture
def jaxkv_(capsys):
    """Run the command line in this process; returns exit code, stdout and stderr."""

    def run(*arguments):
        code = cli.main(["--no-compilation-cache", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def stdin(monkeypatch):
    def feed(content: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return feed


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def one_error(code, out, err) -> str:
    assert (code, out) == (2, "")
    assert err.startswith("jaxkv: error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    assert "Traceback" not in err
    return err


def test_version(jaxkv_):
    assert jaxkv_("--version") == (0, f"jaxkv {jaxkv.__version__}\n", "")


def test_without_a_command_help_is_shown(jaxkv_):
    code, out, err = jaxkv_()
    assert (code, err) == (0, "")
    for name in ("demo", "generate", "eval", "train", "convert", "bench"):
        assert f"  {name} " in out


def test_text_is_that_of_the_library_and_one_line_says_what_ran(jaxkv_, tiny, lm):
    code, out, err = jaxkv_("generate", tiny, "--prompt", PROMPT)
    assert code == 0
    assert out == jaxkv.generate(lm, PROMPT).text[0] + "\n"
    assert err == f"jaxkv: {tiny} on cpu, float32, prefill=xla, decode=xla\n"


def test_json_schema(jaxkv_, tiny, lm):
    flags = ["--max-new-tokens", "8", "--budget", "16", "--json", "--seed", "5"]
    flags += ["--prefill", "streaming-llm:n_sink=2"]
    flags += ["--decode", "streaming-llm:n_sink=2"]
    code, out, err = jaxkv_("generate", tiny, "--prompt", PROMPT, *flags)
    (record,) = records(out)
    policy = jaxkv.StreamingLLM(n_sink=2)
    want = jaxkv.generate(
        lm, PROMPT, max_new_tokens=8, budget=16, prefill=policy, decode=policy
    )
    timing = record.pop("timing")
    versions = record.pop("versions")
    assert (code, err.count("\n")) == (0, 1)
    assert record == {
        "text": want.text[0],
        "token_ids": list(want.tokens[0]),
        "prompt_tokens": len(lm.tokenizer(PROMPT)["input_ids"]),
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


def test_drafts_change_nothing_and_are_told_of(jaxkv_, tiny, lm):
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
    _, _, err = jaxkv_(*common, *drafts)
    assert f"{told['accepted']} of {told['drafted']} drafted tokens accepted" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--speculate", "magic"], "--speculate: unknown 'magic'"),
        (["--speculate", "tree:depth=0"], "depth must be >= 1"),
        (["--accept", "top-k"], "does nothing without drafts"),
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
    result = jaxkv_("generate", tiny, "--prompt", PROMPT, *flags)
    assert message in one_error(*result)


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


def test_several_texts_are_separated_by_an_empty_line(jaxkv_, tiny, lm):
    _, out, _ = jaxkv_(
        *("generate", tiny, "--prompt=a b", "--prompt=c d", "--prompt=e f"),
        *("--batch-size", "2", "--max-new-tokens", "3"),
    )
    texts = jaxkv.generate(lm, ["a b", "c d", "e f"], max_new_tokens=3).text
    assert out == "\n".join(text + "\n" for text in texts)


def test_prompts_of_every_source_are_the_same(jaxkv_, tiny, lm, stdin, tmp_path):
    ids = lm.tokenizer(PROMPT)["input_ids"]
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


def test_chat(jaxkv_, tiny, lm):
    message = [{"role": "user", "content": PROMPT}]
    text = lm.tokenizer.apply_chat_template(
        message, add_generation_prompt=True, tokenize=False
    )
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    _, out, _ = jaxkv_("generate", tiny, "--prompt", PROMPT, "--chat", "--json")
    assert records(out)[0]["prompt_tokens"] == len(ids)
    assert records(out)[0]["token_ids"] == list(jaxkv.generate(lm, [ids]).tokens[0])


def test_stop_id(jaxkv_, tiny, lm):
    tokens = jaxkv.generate(lm, PROMPT).tokens[0]
    stops = ["--stop-id", "3", "--stop-id", tokens[0]]
    _, out, _ = jaxkv_("generate", tiny, "--prompt", PROMPT, "--json", *stops)
    assert records(out)[0]["finish_reason"] == "stop"
    assert records(out)[0]["token_ids"] == [tokens[0]]


def test_streamed_text_is_the_whole_text(jaxkv_, tiny, monkeypatch):
    common = ["generate", tiny, "--prompt", PROMPT, "--temperature", "2", "--seed", "3"]
    pieces = []
    monkeypatch.setattr(generate_command, "_write", pieces.append)
    assert jaxkv_(*common, "--stream")[0] == 0
    streamed = list(pieces)
    pieces.clear()
    jaxkv_(*common, "--no-stream")
    assert len(streamed) > 2
    assert "".join(streamed) == "".join(pieces)


def test_stream_holds_back_half_a_character(lm):
    text = "naïve 東京 🙂 end"
    written = []
    stream = TextStream(lm.tokenizer, written.append)
    for token in lm.tokenizer(text, add_special_tokens=False)["input_ids"]:
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
        assert "no " in one_error(*jaxkv_("generate", bare, *flags))
    assert "no tokenizer" in one_error(*jaxkv_("demo", bare))
    assert "no tokenizer" in one_error(*jaxkv_("eval", bare))


BAD_GENERATE = {
    "empty prompt": (["--prompt", ""], "--prompt 1: the prompt is empty"),
    "blank prompt": (["--prompt", " \n"], "empty"),
    "long prompt": (["--prompt", "a 1 " * 3000], "made for 2048; shorten"),
    "long output": (["--prompt=x", "--max-new-tokens=9999"], "made for 2048"),
    "no output": (["--prompt=x", "--max-new-tokens=0"], "--max-new-tokens"),
    "small budget": (["--prompt=x", *SMALL, "--budget=4"], "at least 5"),
    "no budget": (["--prompt=x", "--decode=streaming-llm"], "needs --budget"),
    "budget without policy": (["--prompt", "a " * 50, "--budget=9"], "StreamingLLM"),
    "zero budget": (["--prompt=x", "--budget=0"], "--budget"),
    "two budgets": (
        ["--prompt=x", *SMALL, "--compression-ratio=.5"],
        "compression_ratio=, not both",
    ),
    "ratio": (["--prompt=x", "--compression-ratio=2"], "[0, 1)"),
    "huge n_sink": (
        ["--prompt=x", "--budget=16", f"--decode=streaming-llm:n_sink={2**40}"],
        "n_sink",
    ),
    "policy": (["--prompt=x", "--prefill=magic"], "--prefill: unknown 'magic'"),
    "policy's option": (["--prompt=x", "--decode=full:a=1"], "no option of full"),
    "dtype": (["--prompt=x", "--dtype=int3"], "float32"),
    "negative seed": (["--prompt=x", "--seed=-1"], "--seed"),
    "word for a number": (["--prompt=x", "--seed=abc"], "--seed"),
    "temperature": (["--prompt=x", "--temperature=-1"], "temperature must be > 0"),
    "nan": (["--prompt=x", "--temperature=nan"], "temperature must be > 0"),
    "top_p": (["--prompt=x", "--temperature=1", "--top-p=2"], "top_p"),
    "top_k": (["--prompt=x", "--temperature=1", "--top-k=-2"], "top_k"),
    "idle min_p": (["--prompt=x", "--min-p=.1"], "--min-p does nothing"),
    "penalty": (["--prompt=x", "--repetition-penalty=0"], "repetition_penalty"),
    "stop id": (["--prompt=x", f"--stop-id={2**40}"], "--stop-id"),
    "triton": (["--prompt=x", "--decode-implementation=triton"], "NVIDIA GPU"),
    "kernel": (["--prompt=x", "--decode-implementation=magic"], "implementation"),
    "stream": (["--prompt=x", "--stream", "--json"], "--stream takes one prompt"),
    "no file": (["--prompt-file=/no/such/file"], "/no/such/file: No such file"),
    "folder": (["--prompt-file=/"], "/: Is a directory"),
    "unknown flag": (["--prompt=x", "--frobnicate"], "--frobnicate"),
}


@pytest.mark.parametrize("case", BAD_GENERATE)
def test_bad_input_of_generate(jaxkv_, tiny, case):
    arguments, message = BAD_GENERATE[case]
    assert message in one_error(*jaxkv_("generate", tiny, *arguments))


BAD_FILES = {
    "latin.txt": (b"caf\xe9", "latin.txt is not UTF-8 text (byte 3 is 0xe9)"),
    "empty.txt": (b"\n", "empty.txt: the prompt is empty"),
    "none.jsonl": (b"\n", "none.jsonl: holds no prompt"),
    "broken.jsonl": (b'{"prompt": "a"}\n{', "broken.jsonl:2: not valid JSON"),
    "key.jsonl": (b'{"text": "a"}', 'key.jsonl:1: expected an object with "prompt"'),
    "list.jsonl": (b"[1]", "list.jsonl:1: expected"),
    "bool.jsonl": (b'{"prompt": [true]}', "bool.jsonl:1: expected"),
    "id.jsonl": (b'{"prompt": [5000]}', "outside [0, 4096)"),
    "no_ids.jsonl": (b'{"prompt": []}', "no_ids.jsonl:1: the prompt is empty"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(jaxkv_, tiny, tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    flag = f"--prompt-file={tmp_path / name}"
    assert message in one_error(*jaxkv_("generate", tiny, flag))


def test_bad_standard_input(jaxkv_, tiny, stdin, monkeypatch):
    stdin(b"")
    assert "standard input: the prompt" in one_error(*jaxkv_("generate", tiny))
    stdin(b"\xff")
    assert "standard input is not UTF-8" in one_error(*jaxkv_("generate", tiny))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert "no prompt" in one_error(*jaxkv_("generate", tiny))


BAD_COMMANDS = {
    "unknown command": (["frobnicate"], "frobnicate"),
    "unknown model": (["generate", "no/model", "--prompt=x"], "no/model"),
    "no model name": (["generate", "no such model", "--prompt=x"], "neither"),
    "demo too short": (["demo", "{tiny}", "--length=100"], "--length"),
    "unknown task": (["eval", "{tiny}", "--tasks=vt,sudoku"], "'sudoku'; choose"),
    "bad length": (["eval", "{tiny}", "--lengths=64,-1"], "--lengths takes"),
    "short task": (["eval", "{tiny}", "--tasks=vt", "--lengths=20"], "length >="),
    "no samples": (["eval", "{tiny}", "--samples=0"], "--samples"),
    "eval seed": (["eval", "{tiny}", "--seed=-3"], "--seed"),
    "eval on a file": (["eval", "{tiny}", "--out={file}"], "File exists"),
    "eval below a file": (["eval", "{tiny}", "--out={file}/a"], "Not a directory"),
    "steps": (["train", "{tmp}/out", "--steps-scale=0"], "--steps-scale"),
    "convert where": (["convert", "{tiny}"], "OUT"),
    "convert to a file": (["convert", "{tiny}", "{file}"], "not a folder"),
    "convert what": (["convert", "{tmp}", "{tmp}/out"], "config.json"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_input_of_commands(jaxkv_, tiny, tmp_path, case):
    arguments, message = BAD_COMMANDS[case]
    (tmp_path / "file").write_text("")
    places = {"tiny": tiny, "tmp": tmp_path, "file": tmp_path / "file"}
    error = one_error(*jaxkv_(*(argument.format(**places) for argument in arguments)))
    assert message.lower() in error.lower()


def test_truncated_checkpoint(jaxkv_, tiny, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (shard,) = broken.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    error = one_error(*jaxkv_("generate", broken, "--prompt=x"))
    assert shard.name in error


@pytest.fixture
def failing(monkeypatch):
    """Let the generation of every prompt raise an exception."""

    def fail(error):
        def generate(*_, **__):
            raise error

        monkeypatch.setattr(generate_command, "generate", generate)

    return fail


def test_out_of_memory_says_what_to_lower(jaxkv_, tiny, failing):
    failing(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\n9 GiB"))
    error = one_error(*jaxkv_("generate", tiny, "--prompt=x"))
    assert "out of memory; lower --batch-size" in error
    failing(MemoryError())
    assert "out of memory" in one_error(*jaxkv_("generate", tiny, "--prompt=x"))


def test_full_disk(jaxkv_, tiny, failing):
    failing(OSError(28, "No space left on device", "/full/file"))
    error = one_error(*jaxkv_("generate", tiny, "--prompt=x"))
    assert "/full/file: No space left on device" in error


def test_interrupt(jaxkv_, tiny, failing):
    failing(KeyboardInterrupt())
    assert jaxkv_("generate", tiny, "--prompt=x") == (130, "", "")


@pytest.mark.parametrize(
    "error",
    [TypeError("ours"), KeyError("ours"), jax.errors.JaxRuntimeError("INTERNAL: ours")],
)
def test_faults_of_ours_keep_their_traceback(jaxkv_, tiny, failing, error):
    failing(error)
    with pytest.raises(type(error), match="ours"):
        jaxkv_("generate", tiny, "--prompt=x")


def test_debug_shows_where_an_error_comes_from(jaxkv_, tiny):
    with pytest.raises(ValueError, match="made for 2048"):
        jaxkv_("--debug", "generate", tiny, "--prompt=x", "--max-new-tokens=9999")


def test_missing_device(jaxkv_, tiny, monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", devices)
    assert "no device" in one_error(*jaxkv_("generate", tiny, "--prompt=x"))


def test_demo(jaxkv_, tiny):
    code, out, err = jaxkv_("demo", tiny, "--length", "500", "--seed", "1")
    assert (code, err.count("\n")) == (0, 1)
    assert "What is the" in out and "Find all" in out
    assert out.count(" full ") == out.count(" small ") == 4
    assert "lines right" in out
    last = out.splitlines()[-1]
    assert last.startswith("Full cache: 0 of 4 right") and last.endswith("in all.")


def test_eval(jaxkv_, tiny, tmp_path):
    out = tmp_path / "deep" / "out"
    common = ["eval", tiny, "--tasks=vt,ledger", "--lengths=300", "--answers=128"]
    common += ["--samples=3", "--batch-size=2", *SMALL]
    code, text, err = jaxkv_(*common, "--out", out)
    assert (code, err.count("\n")) == (0, 1)
    assert "vt" in text and "ledger" in text
    names = {"predictions.csv", "metrics.json", "config.json", "run_meta.json"}
    assert {path.name for path in out.iterdir()} == names
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cells = [("vt", "300"), ("ledger", "128")]
    assert [(r["task"], r["length"]) for r in rows] == [c for c in cells for _ in "123"]
    assert len(json.loads(rows[0]["outputs"])) == 5
    config, metrics, meta = (
        json.loads((out / f"{name}.json").read_text())
        for name in ("config", "metrics", "run_meta")
    )
    assert config["options"]["decode"] == {"name": "StreamingLLM", "n_sink": 4}
    assert config["cells"][1] == {"task": "ledger", "length": 128}
    assert {"command", "date", "device", "versions", "seconds"} <= set(meta)
    # 2 layers, 2 heads, 16 slots: keys and values of 8 floats, a position; a target.
    for row in metrics["metrics"]:
        assert row["cache_bytes"] == 2 * 2 * (16 * (2 * 8 * 4 + 4) + 4)
        assert (row["samples"], row["accuracy"]) == (3, 0)
    printed = json.loads(jaxkv_(*common, "--json")[1])
    assert printed["metrics"] == metrics["metrics"]
    assert printed["config"] == config


def test_convert(jaxkv_, tiny, tmp_path):
    copy = tmp_path / "copy"
    assert jaxkv_("convert", tiny, copy)[0] == 0
    assert "already holds" in one_error(*jaxkv_("convert", tiny, copy))
    assert "copy already" in one_error(*jaxkv_("convert", copy, tmp_path / "b"))
    assert jaxkv_("convert", tiny, copy, "--overwrite")[0] == 0
    outputs = [
        jaxkv_("generate", folder, "--prompt", PROMPT)[1] for folder in (tiny, copy)
    ]
    assert outputs[0] == outputs[1]


def test_convert_keeps_the_dtype(jaxkv_, tiny, tmp_path):
    half = tmp_path / "half"
    assert jaxkv_("convert", tiny, half, "--dtype=bfloat16")[0] == 0
    assert json.loads((half / "jaxkv.json").read_text())["dtype"] == "bfloat16"


def test_train(jaxkv_, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(needle_train, "train", lambda *a, **k: calls.append((a, k)))
    assert jaxkv_("train", tmp_path, "--steps-scale=0.01", "--workers=3")[0] == 0
    ((recipe, out), options) = calls[0]
    default = needle_train.Recipe()
    assert [s.steps for s in recipe.stages] == [
        round(s.steps / 100) for s in default.stages
    ]
    assert recipe.warmup == default.warmup // 100
    assert dataclasses.replace(
        recipe, stages=default.stages, warmup=default.warmup
    ) == (default)
    assert out == tmp_path
    assert options == {
        "tokenizer_folder": needle_folder(),
        "workers": 3,
        "save_every": 1000,
    }


def test_train_without_optax(jaxkv_, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda _: None)
    error = one_error(*jaxkv_("train", tmp_path))
    assert "pip install 'jaxkv[train]'" in error


@pytest.fixture
def stub_bench(monkeypatch):
    app = typer.Typer()
    seen = []

    @app.command()
    def decode(batch: str = "1", json: bool = False):
        seen.append((batch, json))
        if batch == "0":
            raise ValueError("batch")
        if batch == "2":
            raise typer.Exit(2)

    stub = types.ModuleType("jaxkv.bench")
    stub.app = app
    monkeypatch.setitem(sys.modules, "jaxkv.bench", stub)
    return seen


def test_bench_is_handed_its_flags(jaxkv_, stub_bench):
    assert jaxkv_("bench", "decode", "--batch", "1,8", "--json")[0] == 0
    assert stub_bench == [("1,8", True)]
    assert jaxkv_("bench", "decode", "--batch", "2")[0] == 2
    one_error(*jaxkv_("bench", "decode", "--batch", "0"))
    code, out, _ = jaxkv_("bench", "decode", "--help")
    assert code == 0 and "jaxkv bench decode" in out


@pytest.fixture
def cache_options():
    """The options of JAX's compilation cache, put back afterwards."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield names[0]
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_users_compilation_cache_is_left_alone(cache_options, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "ours"))
    jax.config.update(cache_options, str(tmp_path / "theirs"))
    cli._use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
    assert not (tmp_path / "ours").exists()


def test_a_home_that_cannot_be_written(cache_options, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    jax.config.update(cache_options, None)
    cli._use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir is None


def test_processes(tiny, tmp_path):
    """A cold run fills the cache; a warm one meets a reader that has gone."""
    program = [
        sys.executable,
        "-c",
        "from jaxkv.cli import main; raise SystemExit(main())",
    ]
    command = [*program, "generate", str(tiny), "--prompt", PROMPT, "--json"]
    settings = {
        "stdin": subprocess.DEVNULL,
        "stderr": subprocess.PIPE,
        # Buffered, as for users; unbuffered, nothing would be left for the end.
        "env": os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONUNBUFFERED": ""},
        "text": True,
        # In the repository `python -c` would find the folder, not the package.
        "cwd": tmp_path,
    }
    cold = subprocess.run(command, stdout=subprocess.PIPE, check=True, **settings)
    assert len(records(cold.stdout)) == 1
    assert cold.stderr.count("\n") == 1, cold.stderr
    assert len(list((tmp_path / "jaxkv" / "xla").iterdir())) > 2
    # The JSON is flushed as it is printed, the version at the end.
    for arguments in (command, [*command[:3], "--version"]):
        read_end, write_end = os.pipe()
        os.close(read_end)
        gone = subprocess.run(arguments, stdout=write_end, check=False, **settings)
        os.close(write_end)
        assert (gone.returncode, gone.stderr) == (1, "")
