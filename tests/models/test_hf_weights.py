"""Reading safetensors into the parameter tree.

No torch here: the checkpoints are written from an independent list of Hugging Face's
tensor names. Parity with transformers is in `test_parity`.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hf_checkpoints import (
    CONFIG,
    EMBEDDING,
    HEAD,
    INDEX,
    MODEL,
    Q_PROJ,
    assert_trees_equal,
    hf_tensors,
    raises,
    write_checkpoint,
    write_index,
    write_shards,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxkv.models.config import LayerKind
from jaxkv.models.decoder import parameter_shapes
from jaxkv.models.hf.weights import read_weights
from jaxkv.models.parameter_plan import row_orders
from jaxkv.models.rope import Rope


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


def test_rows_of_a_head_of_which_a_part_is_rotated(tmp_path):
    """Rows of queries and keys move alike, with their biases and norms."""
    changes = dict(head_dim=8, qk_norm=True, qkv_bias=True, rope=Rope(rotary_dim=4))
    config, _ = write_checkpoint(tmp_path, **changes)
    kept = dataclasses.replace(config, kinds=(LayerKind(rope=None), LayerKind()))
    moved = read_weights(tmp_path, config, dtype=None)["layer_0"]
    plain = read_weights(tmp_path, kept, dtype=None)["layer_0"]
    order = [0, 1, 4, 5, 2, 3, 6, 7]
    for name, turned in (("qkv", 6), ("qkv_bias", 6), ("q_norm", 1), ("k_norm", 1)):
        found, stored = (np.asarray(x[name]) for x in (moved, plain))
        found, stored = (x.reshape(*x.shape[:-1], -1, 8) for x in (found, stored))
        equal = np.testing.assert_array_equal
        equal(found[..., :turned, order], stored[..., :turned, :])
        equal(found[..., turned:, :], stored[..., turned:, :])  # the values
    # Over all heads at once:
    whole = dataclasses.replace(config, qk_norm_per_head=False)
    orders = row_orders(whole)
    both = np.concatenate([order, np.array(order) + 8])
    np.testing.assert_array_equal(orders["layer_1", "k_norm"], both)
    assert orders["layer_1", "q_norm"].shape == (32,)


def test_fused_tensors(tmp_path):
    config, t = write_checkpoint(tmp_path)
    expected = read_weights(tmp_path, config, dtype=None)
    for i in range(config.num_layers):
        for fused, parts in (
            (
                "self_attn.qkv_proj",
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ),
            ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            names = [f"model.layers.{i}.{part}.weight" for part in parts]
            t[f"model.layers.{i}.{fused}.weight"] = np.concatenate(
                [t.pop(name) for name in names]
            )
    save_file(t, tmp_path / MODEL)
    assert_trees_equal(read_weights(tmp_path, config, dtype=None), expected)
    del t["model.layers.1.mlp.gate_up_proj.weight"]
    save_file(t, tmp_path / MODEL)
    with raises("missing model.layers.1.mlp.gate_proj.weight"):
        read_weights(tmp_path, config, dtype=None)


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
    with raises(where, "outside of the folder", "copy"):
        read_weights(folder, config, dtype=None)
    if where == "link":
        read_weights(folder, config, dtype=None, follow_links=True)
    else:  # an index says nothing of other folders
        with raises(where, "lies outside of the folder", "correct model.safetensors"):
            read_weights(folder, config, dtype=None, follow_links=True)


def test_a_link_to_the_only_file(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config, _ = write_checkpoint(folder)
    (folder / MODEL).rename(tmp_path / "x")
    (folder / MODEL).symlink_to(tmp_path / "x")
    with raises(MODEL, "is a link to", "follow_links=True", "--follow-links"):
        read_weights(folder, config, dtype=None)
    read_weights(folder, config, dtype=None, follow_links=True)


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
