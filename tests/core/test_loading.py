"""Which checkpoint a name stands for, and what of its folder is read."""

import codecs
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import jaxkv
from jaxkv import language_model
from jaxkv.cli.generate import Sampling
from jaxkv.language_model import NEEDLE, SMOLLM2, locate, needle_folder
from jaxkv.text.chat import encode_chat
from jaxkv.text.prompts import encode


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ({"model_type": "phi3"}, "Phi-3"),
        ({"model_type": "glm"}, "GLM"),
        ({"model_type": "granite"}, "Granite"),
        ({"architectures": ["MistralForCausalLM"]}, "Mistral"),
        (None, "Qwen3"),  # no file, as in the copy of a GGUF: what has such switches
    ],
)
def test_the_family_is_the_one_that_the_files_name(tiny, tiny_lm, copy, raw, name):
    """Also where its network has the switches of another one."""
    file = copy / "config.json"
    file.unlink() if raw is None else file.write_text(json.dumps(raw))
    found = dataclasses.replace(tiny_lm, made_as=language_model._family(copy))
    assert f": {name} network of" in repr(found)
    assert language_model._family(tiny) == tiny_lm.family == "Qwen3"


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


def test_the_longest_sequence(tiny, tmp_path, jaxkv_):
    whole = jaxkv.load(tiny).config
    few = jaxkv.load(tiny, max_positions=8)
    assert few.config == dataclasses.replace(whole, max_positions=8)
    with pytest.raises(ValueError, match="tiny was made for 8"):
        jaxkv.generate(few, [[5] * 7], max_new_tokens=2)
    for most in (0, whole.max_positions + 1):
        with pytest.raises(ValueError, match=f"max_positions must be .*, found {most}"):
            jaxkv.load(tiny, max_positions=most)
    out = tmp_path / "out"
    assert "found 0" in jaxkv_.error("convert", tiny, out, "--max-positions", 0)
    assert jaxkv_("convert", tiny, out, "--max-positions", 8)[0] == 0
    assert jaxkv.load(out).config == few.config


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


@pytest.mark.parametrize(
    ("config", "expected", "said"),
    [
        (None, jaxkv.Greedy(), ""),
        ({}, jaxkv.Greedy(), ""),
        ({"repetition_penalty": 1.5}, jaxkv.Greedy(repetition_penalty=1.5), ""),
        (
            {"do_sample": True, "temperature": 0.5, "num_beams": 4},
            jaxkv.Categorical(temperature=0.5, top_k=50),
            "left out num_beams=4, which jaxkv does not have",
        ),
    ],
)
def test_sampler(tiny_lm, tmp_path, caplog, config, expected, said):
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert dataclasses.replace(tiny_lm, folder=tmp_path).sampler == expected
    assert said in caplog.text
    assert bool(said) == bool(caplog.records)


OWN = dict(do_sample=True, temperature=0.5, top_p=0.8, repetition_penalty=1.5)


@pytest.mark.parametrize(
    ("flags", "config", "expected"),
    [
        ({}, OWN, jaxkv.Greedy()),
        (dict(temperature=2.0), OWN, jaxkv.Categorical(temperature=2.0)),
        (
            dict(use_generation_config=True),
            OWN,
            jaxkv.Categorical(
                temperature=0.5, top_k=50, top_p=0.8, repetition_penalty=1.5
            ),
        ),
        (
            dict(use_generation_config=True, temperature=2.0, top_k=0),
            OWN,
            jaxkv.Categorical(temperature=2.0, top_p=0.8, repetition_penalty=1.5),
        ),
        (
            dict(use_generation_config=True, temperature=0.0),
            OWN,
            jaxkv.Greedy(repetition_penalty=1.5),
        ),
        (dict(use_generation_config=True), {}, jaxkv.Greedy()),
    ],
)
def test_sampler_of_the_command_line(tiny_lm, tmp_path, flags, config, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    lm = dataclasses.replace(tiny_lm, folder=tmp_path)
    sampling = Sampling(**flags)
    sampling.sampler.check()
    assert sampling.sampler_of(lm) == expected


def test_sampler_of_the_command_line_refuses(jaxkv_, copy):
    path = copy / "generation_config.json"
    ask = ["generate", copy, "--prompt", "a", "--use-generation-config"]
    path.write_text("{}")
    said = jaxkv_.error(*ask, "--top-k", "3")
    assert "--top-k does nothing at temperature 0" in said
    path.write_text('{"top_p": 2}')
    said = jaxkv_.error(*ask)  # of a file, whose keys are not flags
    assert f"{path}: top_p must be a number above 0" in said
    path.unlink()
    assert "has no generation_config.json" in jaxkv_.error(*ask)


def test_a_tokenizer_with_more_tokens_than_the_network(copy):
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["added_tokens_decoder"] = {"4096": {"content": "<more>", "special": True}}
    path.write_text(json.dumps(config))
    lm = jaxkv.load(copy)
    (ids,) = encode(lm, ["the cat"])
    assert max(ids) < lm.config.vocab_size
    for prompt in ("the <more> cat", [5, 4096], np.array([5, 4096])):
        with pytest.raises(ValueError, match=r"such as 4096, which is '<more>': the"):
            encode(lm, [prompt])
    for prompt in ([5, 4097], [-5], np.array([2**40])):
        with pytest.raises(ValueError, match=rf"\), such as {prompt[-1]}\.$"):
            encode(lm, [prompt])


def test_bos_stands_once_in_prompts_and_chats(tiny_lm):
    bos = tiny_lm.tokenizer.bos_token
    once = encode(tiny_lm, ["the cat"])
    assert once[0][0] == tiny_lm.tokenizer.bos_token_id
    assert encode(tiny_lm, [f"{bos}the cat"]) == once
    chat = encode_chat(tiny_lm, [{"role": "user", "content": "the cat"}])
    assert chat.count(tiny_lm.tokenizer.bos_token_id) == 1
    text = tiny_lm.tokenizer.decode(chat)
    assert text.startswith(bos)
    assert encode(tiny_lm, [text]) == [chat]
