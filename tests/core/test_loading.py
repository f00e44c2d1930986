"""Which checkpoint a name stands for, and what of its folder is read."""

import codecs
import shutil
from pathlib import Path

import pytest

import jaxkv
from jaxkv.language_model import NEEDLE, SMOLLM2, locate, needle_folder


def test_a_folder_of_the_name_of_a_packaged_checkpoint(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    assert locate(NEEDLE) == needle_folder()
    assert locate(Path(NEEDLE)) == needle_folder()
    assert not caplog.records
    Path(NEEDLE).mkdir()
    assert locate(NEEDLE) == needle_folder()
    assert "write ./needle for the folder of that name here" in caplog.text
    for name in (f"./{NEEDLE}", Path(NEEDLE), tmp_path / NEEDLE):
        assert locate(name).samefile(tmp_path / NEEDLE)


def test_no_word_where_both_are_one(monkeypatch, caplog):
    monkeypatch.chdir(needle_folder().parent)
    assert locate(NEEDLE) == needle_folder()
    assert not caplog.records


def test_a_file_of_the_name_of_a_packaged_checkpoint(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path(SMOLLM2).touch()
    monkeypatch.setattr("jaxkv.language_model.smollm2_file", needle_folder)
    locate(SMOLLM2)
    assert "write ./smollm2 for the file of that name here" in caplog.text


@pytest.fixture
def copy(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def test_byte_order_marks(tiny_lm, copy):
    for path in copy.glob("*.json"):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    lm = jaxkv.load(copy)
    assert lm.config == tiny_lm.config
    assert lm.stop_ids == tiny_lm.stop_ids
    assert lm.tokenizer("the cat")["input_ids"] == [
        *tiny_lm.tokenizer("the cat")["input_ids"]
    ]


def test_links_and_adapters(copy, tmp_path, caplog, jaxkv_):
    (weights,) = copy.glob("*.safetensors")
    weights.rename(tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    with pytest.raises(jaxkv.CheckpointError, match="follow_links=True"):
        jaxkv.load(copy)
    jaxkv.load(copy, follow_links=True)
    words = ["--prompt", "a", "--max-new-tokens", "1"]
    assert "--follow-links" in jaxkv_.error("generate", copy, *words)
    assert jaxkv_("generate", copy, *words, "--follow-links")[0] == 0
    assert jaxkv_("convert", copy, tmp_path / "out", "--follow-links")[0] == 0
    (copy / "adapter_config.json").write_text("{}")
    jaxkv.load(copy, follow_links=True)
    assert "the adapter is not applied" in caplog.text
    weights.unlink()
    with pytest.raises(jaxkv.CheckpointError, match="holds only an adapter"):
        jaxkv.load(copy)
