"""What tells the layers of a configuration apart, and what of it is refused."""

import pytest
from hf_checkpoints import raises, write_config

from jaxkv.models.hf.config import read_config

QWEN2 = dict(
    model_type="qwen2",
    architectures=...,
    use_sliding_window=True,
    sliding_window=16,
    max_window_layers=2,
)
LAYERS = ["full_attention", "sliding_attention"]
MISTRAL = dict(model_type="mistral", architectures=...)


@pytest.mark.parametrize(
    "changes",
    [
        QWEN2,  # no layer lies above the last one
        QWEN2 | dict(max_window_layers=...),
        QWEN2 | dict(layer_types=["full_attention"] * 2, max_window_layers=0),
        QWEN2 | dict(sliding_window=None, max_window_layers=0),
        QWEN2 | dict(sliding_window=64.0, max_window_layers=0),
        QWEN2 | dict(layer_types=["sliding_attention"] * 2, sliding_window=64),
        QWEN2 | dict(use_sliding_window=False, max_window_layers=0),
    ],
)
def test_windows_that_never_act(tmp_path, changes):
    plain = write_config(tmp_path, model_type="qwen2", architectures=...)
    plain = read_config(plain)
    assert read_config(write_config(tmp_path, **changes)) == plain


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        (MISTRAL | dict(sliding_window=16), (16, 16)),
        (MISTRAL | dict(sliding_window=16, layer_types=LAYERS), (16, 16)),
        (MISTRAL | dict(max_position_embeddings=...), (4096, 4096)),
        (QWEN2 | dict(max_window_layers=1), (None, 16)),
        (QWEN2 | dict(max_window_layers=0), (16, 16)),
        (QWEN2 | dict(layer_types=LAYERS[::-1]), (16, None)),
        (QWEN2 | dict(model_type="qwen3", layer_types=LAYERS), (None, 16)),
    ],
)
def test_windows_of_layers(tmp_path, changes, windows):
    config = read_config(write_config(tmp_path, **changes))
    assert config.windows == windows
    assert {kind.rope for kind in config.layer_kinds} == {config.rope}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (QWEN2 | dict(max_window_layers=-1), ["max_window_layers=-1", "of layers"]),
        (
            QWEN2 | dict(layer_types=["sliding_attention"]),
            ["layer_types=['sliding_attention']", "one for each of 2 layers"],
        ),
        (
            QWEN2 | dict(layer_types=LAYERS, use_sliding_window=False),
            ["layer_types=['full_attention', 'sliding", "without use_sliding_window"],
        ),
        (dict(layer_types=["linear_attention"]), ["layer_types=", "full_attention"]),
        (
            dict(layer_types=LAYERS, sliding_window=16),
            ["layer_types=", "'full_att"],
        ),
        (dict(layer_types=1), ["layer_types=1", "full_attention"]),
    ],
)
def test_layers_refuse(tmp_path, changes, words):
    with raises("config.json: ", *words):
        read_config(write_config(tmp_path, **changes))
