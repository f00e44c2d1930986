"""What Gemma's configurations say, and what of it is refused."""

import dataclasses

import pytest
from hf_checkpoints import raises, write_config

from jaxkv.models.hf.config import read_config
from jaxkv.models.rope import LinearScaling, Rope

GEMMA2 = dict(model_type="gemma2", architectures=..., sliding_window=16)
GEMMA3 = dict(model_type="gemma3_text", architectures=..., sliding_window=16)


def test_what_absent_keys_mean(tmp_path):
    config = read_config(write_config(tmp_path, **GEMMA2))
    assert config.tied and config.norm_offset and config.activation == "gelu_tanh"
    assert config.windows == (16, None)
    assert (config.attention_cap, config.logit_cap) == (50.0, 30.0)
    assert config.query_scale == 256**-0.5 and config.embedding_scale == 8**0.5
    capless = dict(attn_logit_softcapping=None, final_logit_softcapping=None)
    found = read_config(write_config(tmp_path, **GEMMA2, **capless))
    assert found == dataclasses.replace(config, attention_cap=None, logit_cap=None)


LOCAL, GLOBAL = Rope(theta=1e4), Rope(theta=1e6)
LAYERS = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, [(16, LOCAL)] * 2),
        (dict(sliding_window_pattern=2), [(16, LOCAL), (None, GLOBAL)]),
        (dict(layer_types=LAYERS), [(None, GLOBAL), (16, LOCAL)]),
        # A window that no sequence fills leaves the layer its rotation.
        (
            dict(layer_types=LAYERS, sliding_window=64),
            [(None, GLOBAL), (None, LOCAL)],
        ),
        (
            dict(
                layer_types=LAYERS,
                rope_theta=7.0,
                rope_local_base_freq=5.0,
                rope_scaling=dict(rope_type="linear", factor=8.0),
            ),
            [
                (None, Rope(theta=7, scaling=LinearScaling(factor=8.0))),
                (16, Rope(theta=5)),
            ],
        ),
    ],
)
def test_layers_of_gemma_3(tmp_path, changes, kinds):
    config = read_config(write_config(tmp_path, **GEMMA3 | changes))
    assert [(kind.window, kind.rope) for kind in config.layer_kinds] == kinds
    assert config.attention_cap is None and config.qk_norm


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(hidden_activation="relu"), ["hidden_activation='relu'", "gelu_pytorch"]),
        (dict(hidden_act="silu"), ["hidden_act='silu'", "gelu_pytorch_tanh"]),
        (dict(use_bidirectional_attention=True), ["use_bidirectional_attention=True"]),
        (dict(attn_logit_softcapping=50.0), ["attn_logit_softcapping=50.0", "None"]),
        (dict(final_logit_softcapping=-1), ["final_logit_softcapping must be a posit"]),
        (dict(query_pre_attn_scalar="no"), ["query_pre_attn_scalar must be a posit"]),
        (dict(sliding_window_pattern=0), ["sliding_window_pattern must be a positive"]),
        (dict(rope_scaling=[8]), ["rope_scaling=[8] is not supported"]),
        (dict(rope_parameters=dict(rope_type="default")), ["rope_parameters="]),
        (dict(altup_num_inputs=4), ["altup_num_inputs=4 is not known"]),
        (dict(model_type="gemma3"), ["model_type='gemma3'", "'gemma3_text'"]),
        (dict(rope_theta=0), ["rope_theta must be a positive number, found 0"]),
        (dict(rope_local_base_freq=[]), ["rope_local_base_freq must be a positive"]),
    ],
)
def test_gemma_refuses(tmp_path, changes, words):
    with raises("config.json: ", *words):
        read_config(write_config(tmp_path, **GEMMA3 | changes))
