"""Reading `config.json`."""

import dataclasses

import pytest
import transformers
from hf_checkpoints import LLAMA, raises, write_config
from hypothesis import given
from hypothesis import strategies as st

from jaxkv.models.checkpoint import CheckpointError
from jaxkv.models.config import Config, LayerKind
from jaxkv.models.hf.config import read_config
from jaxkv.models.rope import Rope

SMOLLM3 = (LayerKind(rope=Rope(theta=2e6)), LayerKind(rope=None))
GLM = dict(
    head_dim=128, qkv_bias=True, rope=Rope(rotary_dim=64), rms_norm_eps=1.5625e-7
)
SCALES = ("embedding_scale", "query_scale", "residual_scale", "logit_scale")
GRANITE = dict.fromkeys(SCALES, 1.0)
OLMO2 = dict(qk_norm=True, qk_norm_per_head=False, pre_norm=False, post_norm=True)


def test_config_of_llama(tmp_path):
    assert read_config(write_config(tmp_path)) == Config(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=2,
        max_positions=64,
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(num_key_value_heads=...), dict(num_kv_heads=4)),
        (dict(num_key_value_heads=None), dict(num_kv_heads=4)),
        (dict(head_dim=6), dict(head_dim=6)),
        (dict(head_dim=None), dict(head_dim=2)),
        (dict(attention_bias=True), dict(qkv_bias=True, output_bias=True)),
        (dict(tie_word_embeddings=True), dict(tied=True)),
        (dict(rms_norm_eps=1e-5), dict(rms_norm_eps=1e-5)),
        (dict(max_position_embeddings=...), dict(max_positions=2048)),
        (dict(rope_theta=5e5), dict(rope=Rope(theta=5e5))),
        (dict(rope_theta=500000, rope_scaling=None), dict(rope=Rope(theta=5e5))),
        (
            dict(rope_parameters=dict(rope_theta=7, rope_type="default")),
            dict(rope=Rope(theta=7)),
        ),
        # transformers prefers the theta inside of the object
        (
            dict(rope_theta=5, rope_parameters=dict(rope_theta=7)),
            dict(rope=Rope(theta=7)),
        ),
        (dict(model_type=...), {}),
        (dict(architectures=...), {}),
        (dict(quantization_config=None, mlp_bias=False, hidden_act="silu"), {}),
        (dict(partial_rotary_factor=1.0, rope_scaling={"type": "default"}), {}),
        # integers as some tools write them
        (dict(hidden_size=8.0, vocab_size=2e1, head_dim=2.0), {}),
        (dict(max_position_embeddings=1e6), dict(max_positions=1_000_000)),
        # another name, and scalings that change nothing
        (dict(hidden_act="swish", quantization_config={}), {}),
        (dict(rope_scaling={"type": "linear", "factor": 1.0}), {}),
        (dict(rope_scaling={"rope_type": "default", "factor": 1}), {}),
        (dict(rope_scaling={"type": None, "factor": None}), {}),
        (dict(rope_scaling={"type": "dynamic", "factor": 4.0}), {}),
        (
            dict(
                rope_parameters={
                    **dict(rope_type="yarn", factor=1.0, rope_theta=7, beta_fast=32),
                    **dict(original_max_position_embeddings=64, attention_factor=1.0),
                }
            ),
            dict(rope=Rope(theta=7)),
        ),
        (
            dict(rope_scaling={"type": "default"}, original_max_position_embeddings=32),
            {},
        ),
        # windows that no sequence fills, and switches without a window
        (dict(use_sliding_window=True), {}),
        (dict(use_sliding_window=True, sliding_window=64), {}),
        (
            dict(layer_types=["sliding_attention"] * 2, sliding_window=64),
            {},
        ),
        # Llama ignores these in transformers, too
        (dict(sliding_window=16), {}),
        # transformers' default, nothing, and keys that no number depends on
        (dict(chunk_size_feed_forward=0, no_such_key=None), {}),
        (dict(attention_dropout=0.1, pretraining_tp=1, is_llama_config=True), {}),
        (dict(rope_interleaved=False, use_mrope=False, max_window_layers=1), {}),
    ],
)
def test_config_keys(tmp_path, changes, expected):
    plain = read_config(write_config(tmp_path))
    found = read_config(write_config(tmp_path, **changes))
    assert found == dataclasses.replace(plain, **expected)


@pytest.mark.parametrize(
    ("model_type", "switches"),
    [
        ("mistral", dict()),
        ("qwen2", dict(qkv_bias=True)),
        ("qwen3", dict(qk_norm=True, head_dim=128)),
        ("olmo2", OLMO2 | dict(rms_norm_eps=1e-5)),
        ("phi3", dict(rms_norm_eps=1e-5)),
        ("smollm3", dict(kinds=SMOLLM3, rope=SMOLLM3[0].rope, tied=True)),
        ("seed_oss", dict(head_dim=128, qkv_bias=True)),
        ("granite", GRANITE),
        ("helium", dict(head_dim=128, rope=Rope(theta=1e5), rms_norm_eps=1e-8)),
        ("glm", GLM),
        ("glm4", dict(GLM, post_norm=True)),
    ],
)
def test_config_of_other_families(tmp_path, model_type, switches):
    plain = read_config(write_config(tmp_path))
    found = read_config(
        write_config(
            tmp_path,
            model_type=model_type,
            architectures=...,
            no_rope_layers=[1, 0] if model_type == "smollm3" else None,
            sliding_window=None if model_type in ("mistral", "phi3") else 16,
            use_sliding_window=False,
            layer_types=["full_attention"] * 2,
        )
    )
    assert found == dataclasses.replace(plain, **switches)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(model_type="gemma3"), ["model_type='gemma3'", "'llama'", "'qwen3'"]),
        (dict(model_type=3), ["model_type=3"]),
        (
            dict(model_type=..., architectures=["OlmoForCausalLM"]),
            ["architectures=['OlmoForCausalLM']", "Qwen2ForCausalLM"],
        ),
        (dict(model_type=..., architectures=...), ["architectures=None"]),
        (dict(architectures="Llama"), ["architectures='Llama'"]),
        (
            dict(architectures=["LlamaForSequenceClassification"]),
            ["architectures=", "LlamaForCausalLM"],
        ),
        (dict(hidden_act="gelu"), ["hidden_act='gelu'", "'silu'"]),
        (dict(mlp_bias=True), ["mlp_bias=True", "False"]),
        (
            dict(quantization_config={"bits": 4}),
            ["quantization_config.quant_method=None"],
        ),
        (dict(partial_rotary_factor=0.5), ["partial_rotary_factor=0.5"]),
        (
            dict(rope_parameters={"partial_rotary_factor": 0.5}),
            ["partial_rotary_factor=0.5"],
        ),
        (
            {"rope_parameters": {"rope_type": "default", "mscale": 2.0}},
            ["rope_parameters.mscale=2.0 is not supported"],
        ),
        (dict(no_such_key=0), ["no_such_key=0 is not known", "take the key out"]),
        (dict(use_mrope=True), ["use_mrope=True", "False"]),
        (dict(rope_interleaved=True), ["rope_interleaved=True", "False"]),
        (dict(chunk_size_feed_forward=4), ["chunk_size_feed_forward=4", "0"]),
        (dict(num_local_experts=8), ["num_local_experts=8"]),
        (dict(num_experts=8), ["num_experts=8"]),
        (dict(is_encoder_decoder=True), ["is_encoder_decoder=True"]),
        (
            dict(use_sliding_window=True, sliding_window=16),
            ["use_sliding_window=True", "False"],
        ),
        (dict(use_sliding_window="no"), ["use_sliding_window='no'", "False"]),
        (dict(vocab_size=...), ["vocab_size must be a positive integer, found None"]),
        (dict(hidden_size="8"), ["hidden_size must be", "'8'"]),
        (dict(num_hidden_layers=0), ["num_hidden_layers must be", "0"]),
        (dict(intermediate_size=True), ["intermediate_size must be", "True"]),
        (dict(num_attention_heads=4.5), ["num_attention_heads must be", "4.5"]),
        (dict(vocab_size=1e300), ["vocab_size must be", "1e+300"]),
        (dict(vocab_size=float("inf")), ["vocab_size must be", "inf"]),
        (dict(vocab_size=float("nan")), ["vocab_size must be", "nan"]),
        (dict(num_key_value_heads=3), ["num_attention_heads=4", "=3"]),
        (dict(head_dim=3), ["head_dim=3 must be even"]),
        (dict(rms_norm_eps=float("nan")), ["rms_norm_eps must be", "nan"]),
        (dict(rope_theta=float("inf")), ["rope_theta must be", "inf"]),
        (dict(tie_word_embeddings="yes"), ["tie_word_embeddings must be", "'yes'"]),
    ],
)
def test_config_refuses(tmp_path, changes, words):
    with raises("config.json: ", *words):
        read_config(write_config(tmp_path, **changes))


@pytest.mark.parametrize("model_type", ["glm", "glm4", "phi3"])
def test_a_share_of_each_head_beside_what_is_usual(tmp_path, model_type):
    """transformers, too, takes the key outside before the usual one inside."""
    given = dict(model_type=model_type, architectures=..., head_dim=32)
    own = transformers.CONFIG_MAPPING[model_type]
    for share in (0.25, 0.5, 1.0):
        config = read_config(
            write_config(tmp_path, **given, partial_rotary_factor=share)
        )
        known = own(partial_rotary_factor=share, pad_token_id=0).rope_parameters
        assert known["partial_rotary_factor"] == share
        assert (config.rope.rotary_dim or 32) == 32 * share


def test_scales_of_granite(tmp_path):
    def scales(**changes):
        granite = dict(model_type="granite", architectures=...)
        config = read_config(write_config(tmp_path, **granite | changes))
        return [getattr(config, name) for name in SCALES]

    given = dict(embedding_multiplier=12, attention_multiplier=0.5)
    assert scales(**given) == [12, 0.5, 1, 1]
    assert scales(residual_multiplier=0.2, logits_scaling=16) == [1, 1, 0.2, 1 / 16]
    with raises("logits_scaling must be a positive number, found 0"):
        scales(logits_scaling=0)


@pytest.mark.parametrize("key", ["embedding_multiplier", "logit_scale", "no_rope"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_no_family_takes_a_key_that_nobody_reads(tmp_path, model_type, key):
    """Granite's, Cohere's and SmolLM3's keys in the config of another family."""
    changes = dict(model_type=model_type, architectures=..., sliding_window=None)
    read_config(write_config(tmp_path, **changes))
    with raises(f"{key}=2.0 is not known"):
        read_config(write_config(tmp_path, **changes, **{key: 2.0}))


OPTIONAL = (
    "head_dim",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rms_norm_eps",
    "layer_types",
    "attention_bias",
    "quantization_config",
    "partial_rotary_factor",
)


@given(
    key=st.sampled_from([*LLAMA, *OPTIONAL]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2)
        ),
        max_leaves=4,
    ),
)
def test_any_value_gives_a_config_or_a_checkpoint_error(tmp_path_factory, key, value):
    folder = write_config(tmp_path_factory.getbasetemp(), **{key: value})
    try:
        config = read_config(folder)
    except CheckpointError as error:
        assert "config.json" in str(error)
    else:
        assert isinstance(config, Config)


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"{", "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"[]", "list")],
)
def test_damaged_json(tmp_path, content, word):
    (tmp_path / "config.json").write_bytes(content)
    with raises("config.json", word):
        read_config(tmp_path)


def test_missing_config(tmp_path):
    with raises("config.json cannot be read"):
        read_config(tmp_path)
