"""What GGUF files of Gemma mean without a key, and what of them is refused."""

import dataclasses

import gguf_files
import pytest
from hf_checkpoints import raises

from jaxkv.models.config import LayerKind
from jaxkv.models.gguf import gemma as gguf_gemma
from jaxkv.models.gguf.config import read_config
from jaxkv.models.gguf.header import read_header
from jaxkv.models.gguf.keys import Keys
from jaxkv.models.hf import gemma as hf_gemma
from jaxkv.models.rope import Rope


def write(path, arch, **changes):
    """Write a tiny file; a key changed to None is left out."""
    switches = dict(hf_gemma.SWITCHES, qk_norm=arch == "gemma3", tied=True)
    kinds = (LayerKind(window=16), LayerKind())
    config, keys, _ = gguf_files.tiny(arch)
    config = dataclasses.replace(config, **switches, kinds=kinds, max_positions=64)
    keys = gguf_files.metadata(config, arch) | {
        f"{arch}.{key.replace('__', '.')}": value for key, value in changes.items()
    }
    keys = {key: value for key, value in keys.items() if value is not None}
    tensors = gguf_files.hf_tensors(config)
    tensors = gguf_files.gguf_tensors(tensors, config, arch)
    return read_header(gguf_files.write(path / "x.gguf", keys, tensors, arch=arch))


def test_what_absent_keys_mean(tmp_path):
    second = read_config(write(tmp_path, "gemma2", attention__sliding_window=None))
    assert (second.attention_cap, second.logit_cap) == (50.0, 30.0)
    assert second.windows == (None, None)  # 4096 are more than a sequence has
    assert second.query_scale == second.head_dim**-0.5
    third = write(tmp_path, "gemma3", rope__freq_base=1e6, rope__freq_base_swa=None)
    third = read_config(third)
    assert [kind.rope.theta for kind in third.layer_kinds] == [1e4, 1e4]
    assert (third.attention_cap, third.logit_cap) == (None, None)
    assert third.windows == (16, 16) and third.rope == Rope(theta=1e6)


def test_the_largest_scales_queries_in_its_own_way():
    sizes = dict(hidden_size=5376, num_heads=32, head_dim=128)
    keys = Keys("gemma3.", {})
    for layers, share in ((62, 168), (48, 128)):
        found = gguf_gemma.switches(gguf_gemma.GEMMA3, keys, **sizes, layers=layers)
        assert found["query_scale"] == share**-0.5


@pytest.mark.parametrize(
    ("arch", "changes", "words"),
    [
        ("gemma3", dict(attention__sliding_window=None), ["attention.sliding_window"]),
        ("gemma3", dict(attn_logit_softcapping=50.0), ["attn_logit_softcapping=50.0"]),
        ("gemma2", dict(rope__freq_base_swa=7.0), ["gemma2.rope.freq_base_swa=7.0"]),
        ("gemma2", dict(final_logit_softcapping=-1.0), ["must be a positive number"]),
        ("gemma2", dict(altup__num_inputs=4), ["altup.num_inputs=4 is not known"]),
    ],
)
def test_gemma_refuses(tmp_path, arch, changes, words):
    header = write(tmp_path, arch, **changes)
    with raises(header.path, *words):
        read_config(header)
