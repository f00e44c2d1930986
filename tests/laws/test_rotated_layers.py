"""The laws where layers rotate otherwise, or not at all, and norms stand elsewhere."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from small_policies import DAPQ
from tiny import CONFIG, parameters, prompts

from jaxkv import ExpectedAttention, LongFlow, Options
from jaxkv.kernels.rotary import rotate
from jaxkv.laws import lawbook, programs
from jaxkv.laws.programs import LENGTHS, PROMPT
from jaxkv.models.config import LayerKind
from jaxkv.models.decoder import Decoder, layer_frequencies
from jaxkv.models.rope import Rope, YarnScaling

YARN = YarnScaling(factor=4.0, original_max_positions=8, attention_factor=1.5)
MIXED = dataclasses.replace(
    CONFIG,
    kinds=(
        LayerKind(rope=Rope(theta=50.0, scaling=YARN, rotary_dim=4)),
        LayerKind(rope=None),
    ),
    qk_norm_per_head=False,
    pre_norm=False,
    post_norm=True,
)
PROGRAMS = programs.compiled(MIXED)
LONGFLOW = Options(prefill=DAPQ, decode=LongFlow(), budget=9)


@pytest.fixture(autouse=True)
def network_of_mixed_rotations(monkeypatch):
    monkeypatch.setattr(programs, "current", PROGRAMS)


def test_full_budget_is_exact():
    lawbook.full_budget_is_exact(LONGFLOW, *prompts(3, LENGTHS, PROMPT))


def test_batch_equals_singles():
    lawbook.batch_equals_singles(LONGFLOW, *prompts(3, LENGTHS, PROMPT), 0)


def test_exact_speculation_equals_plain():
    lawbook.exact_speculation_equals_plain(LONGFLOW, *prompts(3, LENGTHS, PROMPT), 0)


def test_a_prompt_is_bounded_where_queries_are_turned_ahead():
    lawbook.prompt_is_bounded(ExpectedAttention(), prompts(3, LENGTHS, PROMPT)[0])


def test_frequencies_alone_turn_queries_ahead():
    """The scaling's factor is in a query already, as is what no rotation touches."""
    seen = []

    def attend(q, k, v, state, weighing):
        seen.append(q)
        return q, state

    tokens, positions = prompts(3, (6,), 6)[0], jnp.arange(6, dtype=jnp.int32)[None]
    for shift in (0, 7):
        Decoder(MIXED).apply(
            {"params": parameters(MIXED)},
            tokens,
            positions + shift,
            (None,) * 2,
            attend,
        )
    early, _, late, _ = seen  # of the first layer, which sees each token alone
    ahead = jnp.full_like(positions, 7)
    turned = rotate(early, ahead, layer_frequencies(MIXED)[0])
    np.testing.assert_allclose(turned, late, rtol=1e-5, atol=1e-5)
    assert np.abs(early - late)[..., [0, 1, 4, 5]].max() > 0.1
    np.testing.assert_array_equal(early[..., [2, 3, 6, 7]], late[..., [2, 3, 6, 7]])
