"""Rotary scalings of GGUF files: keys, tensors, and what is refused."""

import gguf_files
import numpy as np
import pytest
from hf_checkpoints import raises

from jaxkv.models.gguf.config import read_config
from jaxkv.models.gguf.header import read_header
from jaxkv.models.rope import (
    FrequencyFactors,
    LinearScaling,
    LongRopeScaling,
    YarnScaling,
)

YARN = dict(type="yarn", factor=4.0, original_context_length=32)
LONG = dict(rope_factors_short=[1.0, 1.5], rope_factors_long=[2.0, 8.0])


def read(tmp_path, scaling=None, tensors=None, **keys):
    """Read the configuration of a file with keys of a scaling, and others."""
    _, own, weights = gguf_files.tiny(head_dim=4, max_positions=64)
    scaling = {f"scaling.{key}": value for key, value in (scaling or {}).items()}
    own |= {f"llama.rope.{key}": value for key, value in (scaling | keys).items()}
    for name, numbers in (tensors or {}).items():
        weights[f"{name}.weight"] = np.float32(numbers)
    path = gguf_files.write(tmp_path / "x.gguf", own, weights)
    return read_config(read_header(path))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (dict(scaling=dict(type="none")), None),
        (dict(scaling=dict(type="linear", factor=1.0, attn_factor=1.0)), None),
        (dict(scaling=dict(type="linear", factor=2.5)), LinearScaling(factor=2.5)),
        (dict(scaling=dict(factor=2.5)), LinearScaling(factor=2.5)),
        (dict(scale_linear=4.0), LinearScaling(factor=4.0)),
        (
            dict(tensors=dict(rope_freqs=[1.0, 3.0])),
            FrequencyFactors(factors=(1.0, 3.0)),
        ),
        (
            dict(
                scaling=dict(attn_factor=1.25, original_context_length=16),
                tensors=LONG,
            ),
            LongRopeScaling(
                short_factors=(1.0, 1.5),
                long_factors=(2.0, 8.0),
                original_max_positions=16,
                attention_factor=1.25,
            ),
        ),
    ],
)
def test_scalings(tmp_path, given, expected):
    config = read(tmp_path, **given)
    assert config.rope.scaling == expected
    assert config.max_positions == 64


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        (dict(yarn_ext_factor=1.0, yarn_attn_factor=1.138629), {}),
        (dict(yarn_beta_fast=8.0, yarn_beta_slow=2.0), dict(beta_fast=8, beta_slow=2)),
        (dict(attn_factor=0.5), dict(attention_factor=0.5 * 1.1386294)),
        (dict(factor=0.5), dict(factor=0.5, attention_factor=1.0)),
    ],
)
def test_yarn(tmp_path, changes, expected):
    config = read(tmp_path, YARN | changes)
    found = config.rope.scaling
    assert found == YarnScaling(
        **dict(factor=4.0, original_max_positions=32)
        | expected
        | dict(attention_factor=found.attention_factor)
    )
    factor = expected.get("attention_factor", 1.1386294)  # 1 + log 4 / 10
    assert found.attention_factor == pytest.approx(factor)
    assert config.max_positions == max(64, 32 * found.factor)


def test_yarn_without_an_original_context_stretches_the_files(tmp_path):
    config = read(tmp_path, dict(type="yarn", factor=4.0))
    assert config.rope.scaling.original_max_positions == 64
    assert config.max_positions == 256


REFUSED = [
    (
        dict(scaling=dict(type="none", factor=2.0)),
        "scaling.factor=2.0 is not supported",
    ),
    (dict(scaling=dict(type="longrope")), "scaling.type='longrope' is not supported"),
    (dict(scaling=dict(attn_factor=1.5)), "scaling.attn_factor=1.5 is not supported"),
    (dict(scaling=dict(type="yarn")), "scaling.factor must be a positive number"),
    (dict(scaling=YARN | dict(yarn_ext_factor=0.5)), "yarn_ext_factor=0.5 is not"),
    (dict(scaling=YARN | dict(yarn_log_multiplier=0.1)), "yarn_log_multiplier=0.1"),
    (dict(scaling=YARN | dict(yarn_attn_factor=1.0)), "yarn_attn_factor=1.0 is not"),
    (dict(scaling=YARN, freq_base=1.0), "rope.freq_base must be above 1 for YaRN"),
    (dict(scaling=YARN, tensors=dict(rope_freqs=[1, 1])), "rope_freqs.weight is not"),
    (
        dict(scaling=dict(type="linear", factor=2.0), tensors=LONG),
        "scaling.factor=2.0 is not supported",
    ),
    (dict(scale_linear=2.0, tensors=LONG), "scale_linear=2.0 is not supported"),
    (
        dict(scaling=dict(attn_factor=2.0), tensors=dict(rope_freqs=[1, 1])),
        "attn_factor=2.0 is not supported",
    ),
    (
        dict(tensors=dict(rope_factors_long=[1, 1])),
        "tensors rope_factors_long.weight must be rope_factors_long.weight and rope_f",
    ),
    (dict(tensors=LONG | dict(rope_factors_long=[1])), "must have shape (2,)"),
    (
        dict(tensors=LONG | dict(rope_factors_long=[1, -1])),
        "must hold positive numbers",
    ),
    (dict(dimension_count=2), "rope.dimension_count=2 is not supported; supported: 4"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_is_refused(tmp_path, given, message):
    with raises(tmp_path / "x.gguf", message):
        read(tmp_path, **given)
