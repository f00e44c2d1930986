"""What is promised of outputs with drafts: the bits, the choices, or neither."""

import dataclasses
import types

import jax
import pytest

from jaxkv import Full, LongFlow, Options, StreamingLLM
from jaxkv.kernels import dispatch
from jaxkv.models.config import Config, Experts
from jaxkv.speculation.drafters import PromptLookup, Tree
from jaxkv.speculation.guarantee import guarantee
from jaxkv.speculation.rules import TopK

CONFIG = Config(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
)
CHAIN = Options(speculate=PromptLookup(num_draft_tokens=10))
NO_SIZES = types.SimpleNamespace(num_heads=9, num_kv_heads=3, head_dim=64)


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


EXPERTS = Experts(count=4, per_token=2, size=512)


def with_(options=CHAIN, **changes):
    return dataclasses.replace(options, **changes)


@pytest.mark.parametrize(
    ("options", "rows", "dtype", "config", "promised"),
    [
        (CHAIN, 1, "bfloat16", CONFIG, "bit-exact"),
        (CHAIN, 5, "float16", CONFIG, "bit-exact"),
        (CHAIN, 6, "bfloat16", CONFIG, "exact in float32"),  # 66 tokens a step
        (CHAIN, 1, "float32", CONFIG, "exact in float32"),
        (
            with_(speculate=Tree(num_draft_tokens=63)),
            1,
            "bfloat16",
            CONFIG,
            "bit-exact",
        ),
        (
            with_(speculate=Tree(num_draft_tokens=63)),
            2,
            "bfloat16",
            CONFIG,
            "exact in float32",
        ),
        (with_(decode=StreamingLLM()), 1, "bfloat16", CONFIG, "bit-exact"),
        (with_(decode=LongFlow()), 1, "bfloat16", CONFIG, "exact in float32"),
        (with_(decode=Full(), accept=TopK()), 1, "bfloat16", CONFIG, "lossy"),
        (with_(decode_implementation="xla"), 1, "bfloat16", CONFIG, "exact in float32"),
        *(
            (CHAIN, 1, "bfloat16", dataclasses.replace(CONFIG, **size), promised)
            for size, promised in [
                (dict(vocab_size=50_264), "bit-exact"),
                (dict(vocab_size=50_257), "exact in float32"),
                (dict(hidden_size=600), "exact in float32"),
                (dict(intermediate_size=1500), "exact in float32"),
                (dict(head_dim=80), "exact in float32"),
                (dict(experts=EXPERTS), "exact in float32"),
            ]
        ),
        (CHAIN, 1, "bfloat16", NO_SIZES, "exact in float32"),
    ],
)
def test_what_is_promised_on_a_gpu(options, rows, dtype, config, promised, on_a_gpu):
    assert guarantee(config, options, rows=rows, dtype=dtype) == promised


def test_over_several_devices_no_bits_are_promised(on_a_gpu):
    found = guarantee(CONFIG, CHAIN, rows=1, dtype="bfloat16", devices=2)
    assert found == "exact in float32"


def test_without_a_gpu_no_bits_are_promised():
    found = guarantee(CONFIG, CHAIN, rows=1, dtype="bfloat16")
    assert found == "exact in float32"
