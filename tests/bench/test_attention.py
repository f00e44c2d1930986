"""`jaxkv bench decode-attention`: the caches it times, and what the JSON holds."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.bench import attention
from jaxkv.bench.attention import Layers, Shape
from jaxkv.cli import main as cli
from jaxkv.kernels.decode import decode_attention
from jaxkv.kernels.scores import value_norms

TINY = Shape(batch=2, slots=12, heads=4, kv_heads=2, head_dim=4, dtype="float32")
QUICK = ["decode-attention", "--shapes", "2x8", "--heads", "4", "--kv-heads", "2"]
QUICK += ["--head-dim", "4", "--layers", "1", "--repeats", "3", "--copy-gib", "0.01"]


@pytest.fixture
def run(capsys):
    """Run `jaxkv bench` in this process."""

    def run(*arguments):
        code = cli.main(["bench", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_bytes_and_floor_by_hand():
    shape = Shape(batch=128, slots=3200)
    assert shape.num_bytes == 2 * 128 * 8 * 3200 * 128 * 2
    layers = Layers(TINY, 1e9, number=1)
    assert layers.floor == pytest.approx(2 * (2 * 2 * 12 * 4) * 4 / 1e9)


@pytest.mark.parametrize(
    ("shape", "number"),
    [
        (TINY, attention.MOST_LAYERS),
        (Shape(batch=1, slots=20_000, heads=8, dtype="float32"), 2),  # 164 MB a layer
    ],
)
def test_enough_layers_to_leave_the_cache(shape, number, monkeypatch):
    few = Shape(batch=1, slots=1, heads=1, kv_heads=1, head_dim=1)
    made = attention.make_inputs(few)
    monkeypatch.setattr(attention, "make_inputs", lambda *_: made)
    assert Layers(shape, 1e9).number == number


def test_free_slots_hold_nan_and_lower_the_floor():
    inputs = attention.make_inputs(TINY, share=0.5)
    free = np.asarray(inputs.slots.positions) < 0
    np.testing.assert_array_equal(np.isnan(inputs.slots.keys).all(-1), free)
    np.testing.assert_array_equal(np.isnan(inputs.slots.values).any(-1), free)
    layers = Layers(TINY, 1e9, share=0.5, number=3)
    assert 0 < layers.occupied < 1
    assert layers.floor == pytest.approx(layers.occupied * TINY.num_bytes / 1e9)
    assert not (np.asarray(attention.make_inputs(TINY).slots.positions) < 0).any()


def test_layers_follow_one_another(monkeypatch):
    """Each layer has its own cache, gets the last one's output, and is written once."""
    monkeypatch.setattr(attention, "LOOP_SECONDS", 0)  # two passes
    layers = Layers(TINY, 1e9, number=3)
    seen = []

    def step(query, token, slots):
        seen.append(slots.keys)
        return query + 1, slots._replace(values=slots.values + query.mean())

    start = float(layers._query.mean())
    before = [np.asarray(x.values) for x in layers._caches]
    timing = layers.time(step, repeats=1)
    assert len(timing.seconds) == 1
    passes = 2 * (1 + 1)  # two of the warm-up, two of the timed call
    assert float(layers._query.mean()) == pytest.approx(start + 3 * passes, abs=1e-4)
    for number, (old, new) in enumerate(zip(before, layers._caches, strict=True)):
        added = sum(start + number + 3 * i for i in range(passes))
        np.testing.assert_allclose(new.values - old, added, rtol=1e-4)


def test_caches_for_cudnn_have_slots_first_and_come_back():
    layers = Layers(TINY, 1e9, number=1)
    before = np.asarray(layers._caches[0].keys)
    shapes = []

    def step(query, token, slots):
        shapes.append(slots.keys.shape)
        return query, slots

    layers.time(step, repeats=1, slots_first=True)
    assert set(shapes) == {(2, 12, 2, 4)}
    np.testing.assert_array_equal(layers._caches[0].keys, before)


@pytest.mark.parametrize("name", ["attention", "attend_and_choose"])
def test_steps_do_what_they_are_named_for(name):
    query, token, slots = attention.make_inputs(TINY)
    target = jnp.broadcast_to(slots.target[:, :1], slots.target.shape)
    norms = value_norms(slots.values, "l1")
    inputs = query, token, slots._replace(norms=norms, target=target)
    out, new = getattr(attention, name)(*inputs, scale=TINY.scale)
    want, wanted = decode_attention(
        *inputs, scale=TINY.scale, implementation="reference"
    )
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_array_equal(new.keys, wanted.keys)
    assert (name == "attention") == bool((new.target == target).all())


def test_json(run, tmp_path):
    out = tmp_path / "new" / "result.json"
    code, stdout, stderr = run(*QUICK, "--profile", "--json", "--out", out)
    assert code == 0, stderr
    content = json.loads(stdout)
    assert content == json.loads(out.read_text())
    assert {"command", "device", "versions", "copy_bytes_per_second"} <= content.keys()
    assert content["decode_implementation"] == "xla"
    assert "needs an NVIDIA GPU" in content["skipped"]["cudnn"]
    (row,) = content["rows"]
    assert (row["batch"], row["slots"], row["layers"]) == (2, 8, 1)
    assert row["versions"].keys() == {"attention", "longflow"}
    for version in row["versions"].values():
        assert sorted(version["calls_ms"])[1] == version["ms"]
        low, high = version["quartiles_ms"]
        assert low <= version["ms"] <= high
        assert version["ratio_to_floor"] == version["ms"] / row["floor_ms"]
        assert version["kernels_us"] == {}  # there is no GPU to profile
    alone, scored = (row["versions"][x]["ms"] for x in ("attention", "longflow"))
    assert row["score_percent"] == pytest.approx(100 * (scored / alone - 1))


def test_ratios_to_cudnn(monkeypatch, run):
    """With a stand-in for cuDNN, which no CPU has."""
    monkeypatch.setattr(attention, "cudnn_unavailable", lambda dtype: "")
    monkeypatch.setattr(
        attention, "cudnn", lambda query, token, slots, scale: (query, slots)
    )
    code, stdout, stderr = run(*QUICK, "--versions", "cudnn,attention", "--json")
    assert code == 0, stderr
    row = json.loads(stdout)["rows"][0]
    assert row["versions"]["cudnn"]["ratio_to_cudnn"] == 1
    assert "score_percent" not in row
    ms = {name: version["ms"] for name, version in row["versions"].items()}
    ratio = row["versions"]["attention"]["ratio_to_cudnn"]
    assert ratio == ms["attention"] / ms["cudnn"]


def test_table(run):
    quick = [*QUICK, "--shapes", "2x8,1x5", "--versions", "longflow"]
    code, stdout, stderr = run(*quick, "--dtype", "bfloat16")
    assert code == 0, stderr
    assert "bfloat16" in stdout
    assert stdout.index("2x8") < stdout.index("1x5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "8"], "--shapes takes batch and slots"),
        (["--shapes", "8xa"], "--shapes takes batch and slots"),
        (["--shapes", "8x0"], "must be at least 1"),
        (["--kv-heads", "3"], "multiple of --kv-heads"),
        (["--versions", "attention,flash"], "unknown 'flash'"),
        (["--versions", "cudnn"], "needs an NVIDIA GPU"),
        (["--decode-implementation", "triton"], "needs an NVIDIA GPU"),
        (["--copy-gib", "0"], "must lie between"),
    ],
)
def test_bad_input_gets_one_line(run, arguments, message):
    code, stdout, stderr = run(*QUICK, *arguments)
    assert (code, stdout) == (2, "")
    assert message in stderr
    assert stderr.strip().count("\n") == 0


def test_cudnn_takes_two_dtypes(monkeypatch):
    monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")
    assert attention.cudnn_unavailable("bfloat16") == ""
    assert "got float32" in attention.cudnn_unavailable("float32")


def test_cudnn_step_is_attention_over_caches_with_slots_first(monkeypatch):
    """Checked with the XLA version of the same call."""
    attend = attention.jax.nn.dot_product_attention

    def plain(*arguments, implementation, **options):
        assert implementation == "cudnn"
        return attend(*arguments, **options)

    monkeypatch.setattr(attention.jax.nn, "dot_product_attention", plain)
    query, token, slots = attention.make_inputs(TINY)
    turned = slots._replace(
        keys=slots.keys.swapaxes(1, 2), values=slots.values.swapaxes(1, 2)
    )
    out, _ = attention.cudnn(query, token, turned, scale=TINY.scale)
    finished = jnp.full_like(token.position, -1)  # writes nothing
    want, _ = decode_attention(
        *(query, token._replace(position=finished), slots),
        scale=TINY.scale,
        implementation="reference",
    )
    np.testing.assert_allclose(out, want, atol=1e-5)
