"""Orbax copies of converted checkpoints: whole or absent, and nothing lost."""

import dataclasses
import gc
import json
import os
import shutil
import typing

import hf_checkpoints
import jax
import numpy as np
import pytest
from hf_checkpoints import raises

from jaxkv.kernels.experts import Gate
from jaxkv.models import orbax_copy, orbax_folder
from jaxkv.models.config import Experts, LayerKind
from jaxkv.models.decoder import random_parameters
from jaxkv.models.orbax_copy import is_orbax_copy, load_orbax, save_orbax
from jaxkv.models.rope import (
    FrequencyFactors,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    Scaling,
    YarnScaling,
)

CONFIG = dataclasses.replace(
    hf_checkpoints.CONFIG,
    rope=Rope(
        scaling=Llama3Scaling(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=32,
        )
    ),
    experts=Experts(count=2, per_token=1, size=4, gate=Gate(limit=7.0), bias=True),
)
SCALINGS = (  # one of each kind
    CONFIG.rope.scaling,
    LinearScaling(factor=2.0),
    YarnScaling(factor=4.0, original_max_positions=32, attention_factor=1.5),
    LongRopeScaling(
        short_factors=(1.0,), long_factors=(2.0,), original_max_positions=32
    ),
    FrequencyFactors(factors=(3.0,)),
)
TEXT = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@pytest.fixture
def original(tmp_path):
    """A checkpoint's folder, its configuration and parameters in bfloat16."""
    folder = tmp_path / "original"
    for name in (*TEXT, *WEIGHTS):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'"{name}"')
    return folder, CONFIG, random_parameters(CONFIG, jax.random.key(0))


def assert_trees_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def files(folder):
    """List the files of a copy, without Orbax's own."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if path.parts[0] != "params"}


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_orbax_round_trip(tmp_path, original, dtype):
    _, config, params = original
    save_orbax(params, config, tmp_path / "copy")
    found_config, found = load_orbax(tmp_path / "copy", dtype=dtype)
    assert found_config == config
    wanted = jax.tree.map(lambda leaf: leaf.astype(dtype or "bfloat16"), params)
    assert_trees_equal(found, wanted)
    assert found["head"].dtype == (dtype or "bfloat16")


def test_orbax_round_trip_of_every_rotation(tmp_path, original):
    """Each layer has its own: every scaling, a part of each head, and none at all."""
    assert {type(scaling) for scaling in SCALINGS} == set(typing.get_args(Scaling))
    ropes = [Rope(scaling=scaling) for scaling in SCALINGS] + [Rope(rotary_dim=2), None]
    kinds = tuple(LayerKind(rope=rope) for rope in ropes)
    config = dataclasses.replace(CONFIG, num_layers=len(kinds), kinds=kinds)
    params = random_parameters(config, jax.random.key(0))
    save_orbax(params, config, tmp_path / "copy")
    assert load_orbax(tmp_path / "copy")[0] == config


def test_orbax_copy_has_the_text_files_and_no_weights(tmp_path, original):
    folder, config, params = original
    copy = tmp_path / "copy"
    assert not is_orbax_copy(folder) and not is_orbax_copy(copy)
    save_orbax(params, config, copy, source=folder)
    assert is_orbax_copy(copy)
    assert files(copy) == {*TEXT, "jaxkv.json"}
    for name in TEXT:
        assert (copy / name).read_text() == (folder / name).read_text()
    save_orbax(params, config, tmp_path / "second", source=copy)
    assert files(tmp_path / "second") == files(copy)


def test_orbax_overwrites_copies_only_when_told(tmp_path, original):
    folder, config, params = original
    copy = tmp_path / "copy"
    copy.mkdir()  # an empty folder is as good as none
    save_orbax(params, config, copy, source=folder)
    with raises(copy, "already holds a copy", "overwrite=True"):
        save_orbax(params, config, copy)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    save_orbax(doubled, config, copy, source=copy, overwrite=True)
    assert_trees_equal(load_orbax(copy)[1], doubled)
    assert "tokenizer.json" in files(copy)
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "original"}


def test_orbax_never_overwrites_anything_else(tmp_path, original):
    folder, config, params = original
    before = files(folder)
    with raises(folder, "not a copy"):
        save_orbax(params, config, folder, overwrite=True)
    assert files(folder) == before
    with raises("exists and is not a folder"):
        save_orbax(params, config, folder / "config.json", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with raises("exists and is not a folder"):
        save_orbax(params, config, tmp_path / "link", overwrite=True)
    with raises("is not a folder; make it first"):
        save_orbax(params, config, tmp_path / "absent/copy")
    with raises("source=", "is no folder and no file"):
        save_orbax(params, config, tmp_path / "copy", source=tmp_path / "absent")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    ("module", "stage"),
    [
        (orbax_copy, "_copy_text"),
        (orbax_copy, "checkpointer"),
        (orbax_folder, "_replace"),
    ],
)
def test_a_failure_leaves_the_old_copy_and_nothing_else(
    tmp_path, original, monkeypatch, module, stage
):
    folder, config, params = original
    copy = tmp_path / "copy"
    save_orbax(params, config, copy, source=folder)

    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, stage, crash)
    for target in (copy, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            save_orbax(params, config, target, source=folder, overwrite=True)
    monkeypatch.undo()
    assert_trees_equal(load_orbax(copy)[1], params)
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "original"}


def test_a_failed_rename_brings_the_old_copy_back(tmp_path, original, monkeypatch):
    _, config, params = original
    copy = tmp_path / "copy"
    save_orbax(params, config, copy)
    rename = type(copy).rename

    def fail(self, target):
        if self.suffix == ".partial":
            raise OSError("disk")
        return rename(self, target)

    monkeypatch.setattr(type(copy), "rename", fail)
    with pytest.raises(OSError, match="disk"):
        save_orbax(params, config, copy, overwrite=True)
    monkeypatch.undo()
    assert_trees_equal(load_orbax(copy)[1], params)
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "original"}


def test_what_a_dead_process_left_is_no_obstacle(tmp_path, original):
    _, config, params = original
    left = tmp_path / f".copy.{os.getpid()}.partial"
    left.mkdir()
    (left / "params").touch()
    save_orbax(params, config, tmp_path / "copy")
    assert not left.exists()


def test_orbax_refuses_other_parameters(tmp_path, original):
    _, config, params = original
    with raises("params must be the parameter tree"):
        save_orbax({"embedding": params["embedding"]}, config, tmp_path / "copy")
    mixed = params | {"head": params["head"].astype("float32")}
    with raises("one dtype", "['bfloat16', 'float32']"):
        save_orbax(mixed, config, tmp_path / "copy")


def test_orbax_saves_from_one_process(tmp_path, original, monkeypatch):
    _, config, params = original
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(NotImplementedError, match="one process, found 2"):
        save_orbax(params, config, tmp_path / "copy")


def test_orbax_refuses_other_folders_and_dtypes(original):
    folder, _, _ = original
    with raises("has no jaxkv.json", "Hugging Face"):
        load_orbax(folder)
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_orbax(folder, dtype="int8")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(format=1), ["format must be 2, found 1"]),
        (dict(config=None), ["is damaged"]),
        (dict(config={}), ["is damaged", "KeyError: 'is'"]),
        (dict(config={"is": "Rope", "x": 1}), ["is damaged", "'x'"]),
        (dict(config={"is": "Rope"}), ["is damaged", "config is no Config: Rope"]),
        (dict(config={"is": "NewScaling"}), ["is damaged", "NewScaling"]),
        (dict(dtype="int8"), ["is damaged", "int8"]),
    ],
)
def test_damaged_marker(tmp_path, original, change, words):
    _, config, params = original
    copy = tmp_path / "copy"
    save_orbax(params, config, copy)
    marker = json.loads((copy / "jaxkv.json").read_text())
    (copy / "jaxkv.json").write_text(json.dumps(marker | change))
    with raises("jaxkv.json", *words):
        load_orbax(copy)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["folder", "data", "shape"])
def test_damaged_parameters(tmp_path, original, damage):
    _, config, params = original
    copy = tmp_path / "copy"
    save_orbax(params, config, copy)
    if damage == "folder":
        shutil.rmtree(copy / "params")
    elif damage == "data":
        for path in (copy / "params").rglob("d/*"):
            path.write_bytes(path.read_bytes()[:-50])
    else:
        marker = json.loads((copy / "jaxkv.json").read_text())
        marker["config"]["vocab_size"] = 21
        (copy / "jaxkv.json").write_text(json.dumps(marker))
    with raises("params is damaged or does not fit jaxkv.json"):
        load_orbax(copy)
    gc.collect()  # Orbax's abandoned reads complain here, and not in another test


def test_orbax_shardings(tmp_path, original):
    _, config, params = original
    save_orbax(params, config, tmp_path / "copy")
    mesh = jax.make_mesh((1,), ("model",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shardings = jax.tree.map(lambda _: sharding, params)
    _, found = load_orbax(tmp_path / "copy", shardings=shardings)
    for leaf in jax.tree.leaves(found):
        assert isinstance(leaf.sharding, jax.sharding.NamedSharding)
