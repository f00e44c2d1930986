"""What a GGUF file may say, and what is refused by the name of its key or tensor."""

import sys

import gguf_files
import numpy as np
import pytest
from gguf_files import TOKENIZER, load, write_changed
from hf_checkpoints import raises

import jaxkv
from jaxkv.models.gguf.config import read_config, stop_ids
from jaxkv.models.gguf.header import read_header

FIRST, LAST = "token_embd.weight", "blk.1.ffn_down.weight"


def setting(*pairs):
    def change(keys, tensors):
        keys.update(zip(pairs[::2], pairs[1::2], strict=True))

    return change


def without(*names):
    def change(keys, tensors):
        for name in names:
            (keys if name in keys else tensors).pop(name)

    return change


def renamed(old, new):
    def change(keys, tensors):
        tensors[new] = tensors.pop(old)

    return change


def reshaped(name, *shape):
    def change(keys, tensors):
        tensors[name] = np.ones(shape, np.float32)

    return change


TOKENS = TOKENIZER["tokenizer.ggml.tokens"]
REFUSED = {  # by name: what is changed, and what the message says
    "alignment 3": (setting("general.alignment", 3), ["general.alignment", "found 3"]),
    "alignment 0": (setting("general.alignment", 0), ["general.alignment", "found 0"]),
    "alignment text": (setting("general.alignment", "32"), ["alignment", "'32'"]),
    "alignment 64": (setting("general.alignment", 64), ["lies at offset", "64"]),
    "alignment 8": (
        setting("general.alignment", 8),
        ["goes on after its last", "alignment=8"],
    ),
    "type": (setting("general.type", "adapter"), ["general.type='adapter'"]),
    "split": (setting("split.count", 3), ["split.count=3", "llama-gguf-split --merge"]),
    "no embedding": (without(FIRST), [f"tensor {FIRST} is missing"]),
    "no matrix": (without(LAST), ["do not fit", f"missing {LAST},"]),
    "no norm": (without("output_norm.weight"), ["missing output_norm.weight"]),
    "no bias": (reshaped("blk.0.attn_q.bias", 8), ["missing blk.0.attn_k.bias"]),
    "a bias of the MLP": (reshaped("blk.0.ffn_up.bias", 12), ["superfluous blk.0.ffn"]),
    "experts": (reshaped("blk.0.ffn_gate_exps.weight", 2, 2, 2), ["superfluous blk.0"]),
    "other name": (renamed(LAST, "blk.1.x.weight"), [f"missing {LAST}", "blk.1.x"]),
    "turned": (reshaped(LAST, 12, 8), [LAST, "shape (8, 12)", "found (12, 8)"]),
    "a vector": (reshaped(LAST, 96), [LAST, "shape (8, 12)", "found (96,)"]),
    "vocabulary": (setting("llama.vocab_size", 21), [FIRST, "(21, 8)", "(20, 8)"]),
    "factors": (reshaped("rope_freqs.weight", 2), ["rope_freqs.weight", "(1,)"]),
    "layers": (setting("llama.block_count", 3), ["missing blk.2.attn_k.weight"]),
    "most layers": (setting("llama.block_count", 10**5), ["block_count", "most 10000"]),
    "width": (setting("llama.embedding_length", 0), ["embedding_length", "found 0"]),
    "no width": (without("llama.embedding_length"), ["embedding_length", "None"]),
    "no layers": (without("llama.block_count"), ["llama.block_count must be"]),
    "no heads": (without("llama.attention.head_count"), ["attention.head_count must"]),
    "no length": (without("llama.context_length"), ["llama.context_length must be"]),
    "no epsilon": (
        without("llama.attention.layer_norm_rms_epsilon"),
        ["layer_norm_rms_epsilon must be a positive number, found None"],
    ),
    "heads by layer": (setting("llama.attention.head_count", [4, 4]), ["head_count"]),
    "heads": (setting("llama.attention.head_count", 3), ["head_count=3", "multiple"]),
    "value length": (setting("llama.attention.value_length", 4), ["value_length=4"]),
    "partial rotary": (setting("llama.rope.dimension_count", 1), ["dimension_count=1"]),
    "odd": (
        lambda keys, tensors: keys.update(
            {
                f"llama.{key}": 3
                for key in (
                    "attention.key_length",
                    "attention.value_length",
                    "rope.dimension_count",
                )
            }
        ),
        ["head_dim=3 must be even"],
    ),
    "base": (setting("llama.rope.freq_base", -1.0), ["rope.freq_base must be"]),
    "scaling": (setting("llama.rope.scaling.type", "x"), ["scaling.type='x' is not"]),
    "window": (
        setting("llama.attention.sliding_window", 64),
        ["llama.attention.sliding_window=64 is not supported"],
    ),
    "expert count": (
        setting("llama.expert_count", 8),
        ["llama.expert_used_count must be a positive integer"],
    ),
    "experts used": (
        setting("llama.expert_count", 2, "llama.expert_used_count", 3),
        ["llama.expert_used_count=3 is not supported; supported: 'up to 2'"],
    ),
    "experts missing": (
        setting("llama.expert_count", 2, "llama.expert_used_count", 1),
        ["missing blk.0.ffn_down_exps.weight"],
    ),
    "expert scale": (
        setting("llama.expert_weights_scale", 2.0),
        ["llama.expert_weights_scale=2.0 is not known"],
    ),
    "capped logits": (
        setting("llama.final_logit_softcapping", 30.0),
        ["llama.final_logit_softcapping=30.0"],
    ),
    "capped attention": (
        setting("llama.attn_logit_softcapping", 50.0),
        ["llama.attn_logit_softcapping=50.0"],
    ),
    "scaled logits": (setting("llama.logit_scale", 0.5), ["llama.logit_scale=0.5"]),
    "scaled attention": (
        setting("llama.attention.scale", 0.5),
        ["llama.attention.scale=0.5 is not known to jaxkv"],
    ),
    "both ways": (setting("llama.attention.causal", False), ["causal=False"]),
    "unknown": (setting("llama.new_thing", "x"), ["llama.new_thing='x' is not known"]),
    "a long unknown": (setting("llama.x", "y" * 999), ["llama.x='yyy", "not known"]),
    "tokenizer": (setting("tokenizer.ggml.model", "bert"), ["ggml.model='bert'"]),
    "no model": (without("tokenizer.ggml.model"), ["key tokenizer.ggml.model is miss"]),
    "pattern": (setting("tokenizer.ggml.pre", "new"), ["ggml.pre='new'", "'smollm'"]),
    "no tokens": (without("tokenizer.ggml.tokens"), ["key tokenizer.ggml.tokens is"]),
    "no merges": (without("tokenizer.ggml.merges"), ["key tokenizer.ggml.merges is"]),
    "no types": (without("tokenizer.ggml.token_type"), ["key tokenizer.ggml.token_ty"]),
    "few types": (
        setting("tokenizer.ggml.token_type", [1]),
        ["token_type", "20 token"],
    ),
    "texts": (
        setting("tokenizer.ggml.tokens", [1, 2]),
        ["tokens must be an array of s"],
    ),
    "no array": (setting("tokenizer.ggml.merges", "a b"), ["merges must be an array"]),
    "twice": (
        setting("tokenizer.ggml.tokens", [*TOKENS[:-1], "a"]),
        ["tokenizer.ggml.tokens has 'a' twice"],
    ),
    "merges": (setting("tokenizer.ggml.merges", ["a z"]), ["merges does not fit"]),
    "a merge": (
        setting("tokenizer.ggml.merges", ["ab"]),
        ["merges has 'ab'; expected two"],
    ),
    "end": (setting("tokenizer.ggml.eos_token_id", 20), ["eos_token_id", "below 20"]),
    "turn": (setting("tokenizer.ggml.eot_token_id", -1), ["eot_token_id", "found -1"]),
    "begin": (setting("tokenizer.ggml.bos_token_id", "a"), ["bos_token_id", "'a'"]),
    "flag": (setting("tokenizer.ggml.add_bos_token", 1), ["add_bos_token", "bool"]),
    "template": (
        setting("tokenizer.chat_template", 7),
        ["tokenizer.chat_template must"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    change, words = REFUSED[case]
    path = write_changed(tmp_path / "x.gguf", change)
    with raises(path, *words) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 + len(str(path))


@pytest.mark.parametrize(
    "factor", [0.0, -1.0, float("inf"), float("nan")], ids=lambda x: str(x)
)
def test_rotary_factors_are_positive(tmp_path, factor):
    def change(keys, tensors):
        tensors["rope_freqs.weight"] = np.full(1, factor, np.float32)

    with raises("tensor rope_freqs.weight must hold positive numbers", factor):
        load(write_changed(tmp_path / "x.gguf", change))


@pytest.mark.parametrize(
    ("arch", "name"),
    [("qwen2", "blk.1.attn_v.bias"), ("qwen3", "blk.0.attn_k_norm.weight")],
)
def test_tensors_that_an_architecture_needs(tmp_path, arch, name):
    path = write_changed(tmp_path / "x.gguf", arch=arch)
    load(path)
    with raises(path, f"missing {name}"):
        load(write_changed(path, without(name), arch=arch))


def test_an_unknown_architecture(tmp_path):
    path = tmp_path / "x.gguf"
    _, keys, tensors = gguf_files.tiny()
    gguf_files.write(path, keys, tensors, arch="mamba")
    with raises(path, "general.architecture='mamba'", "'llama', 'qwen2', 'qwen3'"):
        load(path)


HARMLESS = {
    "general.name": "x",
    "general.file_type": 3,
    "general.quantization_version": 2,
    "general.tags": ["a", "b"],
    "quantize.imatrix.entries_count": 7,
    "split.count": 1,
    "llama.rope.scaling.type": "linear",
    "llama.rope.scaling.factor": 1.0,
    "llama.attention.sliding_window": 4096,
    "llama.attention.causal": True,
    "llama.expert_count": 0,
    "llama.final_logit_softcapping": 0.0,
    "tokenizer.ggml.fim_pre_token_id": 3,
    "qwen2.new_thing": 1,
}


@pytest.mark.parametrize("key", HARMLESS)
def test_harmless_keys(tmp_path, key):
    load(write_changed(tmp_path / "x.gguf", setting(key, HARMLESS[key])))


OPTIONAL = (
    "llama.vocab_size",
    "llama.rope.dimension_count",
    "llama.attention.value_length",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.eos_token_id",
    "tokenizer.chat_template",
)


@pytest.mark.parametrize("key", OPTIONAL)
def test_keys_that_may_be_missing(tmp_path, key):
    load(write_changed(tmp_path / "x.gguf", without(key)))


def test_what_missing_keys_mean(tmp_path):
    keys = ["head_count_kv", "key_length", "value_length"]
    keys = [f"llama.attention.{key}" for key in keys]

    def change(own, tensors):
        without(*keys, "llama.rope.freq_base", "output.weight")(own, tensors)
        own["llama.rope.dimension_count"] = 2

    def uneven(own, tensors):
        without(*keys)(own, tensors)
        own["llama.attention.head_count"] = 3

    config = read_config(read_header(write_changed(tmp_path / "x.gguf", change)))
    assert (config.num_kv_heads, config.head_dim, config.tied) == (4, 2, True)
    assert config.rope.theta == 10_000
    with raises("embedding_length=8 must be a multiple of", "head_count=3"):
        path = write_changed(tmp_path / "y.gguf", uneven)
        read_config(read_header(path))


def test_scales_of_granite_are_needed(tmp_path):
    scales = dict(embedding_scale=12.0, query_scale=0.5, residual_scale=0.25)
    _, keys, tensors = gguf_files.tiny("granite", **scales, logit_scale=0.5)
    assert keys.pop("granite.logit_scale") == 2.0
    path = gguf_files.write(tmp_path / "x.gguf", keys, tensors, arch="granite")
    with raises("granite.logit_scale must be a positive number, found None"):
        load(path)


def test_stop_ids(tmp_path):
    def change(keys, tensors):
        keys["tokenizer.ggml.eot_token_id"] = 1
        keys["tokenizer.ggml.eom_token_id"] = 0

    assert stop_ids(read_header(write_changed(tmp_path / "x.gguf", change)), 20) == (
        0,
        1,
    )


def test_without_the_package(tmp_path, monkeypatch):
    path = write_changed(tmp_path / "x.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with raises(path, "install gguf; pip install 'jaxkv[gguf]'"):
        jaxkv.load(path)
