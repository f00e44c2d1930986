"""Reading safetensors into the parameter tree.

No torch here: the checkpoints are written from an independent list of Hugging Face's
tensor names. Parity with transformers is in `test_parity`.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxkv.models import hf_weights
from jaxkv.models.checkpoint import CheckpointError
from jaxkv.models.decoder import Config, parameter_shapes
from jaxkv.models.hf_weights import read_weights

CONFIG = Config(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
)
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def hf_tensors(config, dtype="float32"):
    """Return random weights in Hugging Face's names and layout, `[out, in]`."""
    c, rng = config, np.random.default_rng(0)
    kv, queries = c.num_kv_heads * c.head_dim, c.num_heads * c.head_dim
    layer = {
        "input_layernorm.weight": [c.hidden_size],
        "post_attention_layernorm.weight": [c.hidden_size],
        "self_attn.q_proj.weight": [queries, c.hidden_size],
        "self_attn.k_proj.weight": [kv, c.hidden_size],
        "self_attn.v_proj.weight": [kv, c.hidden_size],
        "self_attn.o_proj.weight": [c.hidden_size, queries],
        "mlp.gate_proj.weight": [c.intermediate_size, c.hidden_size],
        "mlp.up_proj.weight": [c.intermediate_size, c.hidden_size],
        "mlp.down_proj.weight": [c.hidden_size, c.intermediate_size],
    }
    if c.qkv_bias:
        layer |= {
            "self_attn.q_proj.bias": [queries],
            "self_attn.k_proj.bias": [kv],
            "self_attn.v_proj.bias": [kv],
        }
    if c.output_bias:
        layer["self_attn.o_proj.bias"] = [c.hidden_size]
    if c.qk_norm:
        layer["self_attn.q_norm.weight"] = [c.head_dim]
        layer["self_attn.k_norm.weight"] = [c.head_dim]
    shapes = {
        EMBEDDING: [c.vocab_size, c.hidden_size],
        "model.norm.weight": [c.hidden_size],
    }
    if not c.tied:
        shapes[HEAD] = [c.vocab_size, c.hidden_size]
    for i in range(c.num_layers):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return {n: rng.normal(size=s).astype(jnp.dtype(dtype)) for n, s in shapes.items()}


def write_checkpoint(folder, dtype="float32", **changes):
    """Write weights as one file; return their configuration and the tensors."""
    config = dataclasses.replace(CONFIG, **changes)
    tensors = hf_tensors(config, dtype)
    save_file(tensors, folder / MODEL)
    return config, tensors


def write_shards(folder, tensors, num_shards):
    """Write tensors in turn to shards, with their index."""
    weight_map = {}
    for i in range(num_shards):
        name = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(list(tensors.items())[i::num_shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_trees_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def raises(*words):
    """Expect a CheckpointError whose message has all the words, in order."""
    pattern = "(?s)" + ".*".join(re.escape(str(word)) for word in words)
    return pytest.raises(CheckpointError, match=pattern)


def test_layout(tmp_path):
    """Every parameter holds the tensors it should, in the order the network splits."""
    config, t = write_checkpoint(tmp_path, qkv_bias=True, output_bias=True)
    params = read_weights(tmp_path, config, dtype="float32")
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        lambda leaf: leaf.shape, parameter_shapes(config)
    )
    equal = np.testing.assert_array_equal
    equal(params["embedding"], t[EMBEDDING])
    equal(params["head"], t[HEAD].T)
    equal(params["final_norm"], t["model.norm.weight"])
    layer, prefix = params["layer_1"], "model.layers.1."
    q, k, v = (t[f"{prefix}self_attn.{x}_proj.weight"].T for x in "qkv")
    equal(layer["qkv"], np.concatenate([q, k, v], axis=1))
    biases = [t[f"{prefix}self_attn.{x}_proj.bias"] for x in "qkv"]
    equal(layer["qkv_bias"], np.concatenate(biases))
    equal(layer["output"], t[f"{prefix}self_attn.o_proj.weight"].T)
    equal(layer["output_bias"], t[f"{prefix}self_attn.o_proj.bias"])
    gate, up = (t[f"{prefix}mlp.{x}_proj.weight"].T for x in ("gate", "up"))
    equal(layer["gate_up"], np.concatenate([gate, up], axis=1))
    equal(layer["down"], t[f"{prefix}mlp.down_proj.weight"].T)
    equal(layer["attention_norm"], t[f"{prefix}input_layernorm.weight"])
    equal(layer["mlp_norm"], t[f"{prefix}post_attention_layernorm.weight"])


def test_qk_norm(tmp_path):
    config, t = write_checkpoint(tmp_path, qk_norm=True, head_dim=6)
    layer = read_weights(tmp_path, config, dtype="float32")["layer_0"]
    for name in ("q_norm", "k_norm"):
        stored = t[f"model.layers.0.self_attn.{name}.weight"]
        np.testing.assert_array_equal(layer[name], stored)


@given(num_shards=st.integers(1, 8), seed=st.integers(0, 99))
def test_shards_equal_the_single_file(tmp_path_factory, num_shards, seed):
    single, sharded = (tmp_path_factory.mktemp("x") for _ in range(2))
    config, tensors = write_checkpoint(single)
    order = np.random.default_rng(seed).permutation(list(tensors))
    write_shards(sharded, {str(n): tensors[n] for n in order}, num_shards)
    assert_trees_equal(
        read_weights(sharded, config, dtype=None),
        read_weights(single, config, dtype=None),
    )


def test_the_single_file_wins_over_an_index(tmp_path):
    config, _ = write_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text("{")
    read_weights(tmp_path, config, dtype=None)


@pytest.mark.parametrize("stored", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16", None])
def test_dtypes(tmp_path, stored, wanted):
    config, tensors = write_checkpoint(tmp_path, stored)
    params = read_weights(tmp_path, config, dtype=wanted)
    own = "float32" if stored == "float64" else stored
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {wanted or own}
    expected = tensors[HEAD].T.astype(own).astype(jnp.dtype(wanted or own))
    np.testing.assert_array_equal(params["head"], expected)


def test_mixed_dtypes_lose_nothing(tmp_path):
    config, tensors = write_checkpoint(tmp_path)
    tensors[Q_PROJ] = tensors[Q_PROJ].astype(ml_dtypes.bfloat16)
    save_file(tensors, tmp_path / MODEL)
    params = read_weights(tmp_path, config, dtype=None)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    k = tensors[Q_PROJ.replace("q_proj", "k_proj")].T
    np.testing.assert_array_equal(params["layer_0"]["qkv"][:, 8:12], k)


def test_unknown_dtype(tmp_path):
    config, _ = write_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"one of .* found 'int8'"):
        read_weights(tmp_path, config, dtype="int8")


def test_shardings(tmp_path):
    config, _ = write_checkpoint(tmp_path)
    mesh = jax.make_mesh((1,), ("model",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = jax.tree.map(lambda _: sharding, parameter_shapes(config))
    params = read_weights(tmp_path, config, dtype="bfloat16", shardings=shardings)
    for leaf in jax.tree.leaves(params):
        assert isinstance(leaf.sharding, jax.sharding.NamedSharding)


def test_tied_and_rotary_extras_are_accepted(tmp_path):
    config, tensors = write_checkpoint(tmp_path, tied=True)
    tensors[HEAD] = tensors[EMBEDDING]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(1, np.float32)
    save_file(tensors, tmp_path / MODEL)
    assert "head" not in read_weights(tmp_path, config, dtype=None)


def test_a_tied_head_of_its_own_is_refused(tmp_path):
    config, tensors = write_checkpoint(tmp_path, tied=True)
    tensors[HEAD] = tensors[EMBEDDING].copy()
    tensors[HEAD][-1, -1] += 1
    save_file(tensors, tmp_path / MODEL)
    with raises("tie_word_embeddings=true", HEAD, EMBEDDING):
        read_weights(tmp_path, config, dtype=None)


def without(name):
    return lambda t: t.pop(name)


def put(name, value):
    return lambda t: t.update({name: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(Q_PROJ), ["missing", Q_PROJ]),
        (without(HEAD), ["missing", HEAD, "tie_word_embeddings is false"]),
        (without(EMBEDDING), ["missing", EMBEDDING]),
        (put("score.weight", np.ones(1)), ["superfluous", "score.weight"]),
        (
            put("model.layers.2.mlp.up_proj.weight", np.ones(1)),
            ["superfluous", "model.layers.2"],
        ),
        (put(Q_PROJ, np.ones((8, 9))), [Q_PROJ, "(8, 8)", "found (8, 9)"]),
        (put(Q_PROJ, np.ones(8)), [Q_PROJ, "(8, 8)", "found (8,)"]),
        (put(Q_PROJ, np.ones((8, 8), np.int8)), [Q_PROJ, "BF16", "found I8"]),
    ],
)
def test_wrong_tensors(tmp_path, change, words):
    config, tensors = write_checkpoint(tmp_path)
    change(tensors)
    save_file(tensors, tmp_path / MODEL)
    with raises(*words):
        read_weights(tmp_path, config, dtype=None)


def test_many_wrong_tensors_give_a_short_message(tmp_path):
    config, tensors = write_checkpoint(tmp_path)
    save_file({EMBEDDING: tensors[EMBEDDING]}, tmp_path / MODEL)
    with raises("missing lm_head.weight", "and 16 more", "superfluous nothing"):
        read_weights(tmp_path, config, dtype=None)


@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_file(tmp_path_factory, share):
    folder = tmp_path_factory.mktemp("x")
    config, _ = write_checkpoint(folder)
    data = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(data[: int(share * len(data))])
    with raises(MODEL, "damaged"):
        read_weights(folder, config, dtype=None)


def test_no_weights(tmp_path):
    with raises("neither", MODEL, INDEX, "found nothing"):
        read_weights(tmp_path / "absent", CONFIG, dtype=None)
    (tmp_path / "model.gguf").touch()
    with raises("neither", MODEL, INDEX, "found model.gguf"):
        read_weights(tmp_path, CONFIG, dtype=None)
    (tmp_path / "pytorch_model.bin").touch()
    with raises("only torch files pytorch_model.bin", "convert", "save_pretrained"):
        read_weights(tmp_path, CONFIG, dtype=None)


@pytest.fixture
def sharded(tmp_path):
    """A folder with two shards: folder, configuration, index."""
    return tmp_path, CONFIG, write_shards(tmp_path, hf_tensors(CONFIG), 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["not valid JSON"]),
        ("{}", ["weight_map must map", "NoneType"]),
        ('{"weight_map": []}', ["weight_map must map", "list"]),
        ('{"weight_map": {"x": 1}}', ["weight_map must map"]),
        ('{"weight_map": {"x": "a\\u0000b"}}', ["weight_map must map"]),
        ('{"weight_map": {}}', ["missing", EMBEDDING[:4]]),
    ],
)
def test_damaged_index(sharded, content, words):
    folder, config, _ = sharded
    (folder / INDEX).write_text(content)
    with raises(*words):
        read_weights(folder, config, dtype=None)


def test_missing_shard(sharded):
    folder, config, weight_map = sharded
    (folder / weight_map[EMBEDDING]).unlink()
    with raises(weight_map[EMBEDDING], "is missing", INDEX):
        read_weights(folder, config, dtype=None)


def test_index_and_shards_disagree(sharded):
    folder, config, weight_map = sharded
    other = next(file for file in weight_map.values() if file != weight_map[EMBEDDING])
    write_index(folder, weight_map | {EMBEDDING: other})
    with raises("does not hold what", EMBEDDING):
        read_weights(folder, config, dtype=None)


@pytest.mark.parametrize("where", ["../x.safetensors", "absolute", "link", "a/../x"])
def test_shard_outside_of_the_folder(tmp_path, where):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config, tensors = write_checkpoint(folder)
    outside = tmp_path / "x.safetensors"
    (folder / MODEL).rename(outside)
    if where == "absolute":
        where = str(outside)
    elif where == "link":
        (folder / where).symlink_to(outside)
    write_index(folder, dict.fromkeys(tensors, where))
    with raises(where, "outside of the folder"):
        read_weights(folder, config, dtype=None)


@pytest.mark.parametrize("blobs", ["cache/models--a--b/blobs", "cache/blobs"])
def test_links_of_the_hub_cache(tmp_path, blobs):
    """There, every file is a link to a blob of the model or of the whole cache."""
    snapshot = tmp_path / "cache/models--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / blobs).mkdir()
    config, _ = write_checkpoint(snapshot)
    (snapshot / MODEL).rename(tmp_path / blobs / "4567")
    (snapshot / MODEL).symlink_to(os.path.relpath(tmp_path / blobs / "4567", snapshot))
    read_weights(snapshot, config, dtype=None)


def test_a_failing_read_names_the_tensor(tmp_path, monkeypatch):
    config, _ = write_checkpoint(tmp_path)
    spy(monkeypatch, lambda name: (_ for _ in ()).throw(OSError("disk")))
    with raises(MODEL, EMBEDDING, "cannot be read (disk)"):
        read_weights(tmp_path, config, dtype=None)


def spy(monkeypatch, before_read, after_read=lambda array: array):
    """Call the hooks around every read of a tensor."""
    real = hf_weights.safe_open

    class Spy:
        def __init__(self, *args, **options):
            self._real = real(*args, **options)

        def __enter__(self):
            self._file = self._real.__enter__()
            return self

        def __exit__(self, *args):
            return self._real.__exit__(*args)

        def get_tensor(self, name):
            before_read(name)
            return after_read(self._file.get_tensor(name))

        def __getattr__(self, name):
            return getattr(self._file, name)

    monkeypatch.setattr(hf_weights, "safe_open", Spy)


def test_tensors_are_read_once_and_one_at_a_time(tmp_path, monkeypatch):
    """No host copy of a tensor is alive when the next one is read."""
    config, tensors = write_checkpoint(tmp_path, "bfloat16")
    read, alive = [], weakref.WeakSet()

    class Watched(np.ndarray):
        __hash__ = object.__hash__

    def watch(array):
        array = array.view(Watched)
        alive.add(array)
        return array

    def check(name):
        read.append(name)
        assert not alive

    spy(monkeypatch, check, watch)
    read_weights(tmp_path, config, dtype="float32")
    assert sorted(read) == sorted(tensors)


PEAK = """
import sys
from jaxkv.models import hf_weights
from jaxkv.models.decoder import Config

def used():  # memory that is not a mapped file, in bytes
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])

def join(parts):
    samples.append(used())
    array = real(parts)
    samples.append(used())
    return array

real, hf_weights._join, samples = hf_weights._join, join, []
tiny, large = (eval(config) for config in sys.argv[3:])
hf_weights.read_weights(sys.argv[1], tiny, dtype=None)  # starts the backend
start = used()
params = hf_weights.read_weights(sys.argv[2], large, dtype=None)
print(max(*samples, used()) - start)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_peak_memory_is_the_weights_and_little_more(tmp_path):
    """In a new process, where no freed memory of other tests hides the growth."""
    folders = tmp_path / "tiny", tmp_path / "large"
    for folder in folders:
        folder.mkdir()
    tiny, _ = write_checkpoint(folders[0])
    large, tensors = write_checkpoint(
        folders[1], hidden_size=512, intermediate_size=1024, num_layers=24
    )
    total = sum(tensor.nbytes for tensor in tensors.values())
    run = subprocess.run(
        [sys.executable, "-c", PEAK, *folders, repr(tiny), repr(large)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,  # elsewhere, or a folder `jaxkv` there would be imported
    )
    assert run.returncode == 0, run.stderr
    assert 0.95 * total < int(run.stdout) < 1.6 * total


def test_headers_are_checked_before_anything_is_read(tmp_path, monkeypatch):
    config, tensors = write_checkpoint(tmp_path)
    tensors["model.norm.weight"] = np.ones(9, np.float32)
    save_file(tensors, tmp_path / MODEL)
    spy(monkeypatch, lambda name: pytest.fail(f"{name} was read"))
    with raises("model.norm.weight"):
        read_weights(tmp_path, config, dtype=None)
