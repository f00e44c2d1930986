"""`jaxkv bench`: the arithmetic of the floor, and what the JSON holds."""

import dataclasses
import json
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from tiny import BY_HAND

from jaxkv import H2ODecode, LongFlow
from jaxkv import state as kv
from jaxkv.bench import decode_step, kernel_trace
from jaxkv.cli import main as cli
from jaxkv.models import public_shapes
from jaxkv.models.config import Experts
from jaxkv.models.decoder import Decoder, parameter_shapes, random_parameters
from jaxkv.options import Options
from jaxkv.policies.full import Full
from jaxkv.policies.streaming_llm import StreamingLLM

TINY = dataclasses.replace(BY_HAND, num_layers=2)
# One layer: norms 2 x 4, qkv 4 x (2 + 2) x 2, output 4 x 4, gate_up 4 x 12, down 6 x 4
LAYER = 8 + 32 + 16 + 48 + 24
FINAL_NORM, EMBEDDING = 4, 10 * 4
PARAMETERS = {  # of the Hub's model cards
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b-v0.3": 7_248_023_552,
    "olmo-2-7b": 7_298_617_344,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "gpt-oss-20b": 20_914_757_184,
    "olmoe-1b-7b": 6_919_161_856,
    "glm-4-9b": 9_400_279_040,  # this and what follows: of transformers' networks
    "seed-oss-36b": 36_151_104_512,
    "granite-3.1-8b": 8_170_848_256,
    "smollm2-135m": 134_515_008,
    "smollm3-3b": 3_075_098_624,
    "phi-4-mini": 3_836_021_760,
}


@pytest.fixture
def tiny_shape(monkeypatch):
    """Let a published name stand for a network that runs in no time."""
    monkeypatch.setitem(public_shapes.SHAPES, "qwen3-8b", TINY)


class Result(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys):
    """Run `jaxkv bench` in this process."""

    def run(*arguments):
        code = cli.main(["bench", *map(str, arguments)])
        return Result(code, *capsys.readouterr())

    return run


@pytest.mark.parametrize("tied", [False, True])
def test_weight_bytes_by_hand(tied):
    config = dataclasses.replace(TINY, tied=tied)
    params = random_parameters(config, jax.random.key(0), jnp.bfloat16)
    # The head has as many entries as the embedding: either one of them is read.
    assert decode_step.weight_bytes(params, config) == 2 * (
        2 * LAYER + FINAL_NORM + EMBEDDING
    )
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert total == 2 * LAYER + FINAL_NORM + EMBEDDING * (1 if tied else 2)


@pytest.mark.parametrize(("batch", "read"), [(1, 2), (2, 3)])
def test_weight_bytes_of_experts_by_hand(batch, read):
    """Of four experts a token uses two; of two tokens' choices a quarter is missed."""
    experts = Experts(count=4, per_token=2, size=3)
    config = dataclasses.replace(TINY, experts=experts)
    params = random_parameters(config, jax.random.key(0), jnp.bfloat16)
    layer = LAYER - 48 - 24 + 4 * 4 + read * (4 * 6 + 3 * 4)
    found = decode_step.weight_bytes(params, config, batch=batch)
    assert found == 2 * (2 * layer + FINAL_NORM + EMBEDDING)


def test_floor_by_hand():
    assert decode_step.floor_ms(3_000, 1e6) == pytest.approx(3.0)


@pytest.mark.parametrize("name", public_shapes.SHAPES)
def test_shapes_have_the_published_number_of_parameters(name):
    leaves = jax.tree.leaves(parameter_shapes(public_shapes.SHAPES[name]))
    assert sum(leaf.size for leaf in leaves) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("options", "slots", "memory"),
    [
        (Options(), 12, 0),
        (Options(budget=5), 5 + 4, 0),
        (Options(budget=6, decode=StreamingLLM()), 6, 0),
        (
            Options(budget=6, decode=LongFlow(protect_prompt=True)),
            6,
            7,
        ),  # norms, length
        (Options(budget=6, decode=H2ODecode()), 6, 6),  # a sum per slot
    ],
)
def test_decode_timing(options, slots, memory):
    params = random_parameters(TINY, jax.random.key(0), jnp.float32)
    timing = decode_step.time_decode(
        Decoder(TINY),
        params,
        batch=3,
        context=12,
        steps=4,
        repeats=3,
        options=options,
        bandwidth=1e9,
    )
    assert timing.slots == slots
    assert timing.kv_bytes == 2 * 2 * (3 * 1 * slots * 2) * 4  # layers, K and V
    bookkeeping = 2 * 3 * (slots + 1 + memory) * 4  # positions and target
    assert timing.state_bytes == timing.kv_bytes + bookkeeping
    assert timing.floor_ms == pytest.approx(
        (timing.weight_bytes + timing.kv_bytes) / 1e9 * 1e3
    )
    assert len(timing.calls_ms) == 3
    assert timing.step_ms == sorted(timing.calls_ms)[1]
    assert timing.ratio_to_floor == pytest.approx(timing.step_ms / timing.floor_ms)
    assert timing.tokens_per_second == pytest.approx(3e3 / timing.step_ms)


def test_every_slot_is_occupied_from_the_first_step_on():
    cache = decode_step.full_cache(
        TINY, batch=2, slots=6, dtype=jnp.float32, key=jax.random.key(0)
    )
    start = decode_step.rewind(cache, steps=4, context=6, policy=Full())
    for state in start.cache:
        assert (kv.occupancy(state) == 6).all()
        assert (state.target == 2).all()  # four new tokens end at the last slot
        assert jnp.isfinite(state.keys).all()
    assert (start.position == 6).all()


def test_a_policy_begins_anew_at_each_rewind():
    cache = decode_step.full_cache(
        TINY, batch=2, slots=6, dtype=jnp.float32, key=jax.random.key(0)
    )
    used = tuple(
        dataclasses.replace(s, positions=s.positions + 9, memory=jnp.ones((2, 1, 6)))
        for s in cache
    )
    start = decode_step.rewind(used, steps=4, context=6, policy=H2ODecode())
    for state in start.cache:
        assert (state.memory == 0).all()
        assert (state.positions == jnp.arange(6)[None, None]).all()
        assert (state.target == 0).all()


def test_decode_json(run, tiny_shape, tmp_path):
    out = tmp_path / "new" / "result.json"
    result = run(
        *("decode", "--shape", "qwen3-8b", "--batch", "1,2", "--context", 12),
        *("--steps", 4, "--repeats", 2, "--copy-gib", 0.001, "--json", "--out", out),
    )
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    assert content == json.loads(out.read_text())
    assert list(out.parent.iterdir()) == [out]  # nothing half-written is left
    assert content["model"] == "qwen3-8b"
    assert content["dtype"] == "float32"
    assert content["decode_implementation"] == "xla"
    assert {"command", "date", "commit", "device", "versions"} <= content.keys()
    assert content["versions"]["jax"] == jax.__version__
    assert [row["batch"] for row in content["rows"]] == [1, 2]
    fields = {field.name for field in dataclasses.fields(decode_step.DecodeTiming)}
    assert all(row.keys() == fields for row in content["rows"])


def test_decode_table(run, tiny_shape, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = run(
        *("decode", "--shape", "qwen3-8b", "--context", 12, "--steps", 4),
        *("--repeats", 1, "--copy-gib", 0.001, "--dtype", "bfloat16"),
        *("--decode", "longflow:n_sink=2", "--budget", 8, "--profile"),
    )
    assert result.exit_code == 0, result.stderr
    assert "LongFlow(score='l1', n_sink=2" in result.stdout
    assert "the profiler saw no GPU" in result.stdout
    assert "bfloat16" in result.stdout
    assert "cache GB" in result.stdout  # no heading is cut short
    assert "compile s" in result.stdout


def test_kernel_table_shows_names_as_they_are(run, tiny_shape, monkeypatch):
    def trace(call, per_call):
        kernels = {
            "f(int (&) [2]) [/b] [red]": kernel_trace.Kernel(us=3, launches=57),
            "copy": kernel_trace.Kernel(us=1, launches=1 / 4),
        }
        return kernels, call()

    monkeypatch.setattr(decode_step, "trace_kernels", trace)
    monkeypatch.setenv("COLUMNS", "80")
    result = run(
        *("decode", "--shape", "qwen3-8b", "--context", 12, "--steps", 4),
        *("--repeats", 1, "--copy-gib", 0.001, "--profile"),
    )
    assert result.exit_code == 0, result.stderr
    rows = [line.split("  ") for line in result.stdout.splitlines()]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert ["f(int (&) [2]) [/b] [red]", "3.0", "57"] in rows
    assert ["copy", "1.0", "0.25"] in rows


def test_a_profile_has_nothing_but_the_steps(monkeypatch):
    def trace(call, per_call):
        with monkeypatch.context() as patch:
            patch.delattr(decode_step, "loop_ends")  # which makes arrays
            return {}, call()

    monkeypatch.setattr(decode_step, "trace_kernels", trace)
    decode_step.time_decode(
        Decoder(TINY),
        random_parameters(TINY, jax.random.key(0), jnp.float32),
        batch=1,
        context=12,
        steps=4,
        repeats=1,
        options=Options(),
        bandwidth=1e9,
        profile=True,
    )


def test_kernels_of_a_trace(monkeypatch):
    def line(name, *events):
        events = [types.SimpleNamespace(name=n, duration_ns=ns) for n, ns in events]
        return types.SimpleNamespace(name=name, events=events)

    gpu = [
        line("Stream #1", ("norm", 2e3), ("product", 9e3), ("norm", 4e3)),
        line("Stream #2", ("copy", 1e3)),
        line("XLA Ops", ("product", 9e3)),
    ]
    planes = [
        types.SimpleNamespace(name="/device:GPU:0", lines=gpu),
        types.SimpleNamespace(name="/host:CPU", lines=[line("Stream", ("x", 1e3))]),
    ]
    profile = types.SimpleNamespace(planes=planes)
    monkeypatch.setattr(jax.profiler.ProfileData, "from_file", lambda file: profile)
    kernels, result = kernel_trace.trace_kernels(lambda: jnp.ones(2), 2)
    assert result.tolist() == [1, 1]
    assert list(kernels) == ["product", "norm", "copy"]  # the longest first
    assert kernels["norm"] == kernel_trace.Kernel(us=3, launches=1)
    assert kernels["copy"] == kernel_trace.Kernel(us=0.5, launches=0.5)


def test_a_timeline_says_when_the_first_device_was_idle(monkeypatch):
    def event(name, begin, end, grid):
        details = {"kernel_details": f"regs:32 grid:{grid},1,1 block:128,1,1"}
        return types.SimpleNamespace(
            name=name, start_ns=begin, duration_ns=end - begin, stats=details.items()
        )

    lines = [
        types.SimpleNamespace(
            name="Stream #1",
            events=[event("product", 1e3, 3e3, 64), event("product", 4e3, 7e3, 96)],
        ),
        types.SimpleNamespace(name="Stream #2", events=[event("sum", 2e3, 3500, 1)]),
    ]
    other = [types.SimpleNamespace(name="Stream #1", events=[event("x", 0, 9e3, 1)])]
    planes = [
        types.SimpleNamespace(name="/device:GPU:0", lines=lines),
        types.SimpleNamespace(name="/device:GPU:1", lines=other),
    ]
    profile = types.SimpleNamespace(planes=planes)
    monkeypatch.setattr(jax.profiler.ProfileData, "from_file", lambda file: profile)
    line, _ = kernel_trace.trace_timeline(lambda: jnp.ones(2), 2)
    assert (line.span_us, line.idle_us) == (3, 0.25)
    assert line.kernels == {
        "product grid:96,1,1": kernel_trace.Kernel(us=1.5, launches=0.5),
        "product grid:64,1,1": kernel_trace.Kernel(us=1, launches=0.5),
        "sum grid:1,1,1": kernel_trace.Kernel(us=0.75, launches=0.5),
    }


def test_compile_json(run, tiny_shape):
    result = run(
        *("compile", "--shape", "qwen3-8b", "--prompt", 60, "--new", 8, "--json")
    )
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    assert (content["prompt"], content["max_out"]) == (64, 64)
    assert content["seconds"].keys() == {"start", "advance"}
    halves = content["seconds"].values()
    assert content["total_seconds"] == pytest.approx(
        sum(half["trace"] + half["compile"] for half in halves)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1,x"], "--batch takes numbers"),
        (["--batch", "0"], "at least 1"),
        (["--context", "8", "--steps", "8"], "must exceed"),
        (["--copy-gib", "0"], "must lie between"),
        (["--copy-gib", "nan"], "must lie between"),
        (["--copy-gib", "1e-12"], "must lie between"),
        (["--model", "needle"], "exclude each other"),
        (["--decode", "streaming-llm"], "evicts and needs --budget"),
        (["--decode-implementation", "triton"], "needs an NVIDIA GPU"),
    ],
)
def test_bad_input_gets_one_line(run, tiny_shape, arguments, message):
    quick = ("--shape", "qwen3-8b", "--context", 12, "--steps", 4, "--copy-gib", 0.001)
    result = run("decode", *quick, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.strip().count("\n") == 0
    assert result.stdout == ""
