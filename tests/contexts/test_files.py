"""Contexts on disk: read back as they were, or refused in a line."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jaxkv
from jaxkv.models import orbax_folder

DOCUMENTS = [list(range(5, 75)), list(range(300, 340))]
MARKER = "jaxkv-context.json"


@pytest.fixture(scope="module")
def context(tiny_lm):
    return jaxkv.compress(
        tiny_lm, DOCUMENTS, budget=8, prefill=jaxkv.KNorm(), speculate=jaxkv.Aligned()
    )


@pytest.fixture
def saved(context, tmp_path):
    jaxkv.save_context(context, tmp_path / "context")
    return tmp_path / "context"


def test_what_is_saved_is_loaded(tiny_lm, context, saved, tmp_path):
    loaded = jaxkv.load_context(saved, tiny_lm)
    assert jax.tree.structure(loaded) == jax.tree.structure(context)
    jax.tree.map(np.testing.assert_array_equal, loaded, context)
    assert repr(loaded) == repr(context) and loaded.identity == context.identity
    plain = dataclasses.replace(context, likeliest=None, policy="another")
    with pytest.raises(jaxkv.CheckpointError, match="already holds a context"):
        jaxkv.save_context(plain, saved)
    jaxkv.save_context(plain, saved, overwrite=True)
    assert jaxkv.load_context(saved, tiny_lm).likeliest is None
    assert [path.name for path in tmp_path.iterdir()] == ["context"]


def test_a_crash_leaves_the_old_context(tiny_lm, context, saved, monkeypatch, tmp_path):
    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(orbax_folder, "_replace", crash)
    other = dataclasses.replace(context, policy="another")
    for folder in (saved, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            jaxkv.save_context(other, folder, overwrite=True)
    assert jaxkv.load_context(saved, tiny_lm).policy == context.policy
    assert [path.name for path in tmp_path.iterdir()] == ["context"]


def test_other_folders_are_left_alone(context, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(jaxkv.CheckpointError, match="not empty and not a context"):
        jaxkv.save_context(context, tmp_path / "mine", overwrite=True)


def test_another_model_is_refused(tiny_lm, saved):
    other = jax.tree.map(lambda x: x.at[..., 0].add(1.0), tiny_lm.params)
    with pytest.raises(ValueError, match="weights are not those of"):
        jaxkv.load_context(saved, dataclasses.replace(tiny_lm, params=other))


def _no_marker(folder):
    (folder / MARKER).unlink()


def _marker(**changes):
    def change(folder):
        marker = json.loads((folder / MARKER).read_text())
        (folder / MARKER).write_text(json.dumps(marker | changes))

    return change


def _cut(folder):
    (folder / MARKER).write_text((folder / MARKER).read_text()[:-9])


def _no_arrays(folder):
    (folder / "arrays").rename(folder / "other")


def _spoil(folder):
    *_, largest = sorted(
        (path for path in (folder / "arrays").rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 255
    largest.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_marker, "holds no context, since it has no jaxkv-context.json"),
        (_cut, "is not valid JSON"),
        (_marker(format=2), "format must be 1, found 2"),
        (_marker(identity={"name": "x"}), "is damaged .TypeError: .*; compress again"),
        (_marker(arrays={}), "is damaged .*; compress again"),
        (_marker(windows=[3, 3]), r"windows \[3, 3\], those of .* \[None, None\]"),
        (_marker(windows=[None]), r"windows \[None\], those of the model"),
        (_marker(policy=5), "policy must be a text and chat true or false, found 5"),
        (_marker(chat="no"), "true or false, found .*'no'"),
        (_marker(digest="x"), "its arrays are not those that were saved"),
        (_no_arrays, "is damaged .*; compress again"),
        (_spoil, "is damaged.*; compress again"),
    ],
    ids=lambda x: getattr(x, "__name__", "") if callable(x) else "",
)
def test_damage_is_named(tiny_lm, saved, damage, message):
    damage(saved)
    with pytest.raises(jaxkv.CheckpointError, match=message) as caught:
        jaxkv.load_context(saved, tiny_lm)
    assert "\n" not in str(caught.value)
