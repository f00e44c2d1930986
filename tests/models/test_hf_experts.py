"""Reading what `config.json` says of experts."""

import dataclasses
import json

import pytest
from hf_checkpoints import raises

from jaxkv.kernels.experts import Gate
from jaxkv.models.config import Experts
from jaxkv.models.hf.config import read_config

SIZES = dict(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
MIXTRAL = dict(
    model_type="mixtral",
    architectures=["MixtralForCausalLM"],
    num_local_experts=4,
    num_experts_per_tok=2,
)
QWEN3_MOE = dict(
    model_type="qwen3_moe",
    architectures=["Qwen3MoeForCausalLM"],
    num_experts=6,
    num_experts_per_tok=3,
    moe_intermediate_size=5,
)
GPT_OSS = dict(
    model_type="gpt_oss",
    architectures=["GptOssForCausalLM"],
    num_local_experts=4,
    num_experts_per_tok=2,
    experts_per_token=2,
    initial_context_length=4096,
    head_dim=8,
    max_position_embeddings=131_072,
)


def write_config(folder, **changes):
    """Write `config.json`; a key changed to `...` is left out."""
    raw = {k: v for k, v in (SIZES | changes).items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (MIXTRAL, dict(count=4, per_token=2, size=12)),
        (MIXTRAL | dict(num_local_experts=...), dict(count=8, per_token=2, size=12)),
        (MIXTRAL | dict(router_jitter_noise=0.1, router_aux_loss_coef=1.0), dict()),
        (QWEN3_MOE, dict(count=6, per_token=3, size=5, normalize=False)),
        (QWEN3_MOE | dict(norm_topk_prob=True), dict(normalize=True)),
        (QWEN3_MOE | dict(num_experts=..., num_local_experts=7), dict(count=7)),
        (QWEN3_MOE | dict(num_local_experts=6, use_sliding_window=False), dict()),
        (QWEN3_MOE | dict(mlp_only_layers=[1, 9]), dict(dense_layers=(1,))),
        (QWEN3_MOE | dict(decoder_sparse_step=2), dict(dense_layers=(0,))),
        (
            QWEN3_MOE | dict(decoder_sparse_step=2, mlp_only_layers=[1]),
            dict(dense_layers=(0, 1)),
        ),
        (
            GPT_OSS,
            dict(
                **dict(count=4, per_token=2, size=12, normalize=True, bias=True),
                gate=Gate(alpha=1.702, limit=7.0, shift=1.0),
            ),
        ),
        (
            GPT_OSS | dict(swiglu_limit=5, swiglu_alpha=2.0, experts_per_token=...),
            dict(gate=Gate(alpha=2.0, limit=5.0, shift=1.0)),
        ),
    ],
)
def test_experts(tmp_path, changes, expected):
    found = read_config(write_config(tmp_path, **changes)).experts
    assert isinstance(found, Experts)
    assert found == dataclasses.replace(found, **expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (MIXTRAL | dict(num_local_experts=0), ["num_local_experts must be a positive"]),
        (MIXTRAL | dict(num_experts_per_tok=5), ["num_experts_per_tok=5", "=4"]),
        (
            MIXTRAL | dict(num_experts=6),
            ["num_experts=6 is not", "num_local_experts=4"],
        ),
        (MIXTRAL | dict(norm_topk_prob=True), ["norm_topk_prob=True is not known"]),
        (QWEN3_MOE | dict(norm_topk_prob=1), ["norm_topk_prob=1", "True, False"]),
        (QWEN3_MOE | dict(mlp_only_layers=3), ["mlp_only_layers=3", "a list"]),
        (QWEN3_MOE | dict(mlp_only_layers=["0"]), ["mlp_only_layers=['0']"]),
        (QWEN3_MOE | dict(moe_intermediate_size=0), ["moe_intermediate_size must"]),
        (QWEN3_MOE | dict(shared_expert_size=1), ["shared_expert_size=1 is not known"]),
        (
            QWEN3_MOE | dict(use_sliding_window=True, sliding_window=16),
            ["use_sliding_window=True"],
        ),
        (
            dict(model_type="qwen3", num_experts_per_tok=2),
            ["num_experts_per_tok=2 is not known"],
        ),
    ],
)
def test_experts_refused(tmp_path, changes, words):
    with raises("config.json: ", *words):
        read_config(write_config(tmp_path, **changes))


def test_the_rest_of_gpt_oss(tmp_path):
    """Biases, sinks and every other layer's window, where no key says so."""
    found = read_config(write_config(tmp_path, **GPT_OSS, sliding_window=9))
    assert found.sinks and found.qkv_bias and found.output_bias
    assert found.family == "gpt-oss"
    assert found.windows == (9, None)
