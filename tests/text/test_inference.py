"""`jaxkv.generate`: what it refuses, streaming, seeds."""

import dataclasses

import numpy as np
import pytest

import jaxkv
from jaxkv import generation
from jaxkv.evaluation.questions import DEVELOPMENT_SEED, Cell, draw_sample
from jaxkv.models.decoder import Decoder
from jaxkv.text import pricing
from jaxkv.text.pricing import Ledger


@pytest.fixture(scope="module")
def lm():
    return jaxkv.load("needle")


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([""], {}, "prompt 0 is empty"),
        ([[]], {}, "prompt 0 has no tokens"),
        ([[5, 4096]], {}, "token ids outside"),
        (["a"], dict(max_new_tokens=0), "max_new_tokens must be >= 1"),
        (["a"], dict(block=0), "block must be >= 1"),
        (["a"], dict(max_new_tokens=20_000), "positions"),
        (["a"], dict(budget=0), "budget must be at least 1"),
        (["a"], dict(budget=8, compression_ratio=0.5), "not both"),
        (["a"], dict(compression_ratio=1.0), "fraction removed"),
        (["a"], dict(seed=[1, 2]), "got 2 seeds for 1 prompts"),
        (["a b c d e f g"], dict(budget=2), "keeps all of them"),
        (["a"], dict(decode=jaxkv.StreamingLLM()), "needs a budget"),
        (["a"], dict(budget=4, decode=jaxkv.StreamingLLM()), "leaves no slot"),
        (["a"], dict(pool=[(0, 1)]), "pool= does nothing without speculate="),
        (["a"], dict(pool=[], speculate=jaxkv.Tree()), "got 0 spans"),
        (["a"], dict(pool=[(1, 9)], speculate=jaxkv.Tree()), "must lie within"),
        (["a"], dict(pool=5, speculate=jaxkv.Tree()), "one span .* per prompt, got 5"),
        (
            ["a"],
            dict(pool=np.array(5), speculate=jaxkv.Tree()),
            "one span .* got array",
        ),
        (["a"], dict(budget=[[1], [2, 3]]), r"budget.0. must be a whole .*, got \[1\]"),
        (["a"], dict(budget="9"), "budget must be a whole number, got '9'"),
        (["a"], dict(seed=[[1], [2, 3]]), "got 2 seeds for 1 prompts"),
        (["a"], dict(on_tokens=3), "on_tokens= takes a function .*, got 3"),
        (["a"], dict(pool=[(0, 1, 2)], speculate=jaxkv.Tree()), "is two numbers"),
        (["a"], dict(pool=[(0, 0.5)], speculate=jaxkv.Tree()), "be a whole number"),
        (["a"], dict(pool=[None], speculate=jaxkv.Tree()), "a list of whole numbers"),
        (["a"], dict(accept=jaxkv.TopK()), "does nothing without drafts"),
        (
            ["a"],
            dict(budget=4, decode=jaxkv.StreamingLLM(n_sink=-1)),
            "n_sink must be at least 0",
        ),
    ],
)
def test_bad_input_is_named(lm, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        jaxkv.generate(lm, prompts, **options)


def test_a_vocabulary_beyond_int32_is_refused(lm):
    config = dataclasses.replace(lm.config, vocab_size=2**31)
    large = dataclasses.replace(lm, network=Decoder(config))
    with pytest.raises(ValueError, match="token ids are int32"):
        jaxkv.generate(large, ["a"])


def test_text_needs_a_tokenizer(tiny_lm):
    out = jaxkv.generate(tiny_lm, [[5, 6]], max_new_tokens=2)
    assert out.text == out.decoded and isinstance(out.text[0], str)
    bare = dataclasses.replace(tiny_lm, tokenizer=None)
    out = jaxkv.generate(bare, [[5, 6]], max_new_tokens=2)
    assert out.decoded is None and "tokens" in repr(out)
    with pytest.raises(ValueError, match="the model has no tokenizer, so its outputs"):
        _ = out.text


@pytest.mark.slow
def test_the_pool_says_what_is_copied(lm):
    sample = draw_sample(
        Cell(task="quote", length=512),
        lambda text: len(lm.tokenizer(text)["input_ids"]),
        seed=DEVELOPMENT_SEED,
        index=0,
    )
    length = len(lm.tokenizer(sample.prompt)["input_ids"])
    drafts = [
        jaxkv.generate(
            lm,
            sample.prompt,
            max_new_tokens=16,
            speculate=jaxkv.PromptLookup(include_output=False, break_even=0.0),
            pool=[span],
        ).stats.drafts
        for span in ((0, 1), (0, length))
    ]
    assert drafts[0].drafted == 0 < drafts[1].accepted
    assert drafts[0].steps > drafts[1].steps


def test_streamed_blocks_are_the_output(lm):
    prompts = ["The grass is green. The sky", "Here we go."]
    plain = jaxkv.generate(lm, prompts, max_new_tokens=20, stop_ids=[])
    blocks, sizes = [[], []], []

    def collect(new):
        sizes.append(len(new[0]))
        for row, tokens in zip(blocks, new, strict=True):
            row.extend(tokens)

    jaxkv.generate(
        lm, prompts, max_new_tokens=20, stop_ids=[], on_tokens=collect, block=6
    )
    assert tuple(map(tuple, blocks)) == plain.tokens
    assert sizes == [1, 6, 6, 6, 1]


def test_prices_of_drafts_are_measured_on_the_way(tiny_lm, monkeypatch):
    """In the first calls, whose outputs are plain decoding's, and in no later one."""
    ledger = Ledger()
    monkeypatch.setattr(pricing, "LEDGER", ledger)
    common = dict(max_new_tokens=20, stop_ids=[])
    plain = jaxkv.generate(tiny_lm, [[5, 6, 7, 5, 6]], **common)
    drafts, timed = jaxkv.Tree(num_draft_tokens=3), []
    for _ in range(8):
        heard = []
        out = jaxkv.generate(
            *(tiny_lm, [[5, 6, 7, 5, 6]]),
            **common,
            speculate=drafts,
            on_tokens=heard.append,
        )
        assert out.tokens == plain.tokens
        assert tuple(token for (row,) in heard for token in row) == plain.tokens[0]
        (prices,) = ledger.known()
        timed.append(len(prices.timed))
    assert prices.known and timed == sorted(timed) and timed[-2] == timed[-1]
    fixed = dataclasses.replace(drafts, break_even=0.0)
    jaxkv.generate(tiny_lm, [[5, 6, 7, 5, 6]], **common, speculate=fixed)
    assert ledger.known() == [prices]


def test_one_token_needs_no_loop(lm, monkeypatch):
    """Nor does an answer that ends at once; the first token waits for no program."""
    (first,) = jaxkv.generate(lm, "Here we go.", max_new_tokens=3).tokens
    with monkeypatch.context() as patch:
        patch.setattr(generation, "advance_jit", None)
        for options in dict(max_new_tokens=1), dict(stop_ids=[first[0]]):
            out = jaxkv.generate(lm, "Here we go.", **options)
            assert out.tokens == (first[:1],)
        heard = []
        with pytest.raises(TypeError):
            jaxkv.generate(lm, "Here we go.", max_new_tokens=3, on_tokens=heard.append)
    assert heard == [[[first[0]]]]


@pytest.mark.slow
def test_seeds_decide_draws(lm):
    sampler = jaxkv.Categorical(temperature=2.0)

    def draw(prompts, seed):
        out = jaxkv.generate(
            lm, prompts, max_new_tokens=12, sampler=sampler, seed=seed, stop_ids=[]
        )
        return out.tokens

    first = draw(["Here we go."] * 2, [7, 8])
    assert first == draw(["Here we go."] * 2, [7, 8])
    assert first[0] != first[1]
    assert draw(["Here we go."], [8])[0] == first[1]
