"""Policies around policies, by hand: ChunkKV, CriticalKV and AdaKV."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from prompts_by_hand import ONES, kept, prompt_of
from tiny import language_model, prompts

import jaxkv
from jaxkv import AdaKV, ChunkKV, CriticalKV, KNorm, Options, SnapKV, StreamingLLM
from jaxkv import state as kv
from jaxkv.laws import programs
from jaxkv.policies.adakv import head_budgets, mixed_budgets
from jaxkv.policies.base import WholePrompt
from jaxkv.policies.chunkkv import chunk_scores
from jaxkv.policies.criticalkv import output_norms
from jaxkv.text.arguments import static_options


@dataclasses.dataclass(frozen=True)
class Given(WholePrompt):
    """Scores that are given, of each head."""

    given: tuple = ()

    def scores(self, prompt):
        return jnp.asarray(self.given, jnp.float32)[None]


HEADS = Given(((9, 1, 8, 2, 7), (3, 5, 0, 6, 4)))
PROMPT = prompt_of(ONES, np.zeros((5, 2)))


def keeping(keep, prompt=PROMPT):
    return prompt._replace(keep=jnp.asarray([keep], jnp.int32))


def test_chunks_are_kept_whole_and_the_last_in_part():
    # Sums over the heads: 12, 6, 8, 8, 11; means of pairs: 9, 8, and 11 alone.
    chunks = ChunkKV(policy=HEADS, chunk_length=2)
    for keep, want in ((1, [4]), (2, [0, 4]), (3, [0, 1, 4]), (4, [0, 1, 2, 4])):
        assert kept(chunks, keeping(keep)) == [want, want]
    five = dataclasses.replace(chunks, chunk_length=5)
    assert kept(five, keeping(2)) == [[0, 1], [0, 1]]


def test_what_is_kept_anyway_stands_apart_or_lifts_its_chunk():
    scores = jnp.asarray([[[1.0, 2.0, 3.0, np.inf, 5.0, 7.0]]])
    lengths = jnp.asarray([5], jnp.int32)
    apart = chunk_scores(scores, lengths, chunk_length=2, best=False)[0, 0]
    assert apart[:5].tolist() == [1.5, 1.5, 3.0, np.inf, 5.0]
    best = chunk_scores(scores, lengths, chunk_length=2, best=True)[0, 0]
    assert best[:5].tolist() == [1.5, 1.5, 4.5, 4.5, 5.0]  # it counts as 5 + 1


def test_the_second_stage_weighs_by_norms():
    """Values are (1, 1, 1, 1, 9) in the first head; in the other all are 1."""
    values = jnp.ones((1, 5, 2, 2)).at[0, 4, 0].set(9.0)
    prompt = PROMPT._replace(values=values, output=jnp.ones((2, 2, 3)))
    norms = output_norms(prompt)
    np.testing.assert_allclose(norms, [[[6, 6, 6, 6, 54], [6] * 5]])
    # 9 wins the first stage; then 8 against 7 x 9.
    assert kept(CriticalKV(policy=HEADS), prompt) == [[0, 4], [1, 3]]
    assert kept(CriticalKV(policy=HEADS, first_stage=1.0), prompt)[0] == [0, 2]
    alone = CriticalKV(policy=HEADS, first_stage=0.0)
    assert kept(alone, keeping(1, prompt))[0] == [4]
    with pytest.raises(ValueError, match=r"no output projection; give Prompt\(output="):
        output_norms(PROMPT)


def test_epsilon_lets_norms_count_where_scores_are_small():
    prompt = PROMPT._replace(
        values=jnp.ones((1, 5, 2, 2)).at[0, 1, 0].set(4.0), output=jnp.ones((2, 2, 3))
    )
    policy = CriticalKV(policy=HEADS, first_stage=0.0)
    assert kept(policy, prompt)[0] == [0, 2]
    assert kept(dataclasses.replace(policy, epsilon=10.0), prompt)[0] == [0, 1]


@pytest.mark.parametrize(
    ("safeguard", "most", "want"),
    [
        # The best four of both heads are 9, 8, 7 and 6.
        (0.0, 2.0, [[0, 2, 4], [3]]),
        (1.0, 2.0, [[0, 2], [1, 3]]),
        (0.0, 1.5, [[0, 2, 4], [3]]),
        (0.0, 1.0, [[0, 2], [1, 3]]),
    ],
)
def test_heads_share_a_layer_s_budget(safeguard, most, want):
    policy = AdaKV(policy=HEADS, safeguard=safeguard, most=most)
    state = kv.init(batch=1, kv_heads=2, slots=8, head_dim=2, dtype=jnp.float32)
    state = policy.compress(PROMPT, state, budget=policy.layer_budgets(2, 1)[0])
    found = [row[row >= 0].tolist() for row in np.asarray(state.positions)[0]]
    assert found == want


@pytest.mark.parametrize(
    ("most", "safeguard", "keep", "length", "want"),
    [
        (2.0, 0.0, 2, 5, [4, 0]),
        (1.5, 0.0, 2, 5, [3, 1]),  # what a head cannot hold goes to the other
        (2.0, 0.2, 2, 5, [3, 1]),  # one token at least
        (1.0, 0.2, 3, 3, [3, 3]),  # a prompt that fits is kept whole
    ],
)
def test_budgets_of_heads(most, safeguard, keep, length, want):
    scores = jnp.asarray([[[9.0, 8, 7, 6, 5], [-np.inf, 1, 2, 3, 4]]])
    got = head_budgets(
        *(scores, jnp.asarray([length]), jnp.full((1, 2), keep)),
        safeguard=safeguard,
        most=most,
        bound=int(keep * most),
    )
    assert got.tolist() == [want]


@pytest.mark.parametrize(
    ("safeguard", "most", "keep", "length", "want"),
    [
        # Beside a token that is kept anyway, 3 of 4 others are the first head's.
        (0.0, 2.0, 3, 5, [5, 1]),
        (0.5, 2.0, 3, 5, [4, 2]),
        (0.25, 2.0, 3, 5, [5, 1]),  # 3 + 1.5 and 3 - 1.5: the first is rounded up
        (1.0, 2.0, 3, 5, [3, 3]),
        (0.0, 1.5, 3, 5, [4, 2]),
        (0.3, 2.0, 5, 5, [5, 5]),  # a prompt that fits is kept whole
    ],
)
def test_budgets_that_are_mixed(safeguard, most, keep, length, want):
    scores = jnp.asarray([[[9.0, 8, 7, 6, np.inf], [np.inf, 1, 2, 3, 4]]])
    got = mixed_budgets(
        *(scores, jnp.asarray([length]), jnp.full((1, 2), keep)),
        safeguard=safeguard,
        most=most,
        bound=min(int(keep * most), 5),
    )
    assert got.tolist() == [want]


def test_heads_of_different_budgets_need_a_decode_that_appends():
    options = Options(budget=64, prefill=AdaKV(), decode=StreamingLLM())
    with pytest.raises(ValueError, match="AdaKV gives heads different budgets, but"):
        options.check()


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (AdaKV(policy=SnapKV(window_size=0)), "AdaKV: SnapKV: window_size must be"),
        (ChunkKV(policy=StreamingLLM(n_sink=9)), "ChunkKV: StreamingLLM: budget=9"),
        (CriticalKV(policy=jaxkv.Full()), "takes one of the prompt that scores tokens"),
        (CriticalKV(policy=3), "CriticalKV: policy takes one of the prompt"),
        (AdaKV(policy=ChunkKV(policy=3)), "AdaKV: ChunkKV: policy takes one of"),
    ],
)
def test_the_policy_within_is_checked(policy, message):
    with pytest.raises(ValueError, match=message):
        policy.check(9)


@pytest.mark.parametrize("wrapper", [AdaKV, ChunkKV, CriticalKV])
@pytest.mark.parametrize(
    ("within", "hint"),
    [
        (jaxkv.LongFlow(), "; LongFlow decides while decoding, pass it as decode="),
        (SnapKV, "; write SnapKV\\(\\)"),
        (jaxkv.Full(), ""),
        (7, ""),
    ],
)
def test_the_wrong_policy_within_is_named(wrapper, within, hint):
    """Also where its lacks would show first as those of the policy around it."""
    got = re.escape(repr(within)) + hint
    said = f"{wrapper.__name__}: policy takes one of the prompt .* got {got}.$"
    for policy in (wrapper(policy=within), AdaKV(policy=wrapper(policy=within))):
        with pytest.raises(ValueError, match=said):
            static_options("generate", prefill=policy).check((64,))


def test_named_settings():
    assert AdaKV.board().policy.epsilon == 1e-2
    assert not AdaKV.board().policy.sinks_share
    assert AdaKV.paper(most=3.0) == AdaKV(policy=SnapKV(), share="mixed", most=3.0)
    assert ChunkKV.kvpress(policy=KNorm()).anyway == "best"


def test_slots_that_heads_may_fill(tmp_path):
    """Twice the budget each, and all of a prompt's tokens at most."""
    lm = language_model(tmp_path)
    asked = [list(range(1, 61)) * 4, [9, 10, 11]]

    def run(policy, **budget):
        return jaxkv.generate(lm, asked, max_new_tokens=4, prefill=policy, **budget)

    plain = run(None)
    policy = CriticalKV(policy=AdaKV(policy=KNorm()))
    assert run(policy, budget=240).tokens == plain.tokens
    stats = run(policy, budget=[64, 3]).stats
    assert stats.slots == run(KNorm(), budget=[64, 3]).stats.slots + 64


def test_decoding_reads_what_each_head_holds():
    """Whatever computes attention, where heads of a layer hold different numbers."""
    tokens, lengths = prompts(0, programs.LENGTHS, programs.PROMPT)
    policy = AdaKV(policy=SnapKV(window_size=2, kernel_size=1))
    logits, cache = programs.prefill(policy, tokens)
    held = np.asarray(kv.occupancy(cache[0]))
    assert (held[:, :1] != held[:, 1:]).any()
    token = logits.argmax(-1).astype(jnp.int32)
    both = []
    for implementation in ("reference", "xla"):
        options = Options(decode_implementation=implementation)
        got, after = programs.step(options, token, lengths, cache)
        np.testing.assert_array_equal(kv.occupancy(after[0]), held + 1)
        both.append(got)
    np.testing.assert_allclose(*both, rtol=1e-4, atol=1e-4)
