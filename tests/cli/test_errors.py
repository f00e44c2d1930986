"""Bad input of every command: one line on stderr, exit code 2, no traceback."""

import io
import json
import shlex
import shutil
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxkv.cli import prompts
from jaxkv.cli.main import every_command
from jaxkv.cli.wording import check_empty
from jaxkv.soundness import LogitsError
from jaxkv.text import inference

SMALL = ["--budget", "16", "--prefill", "streaming-llm", "--decode", "streaming-llm"]


@pytest.fixture
def stdin(monkeypatch):
    def feed(content: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return feed


BAD_GENERATE = {
    "empty prompt": (["--prompt", ""], "--prompt 1: the prompt is empty"),
    "blank prompt": (["--prompt", " \n"], "empty"),
    "long prompt": (["--prompt", "a 1 " * 3000], "made for 2048; shorten"),
    "long output": (["--prompt=x", "--max-new-tokens=9999"], "--max-new-tokens 9999"),
    "no output": (["--prompt=x", "--max-new-tokens=0"], "--max-new-tokens"),
    "small budget": (["--prompt=x", *SMALL, "--budget=4"], "at least 5"),
    "no budget": (
        ["--prompt=x", "--decode=streaming-llm"],
        "--decode streaming-llm evicts and needs --budget.",
    ),
    "no budget of prompts": (
        ["--prompt=x", "--prefill=snapkv"],
        "evicts and needs --budget or --compression-ratio.",
    ),
    "budget without policy": (
        ["--prompt", "a " * 50, "--budget=9"],
        "and --budget 9, but --prefill full keeps all of them; choose a prefill policy "
        "that evicts, such as streaming-llm,",
    ),
    "zero budget": (["--prompt=x", "--budget=0"], "--budget"),
    "two budgets": (
        ["--prompt=x", *SMALL, "--compression-ratio=.5"],
        "pass --budget or --compression-ratio, not both",
    ),
    "ratio": (["--prompt=x", "--compression-ratio=2"], "[0, 1)"),
    "huge n_sink": (
        ["--prompt=x", "--budget=16", f"--decode=streaming-llm:n_sink={2**40}"],
        "n_sink",
    ),
    "policy": (["--prompt=x", "--prefill=magic"], "--prefill: unknown 'magic'"),
    "policy's option": (["--prompt=x", "--decode=full:a=1"], "no option of full"),
    "dtype": (["--prompt=x", "--dtype=int3"], "--dtype must be one of"),
    "negative seed": (["--prompt=x", "--seed=-1"], "--seed"),
    "word for a number": (["--prompt=x", "--seed=abc"], "--seed"),
    "temperature": (
        ["--prompt=x", "--temperature=-1"],
        "--temperature must be above 0",
    ),
    "nan": (["--prompt=x", "--temperature=nan"], "--temperature takes a number, got"),
    "top_p": (["--prompt=x", "--temperature=1", "--top-p=2"], "--top-p must"),
    "top_k": (["--prompt=x", "--temperature=1", "--top-k=-2"], "--top-k must"),
    "idle min_p": (["--prompt=x", "--min-p=.1"], "--min-p does nothing"),
    "penalty": (["--prompt=x", "--repetition-penalty=0"], "--repetition-penalty m"),
    "stop id": (["--prompt=x", f"--stop-id={2**40}"], "--stop-id"),
    "idle stop id": (
        ["--prompt=x", "--stop-id=4096"],
        "--stop-id has 4096, which ends",
    ),
    "triton": (["--prompt=x", "--decode-implementation=triton"], "NVIDIA GPU"),
    "kernel": (["--prompt=x", "--decode-implementation=magic"], "implementation"),
    "stream": (["--prompt=x", "--stream", "--json"], "--stream takes one prompt"),
    "no file": (["--prompt-file=/no/such/file"], "/no/such/file: No such file"),
    "folder": (["--prompt-file=/"], "/: Is a directory"),
    "unknown flag": (["--prompt=x", "--frobnicate"], "--frobnicate"),
}


EMPTY = {  # as a variable that is not set leaves it
    "study positions needle --text ''": "--text is empty, where a value or a name was",
    "eval perplexity needle --text=": "--text is empty, where",
    "calibrate needle --text ''": "--text is empty, where",
    "compress needle --prompt-file '' out": "--prompt-file is empty, where",
    "eval ruler --out=": "--out is empty, where",
    "bench decode --out ''": "--out is empty, where",
    "generate --context '' --prompt x": "--context is empty, where",
    "generate --stream '' --prompt x": "an argument is empty, where",
    "eval report ''": "an argument is empty, where",
    "compress needle --prompt x ''": "an argument is empty, where",
}


@pytest.mark.parametrize("line", EMPTY)
def test_an_empty_argument_is_no_folder(jaxkv_, line):
    assert EMPTY[line] in jaxkv_.error(*shlex.split(line))


@pytest.mark.parametrize("text", ["", "--text=", "x="])
def test_a_prompt_may_look_like_an_empty_flag(text):
    assert check_empty(every_command(), ["generate", "--prompt", text]) is None


@pytest.mark.parametrize("case", BAD_GENERATE)
def test_bad_input_of_generate(jaxkv_, tiny, case):
    arguments, message = BAD_GENERATE[case]
    assert message in jaxkv_.error("generate", tiny, *arguments)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("top_k", -1, "top_k must be a whole number of at least 0, found -1"),
        ("top_k", 2**40, "top_k must be between"),
        (
            "repetition_penalty",
            1e-300,
            "repetition_penalty must be a number that",
        ),
        ("temperature", 1e-300, "temperature must be a number that float32 holds"),
    ],
)
def test_bad_keys_of_a_generation_config_are_no_flags(
    jaxkv_, tiny, tmp_path, key, value, words
):
    shutil.copytree(tiny, tmp_path / "m")
    path = tmp_path / "m" / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, key: value}))
    asked = "generate", tmp_path / "m", "--prompt=x", "--use-generation-config"
    assert f"{path}: {words}" in jaxkv_.error(*asked)


BEFORE_LOADING = {
    "prefill": (["--budget=16", f"--prefill=dapq:seed={2**64}"], "DapQ: seed must be"),
    "decode": (["--budget=16", f"--decode=vatp:n_sink={2**40}"], "n_sink must be"),
    "sampler": (["--temperature=1", f"--top-k={2**40}"], "--top-k must be between"),
    "drafts": ([f"--speculate=tree:depth={2**40}"], "Tree: depth must be between"),
    "rule": (["--speculate=tree", f"--accept=top-k:k={2**40}"], "TopK: k must be"),
    "deletion": (
        ["--budget=16", "--decode=longflow:score=deletion", "--speculate=tree"],
        "any score but deletion",
    ),
}


@pytest.mark.parametrize("case", BEFORE_LOADING)
def test_options_are_checked_before_a_model_is_loaded(jaxkv_, case):
    arguments, message = BEFORE_LOADING[case]
    error = jaxkv_.error("generate", "no/model", "--prompt=x", *arguments)
    assert message in error


BAD_FILES = {
    "latin.txt": (b"caf\xe9", "latin.txt is not UTF-8 text (byte 3 is 0xe9)"),
    "empty.txt": (b"\n", "empty.txt: the prompt is empty"),
    "none.jsonl": (b"\n", "none.jsonl: holds no prompt"),
    "broken.jsonl": (b'{"prompt": "a"}\n{', "broken.jsonl:2: not valid JSON"),
    "key.jsonl": (b'{"text": "a"}', 'key.jsonl:1: expected an object with "prompt"'),
    "huge.jsonl": (
        b'{"prompt": [5, 99999999999]}',
        "huge.jsonl:1: the prompt[1] must be between",
    ),
    "list.jsonl": (b"[1]", "list.jsonl:1: expected"),
    "bool.jsonl": (b'{"prompt": [true]}', 'bool.jsonl:1: "prompt" must be a'),
    "id.jsonl": (b'{"prompt": [5000]}', "id.jsonl:1: has token ids outside [0, 4096)"),
    "late.jsonl": (
        b'{"prompt": "a"}\n{"prompt": "' + b"a 1 " * 3000 + b'"}',
        "late.jsonl:2: a prompt of ",
    ),
    "turns.jsonl": (
        b'{"turns": ["a"]}\n{"turns": ["a", "' + b"a 1 " * 1000 + b'"]}',
        "turns.jsonl:2: 2 turns with answers of --max-new-tokens 64 need ",
    ),
    "other.jsonl": (b'{"input": "a", "doc": "b"}', 'other.jsonl:1: unknown "doc"'),
    "no_ids.jsonl": (b'{"prompt": []}', "no_ids.jsonl:1: the prompt is empty"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(jaxkv_, tiny, tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    flag = f"--prompt-file={tmp_path / name}"
    assert message in jaxkv_.error("generate", tiny, flag)


def test_a_bad_prompt_is_found_before_a_good_one_costs_anything(jaxkv_, tiny):
    long = "a 1 " * 3000
    flags = ["--prompt=a", "--prompt", long, "--batch-size=1"]
    assert "--prompt 2: a prompt of" in jaxkv_.error("generate", tiny, *flags)
    # A budget that holds a short prompt, and no long one.
    flags = ["--prompt=a", "--prompt", "a 1 " * 30, "--batch-size=1", "--budget=20"]
    assert "--prompt 2: the prompt has" in jaxkv_.error("generate", tiny, *flags)


def test_a_conversation_that_becomes_too_long_keeps_its_answers(
    jaxkv_, tiny, tiny_lm, tmp_path, monkeypatch
):
    """What is known before is checked before; an answer may read longer, though."""
    (tmp_path / "x.jsonl").write_text('{"turns": ["a", "b"]}')
    monkeypatch.setattr(prompts, "_check_turns", lambda *_: None)
    monkeypatch.setattr(prompts, "_exchange", lambda *_: (_long(), _long()))
    flag = f"--prompt-file={tmp_path / 'x.jsonl'}"
    code, out, err = jaxkv_("generate", tiny, flag, "--json")
    assert (code, out.count("\n")) == (2, 1)
    assert "x.jsonl:1: turn 2: a conversation of" in err


def _long():
    return {"role": "user", "content": "a 1 " * 3000}


def test_bad_standard_input(jaxkv_, tiny, stdin, monkeypatch):
    stdin(b"")
    assert "standard input: the prompt" in jaxkv_.error("generate", tiny)
    stdin(b"\xff")
    assert "standard input is not UTF-8" in jaxkv_.error("generate", tiny)
    stdin(b"")
    error = jaxkv_.error("generate", tiny, "--prompt-file=-")
    assert "standard input: the prompt is empty" in error
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert "no prompt" in jaxkv_.error("generate", tiny)


BAD_COMMANDS = {
    "unknown command": (["frobnicate"], "frobnicate"),
    "unknown model": (["generate", "no/model", "--prompt=x"], "no/model"),
    "no model name": (["generate", "no such model", "--prompt=x"], "neither"),
    "demo too short": (["demo", "{tiny}", "--length=100"], "--length"),
    "demo draws no text": (["demo", "{tiny}", "--picture=a.txt"], "--picture takes a"),
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
    error = jaxkv_.error(*(argument.format(**places) for argument in arguments))
    assert message.lower() in error.lower()


def test_truncated_checkpoint(jaxkv_, tiny, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (shard,) = broken.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    error = jaxkv_.error("generate", broken, "--prompt=x")
    assert shard.name in error


def test_logits_that_are_no_numbers(jaxkv_, tiny, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (shard,) = broken.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, shard)
    error = jaxkv_.error("generate", broken, "--prompt=x")
    assert "behind prompt 0 are NaN or infinite" in error
    assert "of the weight final_norm are NaN" in error


def test_logits_that_are_no_numbers_in_a_later_batch(jaxkv_, tiny, monkeypatch):
    working = inference.generate

    def generate(lm, prompts, *, seed, **options):
        if 1 in seed:
            raise LogitsError({0: 4}, "why.")
        return working(lm, prompts, seed=seed, **options)

    monkeypatch.setattr(inference, "generate", generate)
    batches = ["--batch-size=1", "--max-new-tokens=1"]
    code, _, err = jaxkv_("generate", tiny, "--prompt=x", "--prompt=y", *batches)
    assert code == 2
    assert "behind prompt 1 and 4 tokens of its output are NaN" in err


@pytest.fixture
def failing(monkeypatch):
    """Let the generation of every prompt raise an exception."""

    def fail(error):
        def generate(*_, **__):
            raise error

        monkeypatch.setattr(inference, "generate", generate)

    return fail


def test_out_of_memory_says_what_to_lower(jaxkv_, tiny, failing):
    failing(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\n9 GiB"))
    error = jaxkv_.error("generate", tiny, "--prompt=x")
    assert "out of memory; lower --batch-size" in error
    failing(MemoryError())
    assert "out of memory" in jaxkv_.error("generate", tiny, "--prompt=x")


def test_what_fails_takes_no_other_prompt_with_it(jaxkv_, tiny, monkeypatch):
    """A row whose logits are no numbers is told of when the others have answers."""
    generate = inference.generate

    def fail(lm, prompts, *, seed, **options):
        broken = {row: 0 for row, number in enumerate(seed) if number in (1, 4)}
        if broken:
            raise LogitsError(broken, "because.")
        return generate(lm, prompts, seed=seed, **options)

    monkeypatch.setattr(inference, "generate", fail)
    prompts = [f"--prompt={letter}" for letter in "abcdef"]
    flags = ["--batch-size=3", "--json", "--max-new-tokens=2"]
    code, out, err = jaxkv_("generate", tiny, *prompts, *flags)
    assert code == 2
    assert [json.loads(line)["seed"] for line in out.splitlines()] == [0, 2, 3, 5]
    last = err.splitlines()[-1]
    assert "the logits behind prompt 1 are NaN or infinite" in last
    assert last.endswith("because. 1 more failed.")
    one = ["generate", tiny, "--batch-size=1", "--max-new-tokens=2"]
    code, out, err = jaxkv_(*one, *prompts[:3])
    assert (code, out.count("\n")) == (2, 3)
    assert err.splitlines()[-1].endswith("because.")
    # The first of all tells of the network, and nothing else is tried.
    error = jaxkv_.error(*one, "--seed=1", *prompts)
    assert error.endswith(
        "the logits behind prompt 0 are NaN or infinite, so that no "
        "token can be chosen; because.\n"
    )


def test_full_disk(jaxkv_, tiny, failing):
    failing(OSError(28, "No space left on device", "/full/file"))
    error = jaxkv_.error("generate", tiny, "--prompt=x")
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
    assert "no device" in jaxkv_.error("generate", tiny, "--prompt=x")
