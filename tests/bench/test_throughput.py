"""`jaxkv bench throughput`: how a whole generation follows from a sample of it."""

import dataclasses
import io
import itertools
import json

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny import BY_HAND

from jaxkv import figures
from jaxkv import state as kv
from jaxkv.bench import clock, decode_step, throughput
from jaxkv.bench import throughput_report as report
from jaxkv.bench.throughput import Work, split, whole_seconds
from jaxkv.bench.throughput_plan import Timer, plan_cells, run_cells
from jaxkv.cli import main as cli
from jaxkv.cli.bench_throughput import _table, options_of
from jaxkv.models import public_shapes
from jaxkv.models.decoder import random_parameters
from jaxkv.options import Options
from jaxkv.policies.full import Full
from jaxkv.policies.longflow import LongFlow
from jaxkv.policies.streaming_llm import StreamingLLM

QUICK = ["throughput", "--shape", "qwen3-8b", "--prompt", "6", "--new", "40"]
QUICK += ["--budget", "16", "--batches", "2", "--steps", "4", "--repeats", "1"]
QUICK += ["--ranges", "3", "--copy-gib", "0.01"]


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `jaxkv bench` in this process, on a network that runs in no time."""
    monkeypatch.setitem(public_shapes.SHAPES, "qwen3-8b", BY_HAND)

    def run(*arguments):
        code = cli.main(["bench", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


works = st.builds(
    Work,
    prompt=st.integers(1, 40),
    new=st.integers(9, 200),
    ranges=st.integers(1, 12),
    steps=st.integers(1, 8),
)


@settings(max_examples=60, deadline=None)
@given(work=works, budget=st.integers(1, 300), cost=st.floats(0.1, 10))
def test_ranges_make_up_the_whole(work, budget, cost):
    slots = min(work.prompt + work.new, work.prompt + budget)
    ranges = split(work, slots)
    assert ranges[0].start == 0
    assert ranges[-1].stop == work.new - 1
    for one, other in itertools.pairwise(ranges):
        assert one.stop == other.start
    for part in ranges:
        assert part.start < part.stop
        assert part.filled == min(part.position, slots)
        # A cache that never gets full has room for the timed steps.
        assert part.position + work.steps <= work.prompt + work.new or (
            part.filled == slots
        )
    total = whole_seconds(ranges, [cost] * len(ranges))
    assert total == pytest.approx((work.new - 1) * cost / 1e3)


@settings(max_examples=60, deadline=None)
@given(work=works)
def test_a_growing_cost_is_summed_exactly_but_for_rounding(work):
    """The mean over the timed steps of a cost that is the number of tokens."""
    slots = work.prompt + work.new
    ranges = split(dataclasses.replace(work, ranges=1), slots)
    means = [part.position + (work.steps - 1) / 2 for part in ranges]
    exact = sum(work.prompt + step for step in range(work.new - 1)) / 1e3
    assert whole_seconds(ranges, means) == pytest.approx(exact, rel=0.5 / work.prompt)


def test_ranges_by_hand():
    work = Work(prompt=512, new=16_000, ranges=8, steps=16)
    full = split(work, 512 + 16_000)
    assert [part.stop for part in full] == [2000 * i - 1 for i in range(1, 9)]
    assert full[0].filled == full[0].position == 512 + 999 - 8
    *growing, constant = split(work, 3200)
    assert [(part.start, part.stop) for part in growing] == [(0, 1344), (1344, 2688)]
    assert growing[1].filled == 512 + (1344 + 2688 - 16) // 2
    assert (constant.start, constant.stop, constant.filled) == (2688, 15_999, 3200)
    assert constant.position > 3200


def test_a_cache_that_is_full_from_the_start_has_one_range():
    (part,) = split(Work(prompt=16, new=40, steps=4), 16)
    assert (part.start, part.stop, part.filled) == (0, 39, 16)


def test_rewind_to_a_part_of_the_slots():
    cache = decode_step.full_cache(
        BY_HAND, batch=2, slots=6, dtype=jnp.float32, key=jax.random.key(0)
    )
    start = decode_step.rewind(cache, steps=2, context=4, policy=Full(), filled=4)
    assert (kv.occupancy(start.cache[0]) == 4).all()
    assert (start.cache[0].target == 4).all()
    policy = LongFlow()
    start = decode_step.rewind(
        start.cache, steps=2, context=20, policy=policy, filled=6
    )
    assert (kv.occupancy(start.cache[0]) == 6).all()
    assert (start.cache[0].target == 0).all()
    assert (start.position == 20).all()


def test_a_loop_that_stops_early_is_noticed():
    cache = decode_step.full_cache(
        BY_HAND, batch=1, slots=6, dtype=jnp.float32, key=jax.random.key(0)
    )
    with pytest.raises(RuntimeError, match="did not produce its tokens"):
        decode_step.time_calls(
            lambda params, state, until, stop_ids: state,
            *(None, cache),
            repeats=0,
            steps=2,
            context=4,
            policy=Full(),
        )


@pytest.mark.parametrize("options", [Options(), Options(budget=8, decode=Full())])
def test_the_largest_batch_is_the_largest_that_fits(options):
    work = Work(prompt=6, new=40)

    def needed(batch):
        return throughput.bytes_needed(BY_HAND, work, options, jnp.float32, batch=batch)

    slots = options.num_slots(6, 40)
    tokens = 2 * 1 * slots * 2 * 4  # keys and values
    positions = 3 * slots * 4 + 4  # three times, and the target
    prefill = 64 * (3 * 6 + 2 * 4 + 4 * 2) * 4
    assert needed(1) == tokens + positions + prefill
    for room in (needed(1), needed(9) - 1, needed(9)):
        batch = throughput.largest_batch(BY_HAND, work, options, jnp.float32, room=room)
        assert needed(batch) <= room < needed(batch + 1)
    assert throughput.largest_batch(BY_HAND, work, options, jnp.float32, room=9) == 0


@pytest.mark.parametrize(
    ("largest", "batches"),
    [(1, [1]), (3, [1, 3]), (70, [1, 8, 32, 64, 68]), (64, [1, 8, 32, 64])],
)
def test_automatic_batches(largest, batches):
    assert throughput.automatic_batches(largest) == batches


def test_plan_begins_with_the_largest_and_skips_what_does_not_fit(monkeypatch):
    work = Work(prompt=6, new=4000)
    options = {"full": Options(), "small": Options(budget=16, decode=StreamingLLM())}
    params = random_parameters(BY_HAND, jax.random.key(0), jnp.float32)
    need = throughput.bytes_needed(BY_HAND, work, Options(), jnp.float32, batch=10)
    limit = (need + sum(x.nbytes for x in jax.tree.leaves(params))) / throughput.USABLE
    monkeypatch.setattr(clock, "device_memory", lambda key: int(limit) + 1)
    plan = plan_cells(BY_HAND, params, work, options, None)
    assert plan[0] == ("full", 8, None)  # a multiple of four
    assert plan[1][0] == "small"
    assert plan[1][1] > 8
    assert [batch for method, batch, _ in plan if method == "full"] == [8, 1]
    skipped, fits = plan_cells(BY_HAND, params, work, {"full": Options()}, [10, 11])
    assert skipped[:2] == ("full", 11)
    assert "at most 10 rows fit" in skipped[2]
    assert fits == ("full", 10, None)


def timer(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(throughput, "time_prefill", fail)
    return Timer(None, None, Work(prompt=6, new=40), 1e9)


def test_memory_that_does_not_suffice_is_a_result(monkeypatch):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes\nmore")
    row = timer(monkeypatch, error).time("full", Options(), 8, None)
    assert row == {
        "method": "full",
        "batch": 8,
        "fits": False,
        "why": "RESOURCE_EXHAUSTED: 9 bytes",
    }


def test_less_is_tried_where_the_estimate_was_too_bold(monkeypatch):
    tried = []

    class Bold:
        def time(self, method, options, batch, why):
            tried.append((method, batch))
            fits = why is None and batch <= 60
            return {"method": method, "batch": batch, "fits": fits} | (
                {"tokens_per_second": 1.0} if fits else {}
            )

    result = {"rows": [], "not_started": []}
    cells = [("full", 68, None), ("full", 64, None), ("full", 900, "no room")]
    options = {"full": Options()}
    saved = []
    rest = dict(save=lambda result: saved.append(len(result["rows"])), until=None)
    run_cells(Bold(), cells, options, result, **rest, retry=True)
    assert saved == [1, 2, 3, 4, 5, 6]  # after each cell, for a crash to lose no other
    assert [batch for _, batch in tried] == [68, 63, 59, 64, 60, 900]
    tried.clear()
    run_cells(Bold(), cells, options, result, **rest, retry=False)
    assert [batch for _, batch in tried] == [68, 64, 900]


def test_other_errors_are_none(monkeypatch):
    error = jax.errors.JaxRuntimeError("INTERNAL: no")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        timer(monkeypatch, error).time("full", Options(), 8, None)


def speed(method, batch, tokens_per_second):
    return {
        "method": method,
        "batch": batch,
        "fits": True,
        "tokens_per_second": tokens_per_second,
    }


def test_ratios_by_hand():
    rows = [
        *(speed("full", 1, 10.0), speed("full", 8, 40.0), speed("full", 16, 30.0)),
        *(speed("longflow", 8, 60.0), speed("longflow", 64, 120.0)),
        speed("transformers", 8, 5.0),
        {"method": "full", "batch": 64, "fits": False, "why": "-"},
    ]
    found = {(x["method"], x["against"]): x for x in report.ratios(rows)}
    assert found.keys() == {
        ("longflow", "full"),
        ("full", "transformers"),
        ("longflow", "transformers"),
    }
    pair = found["longflow", "full"]
    assert pair["equal_batch"] == [{"batch": 8, "ratio": 1.5}]
    assert pair["best_batch"] == {"batch": 64, "batch_against": 8, "ratio": 3.0}
    assert found["longflow", "transformers"]["best_batch"]["ratio"] == 24.0


def theirs(**changes):
    rows = [speed("transformers", 2, 7.0) | {"seconds": 3.0, "state_bytes": 9}]
    return {
        "benchmark": report.BENCHMARK,
        "model": "qwen3-8b",
        "dtype": "float32",
        "prompt": 6,
        "new": 40,
        "device": jax.devices()[0].device_kind,
        "rows": rows,
    } | changes


def test_json_and_picture(run, tmp_path):
    out, picture = tmp_path / "new" / "result.json", tmp_path / "made" / "it.png"
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(theirs()))
    extras = ["--picture", picture, "--transformers", file]
    code, stdout, stderr = run(*QUICK, *extras, "--json", "--out", out)
    assert code == 0, stderr
    content = json.loads(stdout)
    assert content == json.loads(out.read_text())
    assert {"command", "device", "versions", "sampling"} <= content.keys()
    assert content["methods"]["longflow"]["slots"] == 16
    assert content["methods"]["full"]["slots"] == 46
    other, full, longflow = content["rows"]
    assert other["method"] == "transformers"
    assert (full["method"], longflow["method"]) == ("full", "longflow")
    for row in (full, longflow):
        assert row["fits"]
        steps = [(part["stop"] - part["start"]) for part in row["ranges"]]
        assert sum(steps) == 39
        decode = sum(
            count * part["step_ms"] / 1e3
            for count, part in zip(steps, row["ranges"], strict=True)
        )
        assert row["decode_seconds"] == pytest.approx(decode)
        assert row["seconds"] == pytest.approx(decode + row["prefill_seconds"])
        assert row["tokens_per_second"] == pytest.approx(2 * 40 / row["seconds"])
    assert full["state_bytes"] > longflow["state_bytes"]
    (pair, *against_theirs) = content["ratios"]
    assert len(against_theirs) == 2
    ratio = longflow["tokens_per_second"] / full["tokens_per_second"]
    assert pair["equal_batch"] == [{"batch": 2, "ratio": pytest.approx(ratio)}]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_program_serves_all_ranges(run, monkeypatch):
    compiled = []
    steps = decode_step.compile_steps
    monkeypatch.setattr(
        decode_step,
        "compile_steps",
        lambda *a, **k: compiled.append(1) or steps(*a, **k),
    )
    code, stdout, stderr = run(*QUICK, "--methods", "longflow")
    assert code == 0, stderr
    assert len(compiled) == 1
    assert "longflow" in stdout
    assert "one range more" in " ".join(stdout.split())


def test_options_of_a_method_are_separated_by_commas_as_well():
    names = "longflow:n_sink=1,n_recent=2,full"
    found = options_of(names, Work(prompt=6, new=40), 16, None)
    assert list(found) == ["longflow:n_sink=1,n_recent=2", "full"]
    policy = found["longflow:n_sink=1,n_recent=2"].decode
    assert policy == LongFlow(n_sink=1, n_recent=2)


def test_a_long_name_leaves_room_for_the_numbers():
    row = dict(method="longflow:" + "n" * 60, batch=128, fits=True, seconds=1.0)
    row |= dict(tokens_per_second=1234.5, state_bytes=1, ratio_to_floor=2.0)
    keys = ("model", "dtype", "prompt", "new", "budget", "device", "sampling")
    console = Console(width=80, file=io.StringIO())
    console.print(_table(dict.fromkeys(keys, "x") | {"rows": [row]}))
    assert "tokens/s" in console.file.getvalue()
    assert "1234.5" in console.file.getvalue()


def test_time_that_is_up_is_said(run):
    code, stdout, stderr = run(*QUICK, "--seconds", 0)
    assert code == 0, stderr
    assert "time was up before full 2, longflow 2" in " ".join(stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "1,x"], "--batches takes numbers"),
        (["--batches", "0"], "--batches must be at least 1"),
        (["--batches", "auto"], "name the batches"),
        (["--new", "4"], "must exceed --steps 4"),
        (["--budget", "46"], "equals the full cache"),
        (["--budget", "6"], "shorten the prompt"),
        (["--methods", "full,paged"], "unknown 'paged'"),
        (["--methods", ","], "--methods names no method"),
        (["--methods", "longflow:interval=3"], "evicts every 3 steps"),
        (["--picture", "it.jpg"], "ends in .png, .svg, .pdf"),
        (["--transformers", "/no/such/file"], "No such file"),
        (["--copy-gib", "0"], "must lie between"),
    ],
)
def test_bad_input_gets_one_line(run, arguments, message):
    code, stdout, stderr = run(*QUICK, *arguments)
    assert (code, stdout) == (2, "")
    assert message in stderr
    assert stderr.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is no result of"),
        ('{"benchmark": "throughput"}', "is no result of"),
        ({"new": 41}, "the file is of new=41"),
        ({"device": "another"}, "the file is of device=another"),
    ],
)
def test_files_of_other_work_are_refused(run, tmp_path, content, message):
    file = tmp_path / "theirs.json"
    if isinstance(content, dict):
        content = json.dumps(theirs(**content))
    file.write_text(content)
    code, stdout, stderr = run(*QUICK, "--transformers", file)
    assert (code, stdout) == (2, "")
    assert message in " ".join(stderr.split())


def test_pictures_need_matplotlib(run, monkeypatch):
    monkeypatch.setattr(figures, "available", lambda: False)
    code, _, stderr = run(*QUICK, "--picture", "it.png")
    assert code == 2
    assert "pip install 'jaxkv[plot]'" in stderr
