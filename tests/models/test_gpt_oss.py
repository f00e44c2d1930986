"""gpt-oss: what its keys mean, and a folder of packed experts."""

import json

import jax
import numpy as np
import pytest
from hf_checkpoints import MODEL, raises, write_config
from safetensors.numpy import load_file, save_file

from jaxkv.models.hf.config import read_config
from jaxkv.models.hf.weights import read_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GPT_OSS = dict(model_type="gpt_oss", architectures=..., intermediate_size=32)
SIZES = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=2,
    num_experts_per_tok=1,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def test_what_absent_keys_mean(tmp_path):
    config = read_config(write_config(tmp_path, **GPT_OSS, sliding_window=16))
    assert config.windows == (16, None) and config.sinks
    assert config.qkv_bias and config.output_bias and not config.tied
    assert config.experts.bias and config.experts.per_token == 4
    scaling = config.rope.scaling
    assert (scaling.factor, scaling.truncate) == (32.0, False)
    assert {kind.rope for kind in config.layer_kinds} == {config.rope}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(experts_per_token=3, num_experts_per_tok=4), ["num_experts_per_tok=4"]),
        (dict(swiglu_limit=0), ["swiglu_limit must be a positive number"]),
        # JSON holds integers that no float does, and floats that float32 has not
        (dict(swiglu_limit=10**400), ["swiglu_limit must be a positive number"]),
        (dict(swiglu_limit=1e-320), ["swiglu_limit must be", "float32 holds 1.2e-38"]),
        (dict(layer_types=["full_attention"]), ["layer_types=", "one for each of 2"]),
        (dict(sink_bias=1.0), ["sink_bias=1.0 is not known"]),
    ],
)
def test_gpt_oss_refuses(tmp_path, changes, words):
    with raises("config.json: ", *words):
        read_config(write_config(tmp_path, **GPT_OSS | changes))


def test_packed_experts_are_read_as_transformers_unpacks_them(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / MODEL)
    rng, packed = np.random.default_rng(0), dict(tensors)
    for name in [name for name in tensors if name.endswith(("up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors[name].shape
        shape = (experts, outputs, inputs // 32)
        blocks = rng.integers(0, 256, (*shape, 16), np.uint8)
        scales = rng.integers(110, 130, shape, np.uint8)
        del packed[name]
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = convert_moe_packed_tensors(
            *map(torch.from_numpy, (blocks, scales)), dtype=torch.float32
        ).numpy()
    save_file(tensors, tmp_path / MODEL)
    config = read_config(tmp_path)
    plain = read_weights(tmp_path, config, dtype="float32")
    save_file(packed, tmp_path / MODEL)
    raw = json.loads((tmp_path / "config.json").read_text())
    scheme = dict(quant_method="mxfp4", modules_to_not_convert=["lm_head"])
    raw["quantization_config"] = scheme
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path) == config
    found = read_weights(tmp_path, config, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, found, plain)
