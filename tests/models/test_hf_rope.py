"""Rotary scalings of `config.json`, and transformers' frequencies as the oracle."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.models import rope
from jaxkv.models.checkpoint import CheckpointError
from jaxkv.models.config import LayerKind
from jaxkv.models.hf.rope import read_rope, read_ropes, without_rope
from jaxkv.models.rope import Llama3Scaling, LongRopeScaling, Rope, YarnScaling

HEAD_DIM, MAX_POSITIONS = 16, 64
ORIGINAL = "original_max_position_embeddings"
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **{ORIGINAL: 32})
YARN = {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 16}
LONG = dict(
    rope_type="longrope",
    short_factor=[1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0, 4.0],
    long_factor=[1.0, 1.5, 2.0, 3.0, 5.0, 9.0, 16.0, 32.0],
)


def read(raw, default=None, **options):
    sizes = dict(max_positions=MAX_POSITIONS, head_dim=HEAD_DIM)
    return read_rope(raw, default or {}, **sizes | options)


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        (dict(rope_type="linear", factor=2.5), {}),
        (dict(rope_type="llama3", **LLAMA3), {}),
        (YARN, {}),
        (YARN | dict(rope_theta=5e5, factor=40.0), {}),
        (YARN | dict(truncate=False), {}),
        (YARN | dict(beta_fast=8, beta_slow=2.0, attention_factor=0.7), {}),
        (YARN | dict(mscale=1.5, mscale_all_dim=0.5), {}),
        (YARN | dict(mscale=1.5), {}),  # alone it is not read
        (YARN | dict(factor=0.5), {}),
        (YARN | dict(beta_fast=1, beta_slow=1, rope_theta=16.0), {}),
        (YARN | {ORIGINAL: 10**9}, {}),  # the ramp lies behind all frequencies
        (YARN | {ORIGINAL: None, "factor": 2.0}, {}),
        (YARN | dict(partial_rotary_factor=0.5), dict(partial=True)),
        (LONG | {ORIGINAL: 16}, {}),  # the long factors
        (LONG | {ORIGINAL: 64}, {}),  # the short ones
        (LONG | {ORIGINAL: 16, "factor": 3.0}, {}),
        (LONG | {ORIGINAL: 16, "attention_factor": 1.7}, {}),
    ],
)
def test_frequencies_are_those_of_transformers(settings, changes):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = {"rope_theta": 500.0} | settings
    settings = {key: value for key, value in settings.items() if value is not None}
    config = transformers.LlamaConfig(
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=settings,
    )
    compute = ROPE_INIT_FUNCTIONS[settings["rope_type"]]
    expected, factor = compute(config, "cpu", seq_len=MAX_POSITIONS)
    found = read(dict(rope_parameters=settings), **changes)
    turn = rope.frequencies(found, HEAD_DIM, MAX_POSITIONS)
    np.testing.assert_allclose(turn[: len(expected)], expected.numpy(), rtol=2e-6)
    np.testing.assert_array_equal(turn[len(expected) :], 0)
    assert found.attention_factor == pytest.approx(factor)


def test_a_table_by_hand():
    """What is not rotated is not scaled, either."""
    scaling = YarnScaling(factor=1.0, original_max_positions=8, attention_factor=3.0)
    how = Rope(theta=100.0, scaling=scaling, rotary_dim=4)
    cos, sin = rope.table(how, jnp.asarray([[5]]), 8, 64)
    angles = np.array([5.0, 0.5])
    np.testing.assert_allclose(cos[0, 0], [*3 * np.cos(angles), 1, 1], rtol=1e-6)
    np.testing.assert_allclose(sin[0, 0], [*3 * np.sin(angles), 0, 0], rtol=1e-6)
    cos, sin = rope.table(None, jnp.asarray([[5]]), 4, 64)
    assert (cos == 1).all() and (sin == 0).all()


@pytest.mark.parametrize(
    ("rotary_dim", "interleaved", "order"),
    [
        (None, False, None),
        (8, False, None),
        (4, False, [0, 1, 4, 5, 2, 3, 6, 7]),
        (6, False, [0, 1, 2, 4, 5, 6, 3, 7]),
        (None, True, [0, 4, 1, 5, 2, 6, 3, 7]),
        (4, True, [0, 4, 1, 5, 2, 3, 6, 7]),
    ],
)
def test_order_of_a_head_by_hand(rotary_dim, interleaved, order):
    how = Rope(rotary_dim=rotary_dim)
    found = rope.head_order(how, 8, interleaved=interleaved)
    assert (found is None) if order is None else (found.tolist() == order)
    if rotary_dim is None:
        none = rope.head_order(None, 8, interleaved=interleaved)
        np.testing.assert_array_equal(none, found)


def test_longrope_has_one_set_for_a_network():
    found = read(dict(rope_parameters=LONG, **{ORIGINAL: 16})).scaling
    assert found == LongRopeScaling(
        short_factors=tuple(LONG["short_factor"]),
        long_factors=tuple(LONG["long_factor"]),
        original_max_positions=16,
        attention_factor=found.attention_factor,
    )
    assert found.attention_factor == pytest.approx(1.5**0.5)  # 1 + log 4 / log 16
    how = Rope(theta=1.0, scaling=found)
    for length, factors in ((16, "short_factor"), (17, "long_factor")):
        turn = rope.frequencies(how, HEAD_DIM, length)
        np.testing.assert_allclose(turn, 1 / np.array(LONG[factors]), rtol=1e-6)


@pytest.mark.parametrize(
    "spelling",
    [
        dict(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3}),
        dict(rope_theta=5e5, rope_scaling={"type": "llama3", **LLAMA3}),
        dict(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}),
    ],
)
def test_llama3_scaling_in_every_spelling(spelling):
    scaling = Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32
    )
    assert read(spelling) == Rope(theta=5e5, scaling=scaling)


def test_the_original_context():
    """The key outside of the object is the stronger one, as in transformers."""
    scaling = {"rope_type": "llama3", **LLAMA3}

    def original(raw, default=None):
        return read(raw, default).scaling.original_max_positions

    assert original(dict(rope_scaling=scaling)) == 32
    assert original({"rope_scaling": scaling, ORIGINAL: 48}) == 48
    assert original(dict(rope_scaling=scaling), {ORIGINAL: 8}) == 8
    del scaling[ORIGINAL]
    assert original(dict(rope_scaling=scaling)) == MAX_POSITIONS


def test_what_the_family_is_used_to():
    usual = dict(rope_parameters=dict(rope_theta=7.0, rope_type="linear", factor=2.0))
    assert read({}, usual).theta == 7.0 and read({}, usual).scaling.factor == 2.0
    assert read(dict(rope_theta=9), usual).theta == 9.0
    assert read(dict(rope_parameters=dict(rope_type="default")), usual).scaling is None
    half = read(dict(partial_rotary_factor=0.5), partial=True)
    assert half == Rope(rotary_dim=8)
    su = dict(rope_scaling=LONG | dict(type="su", rope_type=None))
    assert read(su, longrope=("su",)) == read(dict(rope_scaling=LONG))


def test_settings_by_type_of_layer():
    both = dict(
        full_attention=dict(YARN, rope_theta=7.0),
        sliding_attention=dict(rope_type="default"),
    )
    raw = dict(rope_parameters=both, rope_theta=9.0)
    full = read(raw, layer_type="full_attention")
    assert full.theta == 7.0 and full.scaling.factor == 4.0
    plain = Rope(theta=9.0)
    assert read(raw, layer_type="sliding_attention") == plain
    sizes = dict(max_positions=MAX_POSITIONS, head_dim=HEAD_DIM)
    found = read_ropes(raw, {}, by_type=True, **sizes)
    assert found == dict(full_attention=full, sliding_attention=plain)
    assert set(read_ropes(dict(rope_theta=9.0), {}, **sizes).values()) == {plain}


@pytest.mark.parametrize(
    ("raw", "rotated"),
    [
        ({}, [1, 1, 0, 1, 1]),
        (dict(no_rope_layer_interval=2), [1, 0, 1, 0, 1]),
        (
            dict(no_rope_layer_interval=2, no_rope_layers=[0, 1, 1, 0, 0]),
            [0, 1, 1, 0, 0],
        ),
    ],
)
def test_layers_without_rotation(raw, rotated):
    kinds = tuple(LayerKind(rope=Rope(theta=7.0), window=i) for i in range(1, 6))
    found = without_rope(kinds, raw, dict(no_rope_layer_interval=3))
    assert [int(kind.rope is not None) for kind in found] == rotated
    assert [kind.window for kind in found] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (dict(no_rope_layers=[1]), "no_rope_layers=.1. is not .* 'a list of 2 ones"),
        (dict(no_rope_layers=[1, 2]), "no_rope_layers=.1, 2. is not supported"),
        (dict(no_rope_layers="no"), "no_rope_layers='no' is not supported"),
        (dict(no_rope_layer_interval=0), "no_rope_layer_interval must be a positive"),
    ],
)
def test_refused_layers_without_rotation(raw, message):
    with pytest.raises(CheckpointError, match=message):
        without_rope((LayerKind(),) * 2, raw, dict(no_rope_layer_interval=4))


@pytest.mark.parametrize(
    ("raw", "options", "message"),
    [
        (dict(rope_scaling=dict(type="mrope")), {}, "rope_scaling.rope_type='mrope'"),
        (
            dict(rope_scaling=dict(type=3)),
            {},
            "rope_type=3 is not .*'default', 'linear'",
        ),
        (
            dict(rope_scaling=dict(type="linear")),
            {},
            "rope_scaling.factor must be a positive number, found None",
        ),
        (
            dict(rope_scaling=dict(type="default", factor=2)),
            {},
            "rope_scaling.factor=2 is not supported; supported: 1",
        ),
        (
            dict(rope_scaling=dict(type="dynamic", factor=-2)),
            {},
            "factor must be a positive number, found -2",
        ),
        (
            dict(rope_scaling=dict(type="dynamic", factor=2.0, alpha=1000)),
            {},
            "rope_scaling.alpha=1000",
        ),
        (
            dict(rope_scaling=dict(type="llama3", **LLAMA3, beta_fast=32)),
            {},
            "rope_scaling.beta_fast=32 is not supported",
        ),
        (
            dict(rope_scaling=dict(type="default", mrope_section=[16, 24, 24])),
            {},
            "rope_scaling.mrope_section=.16, 24, 24.",
        ),
        (
            dict(rope_parameters=dict(full_attention=dict(rope_type="default"))),
            {},
            "rope_parameters=.*one flat object",
        ),
        (
            dict(rope_parameters=dict(rope_type="default")),
            dict(layer_type="full_attention"),
            "rope_parameters=.*an object of objects, with 'full_attention'",
        ),
        (
            dict(rope_parameters=dict(x=YARN | dict(truncate=False))),
            dict(layer_type="x"),
            "rope_parameters.x.truncate=False is not supported; supported: True",
        ),
        (dict(rope_scaling="llama3"), {}, "rope_scaling='llama3'"),
        (
            dict(rope_scaling=dict(type="llama3", **LLAMA3 | dict(factor=0))),
            {},
            "factor must be a positive number, found 0",
        ),
        (
            dict(rope_scaling=dict(type="llama3", **LLAMA3 | dict(high_freq_factor=1))),
            {},
            "high_freq_factor=1.0 must be greater than low_freq_factor=1.0",
        ),
        (
            dict(rope_parameters=YARN | dict(beta_fast=1, beta_slow=2)),
            {},
            "rope_parameters.beta_fast=1.0 must be at least beta_slow=2.0",
        ),
        (dict(rope_parameters=YARN | dict(truncate=1)), {}, "truncate=1 is not"),
        (dict(rope_parameters=YARN | dict(factor="4")), {}, "factor must be .*'4'"),
        (
            dict(rope_parameters=YARN | dict(attention_factor=-1)),
            {},
            "attention_factor must be a positive number, found -1",
        ),
        (dict(rope_parameters=YARN, rope_theta=1), {}, "rope_theta must be above 1"),
        (
            dict(rope_parameters=LONG | dict(long_factor=[1.0])),
            {},
            "rope_parameters.long_factor=.1.0. is not supported; .*a list of 8",
        ),
        (
            dict(rope_parameters=LONG | dict(short_factor=[0] * 8)),
            {},
            "rope_parameters.short_factor must be a positive number, found 0",
        ),
        (dict(rope_parameters=dict(type="su")), {}, "rope_type='su'"),
        (dict(partial_rotary_factor=0.5), {}, "partial_rotary_factor=0.5 is not supp"),
        (
            dict(partial_rotary_factor=0.2),
            dict(partial=True),
            "partial_rotary_factor=0.2 must leave an even number of the 16 dimensions",
        ),
        (
            dict(partial_rotary_factor="half"),
            dict(partial=True),
            "partial_rotary_factor='half' must leave an even number",
        ),
    ],
)
def test_what_is_refused(raw, options, message):
    with pytest.raises(CheckpointError, match=re.compile(message, re.DOTALL)):
        read(raw, **options)
