"""What a cell of a notebook shows: short, and never a weight or an array's numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import jaxkv
from jaxkv import state as kv
from jaxkv.generation import Running
from jaxkv.laws.network import MIXED
from jaxkv.models.config import Experts
from jaxkv.shown import brief


def model(**changes):
    made = tiny.language_model(None)
    return dataclasses.replace(made, **changes)


COMPLETION = jaxkv.Completion(
    decoded=("one\ntwo " * 99,) * 99,
    tokens=((1, 2, 3) * 99,) * 99,
    lengths=(297,) * 99,
    finish_reason=("length",) * 99,
    stats=jaxkv.Stats(
        prompt_tokens=(4096,) * 99,
        cache_bytes=1 << 30,
        slots=4096,
        compile_seconds=1 / 3,
        prefill_seconds=2 / 3,
        decode_seconds=4 / 3,
        tokens_per_second=100 / 3,
        prefill_implementation="xla",
        decode_implementation="xla",
        drafts=jaxkv.DraftStats(
            steps=3,
            steps_with_draft=2,
            drafted=20,
            accepted=10,
            mal_with_bonus=1 / 3,
            mal_without_bonus=1 / 3,
            accepted_per_draft=1 / 3,
            drafted_by_depth=(2,) * 99,
            accepted_by_depth=(1,) * 99,
            drafted_by_kind={f"kind {i}": i for i in range(99)},
            accepted_by_kind={},
            unexpected=None,
            guarantee="exact in float32",
        ),
    ),
)
STATE = kv.init(batch=2, kv_heads=2, slots=16, head_dim=8, dtype=jnp.bfloat16)
RUNNING = Running(
    tokens=jnp.zeros((2, 99), int),
    **dict.fromkeys(("lengths", "last", "position"), jnp.zeros(2, int)),
    **dict.fromkeys(("done", "finite"), jnp.zeros(2, bool)),
    cache=(STATE,) * 99,
    rngs=jax.random.split(jax.random.key(0)),
    seen=None,
    speculation=None,
)


@pytest.mark.parametrize(
    ("value", "most", "words"),
    [
        (model(), 110, "tiny: Qwen3 network of 2 layers and 0.0175 M parameters"),
        (model(), 110, "float32 on cpu:0, no tokenizer"),
        (tiny.CONFIG, 170, "Config(vocab_size=61"),
        (MIXED, 700, "sinks=True"),
        (tiny.NETWORK, 500, "Decoder("),
        (STATE, 200, "KVState(keys=bfloat16[2,2,16,8], values=bfloat16[2,2,16,8], "),
        (RUNNING, 1200, "Generation(tokens=int32[2,99], lengths=int32[2], "),
        (COMPLETION, 1600, "lengths=(297, 297, 297, 297, ...), finish_reason=('len"),
        (COMPLETION.stats, 900, "Stats(prompt_tokens=(4096, 4096, 4096, 4096, ...), "),
        (COMPLETION.stats.drafts, 600, "drafted_by_depth=(2, 2, 2, 2, ...), "),
    ],
)
def test_short(value, most, words):
    assert words in repr(value)
    assert len(repr(value)) <= most
    assert "array" not in repr(value).lower()


@pytest.mark.parametrize("name", sorted(jaxkv.__all__))
def test_every_public_class_that_makes_itself_is_short(name):
    kind = getattr(jaxkv, name)
    if dataclasses.is_dataclass(kind):
        needed = [
            field.name
            for field in dataclasses.fields(kind)
            if field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if not needed:
            assert len(repr(kind())) <= 300
            assert "\n" not in repr(kind())


EXPERTS = Experts(count=4, per_token=2, size=8)


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "Llama"),
        ({"qk_norm": True}, "Qwen3"),
        ({"qk_norm": True, "pre_norm": False, "post_norm": True}, "OLMo 2"),
        ({"qkv_bias": True}, "Qwen2"),
        ({"qkv_bias": True, "output_bias": True}, "Llama"),
        ({"experts": EXPERTS}, "Mixtral"),
        ({"experts": EXPERTS, "sinks": True}, "gpt-oss"),
        ({"qk_norm": True, "experts": EXPERTS}, "Qwen3-MoE"),
        (dict(qk_norm=True, qk_norm_per_head=False, experts=EXPERTS), "OLMoE"),
        ({"norm_offset": True}, "Gemma 2"),
        ({"norm_offset": True, "qk_norm": True}, "Gemma 3"),
        ({"residual_scale": 0.2}, "Granite"),
    ],
)
def test_family(changes, family):
    plain = dataclasses.replace(tiny.CONFIG, qk_norm=False)
    assert dataclasses.replace(plain, **changes).family == family


def test_a_model_with_a_tokenizer():
    assert repr(model(tokenizer=object())).endswith("float32 on cpu:0)")


@dataclasses.dataclass
class Holder:
    shown: object
    hidden: object = dataclasses.field(default=None, repr=False)

    __repr__ = brief


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.zeros((3, 0), np.int8), "Holder(shown=int8[3,0])"),
        (jax.ShapeDtypeStruct((2,), jnp.bfloat16), "Holder(shown=bfloat16[2])"),
        ([1, 2, 3, 4, 5], "Holder(shown=[1, 2, 3, 4, ...])"),
        ({"a": {"b": np.zeros(2)}}, "Holder(shown={'a': {'b': float64[2]}})"),
        (Holder("x"), "Holder(shown=Holder(shown='x'))"),
    ],
)
def test_brief(value, expected):
    assert repr(Holder(value)) == expected
