"""What fits: held to what XLA:GPU said of programs that were run, and by hand."""

import json
from pathlib import Path

import pytest
import tiny
from jax.sharding import AbstractMesh

from jaxkv import LongFlow, Options
from jaxkv.bench import ahead, fit
from jaxkv.kernels.per_shard import AXES
from jaxkv.models.public_shapes import SHAPES

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
ALONE = AbstractMesh((1, 1, 1), AXES)
LONGFLOW = Options(budget=3200, decode=LongFlow())


def counted(shape, options, mesh=ALONE, kind="h200", **sizes):
    return fit.fit(SHAPES[shape], fit.KINDS[kind], mesh, options, **sizes)


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("2026-11-26-decode-qwen3-8b-h200.json", Options()),
        ("2026-11-26-decode-qwen3-8b-longflow-h200.json", LONGFLOW),
        ("2026-11-26-decode-qwen3-1.7b-longflow-h200.json", LONGFLOW),
    ],
)
def test_steps_that_were_run(file, options):
    report = json.loads((RESULTS / file).read_text())
    for row in report["rows"]:
        found = counted(
            *(report["model"], options), batch=row["batch"], prompt=1, new=3199
        )
        assert found.slots == row["slots"] == 3200
        assert found.total_bytes == pytest.approx(row["program_bytes"], rel=0.01)
        # The floor is the same sum at that machine's bandwidth.
        scaled = report["copy_bytes_per_second"] / fit.KINDS["h200"].bandwidth
        assert found.floor_ms == pytest.approx(row["floor_ms"] * scaled, rel=1e-6)


def test_prefills_that_were_run():
    for name in ("8k", "32k", "128k"):
        file = f"2026-11-24-prefill-llama-3.1-8b-{name}-h200.json"
        report = json.loads((RESULTS / file).read_text())
        row = report["timings"][0]
        assert row["method"] == "Full()"
        found = counted(
            *("llama-3.1-8b", Options()), batch=1, prompt=row["length"], new=128
        )
        used = row["argument_bytes"] + row["output_bytes"] + row["temp_bytes"]
        assert found.total_bytes == pytest.approx(used, rel=0.02)
        assert found.temp_bytes == pytest.approx(row["temp_bytes"], rel=0.05)


def test_a_mesh_cuts_weights_and_cache():
    sizes = dict(batch=8, prompt=1024, new=1024)
    alone = counted("qwen3-8b", Options(), **sizes)
    spread = counted("qwen3-8b", Options(), AbstractMesh((2, 2, 1), AXES), **sizes)
    # Only norms are whole everywhere.
    assert 0 < spread.weight_bytes - alone.weight_bytes / 2 < 1e6
    assert spread.cache_bytes == alone.cache_bytes / 4
    # Sixteen devices for eight heads: two hold the same, and their queries.
    copies = counted("qwen3-8b", Options(), AbstractMesh((1, 8, 2), AXES), **sizes)
    assert copies.cache_bytes == alone.cache_bytes / 8
    qkv = 36 * 4096 * 6144 * 2
    rest = (alone.weight_bytes - qkv) / 16 + qkv / 8
    assert copies.weight_bytes == pytest.approx(rest, rel=1e-3)
    assert (alone.exchanged_bytes, copies.exchanged_bytes) == (0, 72 * 8 * 4096 * 2)


@pytest.mark.parametrize("mesh", [ALONE, AbstractMesh((2, 2, 1), AXES)])
@pytest.mark.parametrize("options", [Options(), LONGFLOW])
def test_the_largest_batch_fits_and_no_larger_one(mesh, options):
    sizes = dict(prompt=7168, new=1024, kind="h100")
    most = counted("qwen3-8b", options, mesh, batch=1, **sizes).largest_batch
    assert most > 8 and most % mesh.shape["data"] == 0
    assert counted("qwen3-8b", options, mesh, batch=most, **sizes).fits
    assert not counted("qwen3-8b", options, mesh, batch=most + 1, **sizes).fits
    if mesh is ALONE:
        sizes["kind"] = "t4"
        assert counted("qwen3-8b", options, mesh, batch=1, **sizes).largest_batch == 0


def test_devices_in_words():
    assert fit.parse_devices("h100x4") == ("h100", 4)
    assert fit.parse_devices("V5E:4x4") == ("v5e", 16)
    assert fit.parse_devices("tpu7x:2x2x1") == ("tpu7x", 8)
    assert fit.parse_devices("h200") == ("h200", 1)
    for wrong in ("b9", "h100x0", "h100*4", "", "h100x65537", "h100x٣"):
        with pytest.raises(ValueError, match="expected devices such as h100x4"):
            fit.parse_devices(wrong)


def test_the_mesh_of_devices_that_are_not_there():
    config = SHAPES["qwen3-8b"]
    assert fit.mesh_for(config, "auto", 4).axis_sizes == (1, 4, 1)
    assert fit.mesh_for(config, "auto", 16).axis_sizes == (1, 8, 2)
    assert fit.mesh_for(config, "data=2", 4).axis_sizes == (2, 1, 1)
    with pytest.raises(ValueError, match="takes 8 devices, but there are 4"):
        fit.mesh_for(config, "model=8", 4)
    with pytest.raises(ValueError, match="do not divide over model=3 devices"):
        fit.mesh_for(config, "model=3", 4)


def test_the_command(jaxkv_):
    ask = ("plan", "qwen3-8b", "--devices", "h100x2", "--budget", "3200")
    code, out, _ = jaxkv_(*ask, "--json")
    result = json.loads(out)
    assert code == 0 and result["mesh"] == dict(data=1, model=2, copies=1)
    full, cut = result["methods"].values()
    assert cut["largest_batch"] > full["largest_batch"] > 0
    assert cut["cache_bytes"] < full["cache_bytes"] and full["fits"]
    code, out, _ = jaxkv_(*ask)
    assert code == 0 and "largest batch" in out and "budget 3200" in out
    code, out, _ = jaxkv_("plan", "needle", "--devices", "t4", "--json")
    assert code == 0 and json.loads(out)["methods"]["full cache"]["fits"]
    code, _, err = jaxkv_(*ask, "--new", "8192")
    assert code and "must be less than --context" in err
    code, out, _ = jaxkv_("plan", "olmoe-1b-7b", "--devices", "t4", "--json")
    assert code == 0 and json.loads(out)["context"] == 4096
    for flags, said in {
        ("--dtype", "int8"): "dtype must be one of",
        ("--dtype", ""): "--dtype is empty",
        ("--context", "40961"): "qwen3-8b was made for 40960 positions",
        ("--budget", "1"): "budget",
    }.items():
        code, out, err = jaxkv_(*ask, *flags)
        assert code == 2 and not out and said in err and err.count("\n") == 1


def test_temporaries_of_a_compiler(monkeypatch):
    sizes = dict(batch=8, prompt=1024, new=1024)
    formula = counted("qwen3-8b", Options(), **sizes)
    half = formula.temp_bytes // 2
    found = counted("qwen3-8b", Options(), temp_bytes=half, **sizes)
    assert found.total_bytes == formula.total_bytes - half
    assert found.largest_batch > formula.largest_batch

    def no_libtpu(**_):
        raise RuntimeError("no libtpu.so")

    monkeypatch.setattr(ahead, "get_topology_desc", no_libtpu)
    with pytest.raises(ValueError, match=r"--compile needs libtpu.*no libtpu\.so"):
        ahead.temporaries(
            *(SHAPES["qwen3-8b"], "h100x4", ALONE, Options()), dtype="bfloat16", **sizes
        )


def test_weights_by_hand():
    """A layer of 4 + 4 x 8 + 4 x 4 + 4 + 4 x 12 + 6 x 4, twice 40, and a norm."""
    layer = 4 + 4 * 8 + 4 * 4 + 4 + 4 * 12 + 6 * 4
    found = fit.weight_bytes(tiny.BY_HAND, ALONE, "bfloat16")
    assert found == 2 * (layer + 2 * 40 + 4)
