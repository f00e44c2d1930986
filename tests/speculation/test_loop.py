"""The law of speculation: with the exact rule, what plain decoding gives, whatever the
drafts are. Here they come from a script: right, wrong, and trees at random."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from small_policies import SMALL_PREFILL
from tiny import CONFIG, NETWORK

from jaxkv import (
    Categorical,
    DapQ,
    Greedy,
    LongFlow,
    Options,
    StreamingLLM,
    generation,
    registry,
)
from jaxkv.speculation import loop as spec
from jaxkv.speculation.rules import Conditional, FixedThreshold, TopK, Typical
from jaxkv.trees import DraftTree

PROMPT, NEW, ROWS = 16, 24, 3
RIGHT, WRONG, MIXED, NONE = range(4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scripted:
    """Drafts from what plain decoding gave, in place of `likeliest`: int32 `[B, O]`.

    `pool` says how, per row: a seed, and if tokens are right, wrong, mixed or none.
    """

    num_draft_tokens: int = 7
    depth: int = 4
    break_even: float | str = 0.0
    likeliest = False

    def check(self):
        """Accept everything."""

    def draft(self, context):
        """Return a chain of right tokens, or a tree of any shape."""

        def row(text, position, prompt, pool, script):
            key = jax.random.fold_in(jax.random.key(pool[0]), position)
            draws = jax.random.randint(key, (3, self.num_draft_tokens), 0, 2**20)
            newest = position - prompt
            parents, depths, valid = ([jnp.int32(0)], [jnp.int32(0)], [jnp.bool_(True)])
            tokens = [text[position]]
            for node in range(1, 1 + self.num_draft_tokens):
                a, b, c = draws[:, node - 1]
                parent = jnp.where(pool[1] == RIGHT, node - 1, a % node)
                depth = jnp.stack(depths)[parent] + 1
                parent = jnp.where(depth > self.depth, 0, parent)
                depth = jnp.where(depth > self.depth, 1, depth)
                right = jnp.where(
                    newest + depth < len(script), script[newest + depth], 0
                )
                right = jnp.maximum(right, 0)
                wrong = (right + 1 + b % (CONFIG.vocab_size - 1)) % CONFIG.vocab_size
                use = (pool[1] == RIGHT) | ((pool[1] == MIXED) & (c % 4 != 0))
                tokens.append(jnp.where(use, right, wrong))
                there = (pool[1] != NONE) & ((pool[1] != MIXED) | (c % 5 != 0))
                valid.append(jnp.stack(valid)[parent] & there)
                parents.append(parent)
                depths.append(depth)
            return tuple(map(jnp.stack, (tokens, parents, depths, valid)))

        tokens, parents, depths, valid = jax.vmap(row)(
            *(context.text, context.position, context.prompt, context.pool),
            context.likeliest,
        )
        return DraftTree(
            *(x.astype(jnp.int32) for x in (tokens, parents, depths)),
            valid,
            jnp.zeros(tokens.shape, jnp.int32),
        )


CASES = {  # name: options of the plain run
    "full": Options(),
    "full, drawn": Options(sampler=Categorical(temperature=0.9, top_p=0.9)),
    "streaming-llm, tight and drawn": Options(
        budget=6,
        prefill=StreamingLLM(),
        decode=StreamingLLM(),
        sampler=Categorical(temperature=0.9, top_k=20, repetition_penalty=1.3),
    ),
    "streaming-llm, penalised": Options(
        budget=12,
        prefill=StreamingLLM(n_sink=2),
        decode=StreamingLLM(n_sink=2),
        sampler=Greedy(repetition_penalty=1.3),
    ),
    "longflow": Options(budget=8, prefill=StreamingLLM(), decode=LongFlow()),
    "longflow, protected": Options(
        budget=12,
        prefill=StreamingLLM(n_sink=2),
        decode=LongFlow(n_sink=1, n_recent=1, shared=False, score="l2"),
    ),
    # Of the longest prompt nothing may be evicted at first, of the shortest all stays.
    "longflow, recommended": Options(
        budget=20, prefill=StreamingLLM(), decode=LongFlow.recommended(n_recent=4)
    ),
}
# Each case is a program of its own to compile; three of them have every feature.
QUICK_CASES = ("full", "streaming-llm, tight and drawn", "longflow")
cases = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK_CASES else pytest.mark.slow)
        for name in CASES
    ],
)

start = jax.jit(
    generation.start,
    static_argnames=("network", "options", "slots", "max_out"),
)
advance = jax.jit(
    generation.advance,
    static_argnames=("network", "options"),
)


@pytest.fixture(scope="module", name="params")
def tiny_params():
    return tiny.params()


def begin(params, options, seed, lengths, stop_ids=(-1, -1)):
    """Return the generation after its first token."""
    tokens = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (ROWS, PROMPT))
    return start(
        NETWORK,
        params,
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        jax.random.split(jax.random.key(seed), ROWS),
        jnp.asarray(stop_ids, jnp.int32),
        options=options,
        slots=options.layer_slots(PROMPT, NEW, CONFIG.windows),
        max_out=NEW,
    ), jnp.asarray(tokens, jnp.int32)


def run(params, options, seed, lengths, *, until=NEW, stop_ids=(-1, -1)):
    g, _ = begin(params, options, seed, lengths, stop_ids)
    return advance(
        NETWORK, params, g, jnp.int32(until), jnp.asarray(stop_ids), options=options
    )


def scripted(
    params,
    options,
    seed,
    lengths,
    script,
    modes,
    *,
    until=(NEW,),
    stop_ids=(-1, -1),
    drafter=None,
    prices=None,
):
    """Run with drafts from `script`, stopping at each of `until` on the way."""
    drafter = drafter or Scripted()
    g, tokens = begin(params, options, seed, lengths, stop_ids)
    begun = spec.begin(
        drafter,
        tokens,
        jnp.asarray(lengths, jnp.int32),
        g.last,
        rule=options.accept,
        max_out=NEW,
        pool=jnp.asarray([(seed + row, mode) for row, mode in enumerate(modes)]),
    )
    begun = dataclasses.replace(begun, likeliest=script)
    g = dataclasses.replace(g, speculation=begun)
    options = dataclasses.replace(options, speculate=drafter)
    for end in until:
        g = advance(
            *(NETWORK, params, g, jnp.int32(end), jnp.asarray(stop_ids), prices),
            options=options,
        )
    return g


def check_equal(plain, other):
    for field in ("tokens", "lengths", "done", "last", "position", "seen"):
        a, b = getattr(plain, field), getattr(other, field)
        if a is not None:
            np.testing.assert_array_equal(a, b, err_msg=field)
    for a, b in zip(plain.cache, other.cache, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)
        np.testing.assert_array_equal(a.target, b.target)
        held = np.asarray(a.positions >= 0)
        close = dict(atol=2e-4, rtol=2e-4)
        for field in ("keys", "values"):
            x, y = (np.where(held[..., None], getattr(s, field), 0) for s in (a, b))
            np.testing.assert_allclose(x, y, err_msg=field, **close)
        assert jax.tree.structure(a.memory) == jax.tree.structure(b.memory)
        for x, y in zip(*map(jax.tree.leaves, (a.memory, b.memory)), strict=True):
            if x.shape == held.shape:
                x, y = np.where(held, x, 0), np.where(held, y, 0)
            np.testing.assert_allclose(x, y, err_msg="memory", **close)


lengths_ = st.lists(st.integers(1, PROMPT), min_size=ROWS, max_size=ROWS)
modes_ = st.lists(st.integers(RIGHT, NONE), min_size=ROWS, max_size=ROWS)


@cases
@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**16),
    lengths=lengths_,
    modes=modes_,
    until=st.integers(1, NEW),
    stops=st.lists(st.integers(0, ROWS * NEW - 1), min_size=2, max_size=2),
    stopping=st.booleans(),
)
def test_exact_speculation_equals_plain_whatever_is_drafted(
    params, name, seed, lengths, modes, until, stops, stopping
):
    options = CASES[name]
    script = run(params, options, seed, lengths).tokens
    # Stop ids are tokens that do occur, so that they fall into the middle of drafts.
    stop_ids = (
        tuple(np.asarray(script).ravel()[stops].tolist()) if stopping else (-1, -1)
    )
    wanted = dict(until=until, stop_ids=stop_ids)
    plain = run(params, options, seed, lengths, **wanted)
    wanted["until"] = (max(1, until // 2), until)
    got = scripted(params, options, seed, lengths, script, modes, **wanted)
    check_equal(plain, got)
    text = np.asarray(got.speculation.text)
    for row, length in enumerate(lengths):
        end = length + int(got.lengths[row])
        np.testing.assert_array_equal(
            text[row, length:end], got.tokens[row, : got.lengths[row]]
        )
    counts = got.speculation.counts
    appended = np.asarray(got.lengths) - 1  # the first came with the prompt
    # A step gives one token more than it accepts, unless its own drafts end the row.
    given = counts.steps + counts.accepted.sum(1)
    calls = len(wanted["until"])
    assert (appended <= given).all() and (given <= appended + calls).all()
    assert (counts.accepted <= counts.drafted).all()
    assert (counts.accepted_kinds.sum(1) == counts.accepted.sum(1)).all()
    assert (counts.drafted_kinds.sum(1) == counts.drafted.sum(1)).all()
    assert (np.asarray(counts.accepted)[np.asarray(modes) == WRONG] == 0).all()


@cases
def test_right_drafts_are_all_accepted(params, name):
    options, lengths = CASES[name], [PROMPT, 3, 9]
    script = run(params, options, 1, lengths).tokens
    got = scripted(params, options, 1, lengths, script, [RIGHT] * ROWS)
    counts = got.speculation.counts
    # 23 tokens after the first: four steps of 4 + 1, and one of the last three.
    assert counts.steps.tolist() == [5] * ROWS
    assert counts.tree_steps.tolist() == [5] * ROWS
    assert counts.accepted.tolist() == [[5, 5, 5, 4]] * ROWS
    np.testing.assert_array_equal(got.tokens, script)


AUTO = Scripted(num_draft_tokens=9, break_even="auto")  # in trees of 4 and of 10 nodes


@pytest.mark.parametrize(
    ("prices", "modes", "tree_steps"),
    [
        pytest.param((np.inf, np.inf), [RIGHT] * ROWS, 0, id="never at no price"),
        # 23 tokens after the first, of which a step gives 4 + 1, and the last one 3.
        pytest.param((np.inf, 1.0), [RIGHT] * ROWS, 5, id="always at a plain step's"),
        pytest.param((1.0, np.inf), [RIGHT] * ROWS, 6, id="narrow trees, 3 + 1"),
        pytest.param((1.0, 1.01), [RIGHT] * ROWS, 5, id="what gives more per price"),
        pytest.param((np.inf, 0.0), [NONE] * ROWS, None, id="below: without drafts"),
        pytest.param((1.0, 1.0), [WRONG] * ROWS, 23, id="always, though they fail"),
        pytest.param((1.2, np.inf), [WRONG] * ROWS, None, id="failing, cheap"),
        pytest.param((9.0, np.inf), [WRONG] * ROWS, 0, id="failing, not affordable"),
        pytest.param((1.2, 1.5), [WRONG, RIGHT, MIXED], None, id="rows differ"),
    ],
)
def test_drafts_pay_or_stay_out_of_the_way(params, prices, modes, tree_steps):
    """At any price tokens are plain decoding's; what fails costs a step or so."""
    options, lengths = CASES["full"], [PROMPT, 3, 9]
    script = run(params, options, 1, lengths).tokens
    wanted = dict(drafter=AUTO, prices=jnp.asarray(prices, jnp.float32))
    got = scripted(params, options, 1, lengths, script, modes, **wanted)
    np.testing.assert_array_equal(got.tokens, script)
    taken = np.asarray(got.speculation.counts.tree_steps)
    if tree_steps is not None:
        assert taken.tolist() == [tree_steps] * ROWS
    if modes == [WRONG] * ROWS and min(prices) > 1:
        steps = np.asarray(got.speculation.counts.steps)
        assert (steps + (min(prices) - 1) * taken - 23).max() <= 1 + 0.01 * NEW


def small_drafter(name):
    """Make a drafter of the registry with those of these options that it has."""
    drafter = registry.SPECULATE[name]
    options = dict(
        num_draft_tokens=9,
        depth=4,
        ngram_min=1,
        max_matches=4,
        include_output=True,
        break_even=0.0,
    )
    fields = {f.name for f in dataclasses.fields(drafter)}
    return drafter(**{name: x for name, x in options.items() if name in fields})


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "aligned" else pytest.mark.slow)
        for name in registry.SPECULATE
    ],
)
def test_every_drafter_is_exact(params, name):
    """From prefill to cache, with pseudo tokens and a cache at query-head width."""
    plain = Options(
        budget=10,
        prefill=DapQ(window_size=4, prefix=2, granularity="query_head"),
    )
    options = dataclasses.replace(plain, speculate=small_drafter(name))
    lengths = [PROMPT, 3, 11]
    want, got = run(params, plain, 2, lengths), run(params, options, 2, lengths)
    check_equal(want, got)
    counts = got.speculation.counts
    assert int(counts.accepted.sum()) > 0
    if options.speculate.likeliest:
        assert (counts.unexpected >= 0).all()
        assert (counts.unexpected < jnp.asarray(lengths)).all()


def test_what_takes_drafts_stands_under_the_law():
    """A policy or an exact rule that joins the registry joins `CASES` too."""
    able = {p for p in registry.DECODE.values() if hasattr(p, "attend_tree")}
    assert able == {type(options.decode) for options in CASES.values()}
    exact = {rule for rule in registry.ACCEPT.values() if rule.exact}
    assert exact == {type(options.accept) for options in CASES.values()}


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.PREFILL)
def test_every_prefill_policy_goes_with_drafts(params, name):
    plain = Options(
        budget=PROMPT if name == "full" else 12, prefill=SMALL_PREFILL[name]
    )
    lengths = [PROMPT, 3, 11]
    drafted = dataclasses.replace(plain, speculate=small_drafter("aligned"))
    want, got = run(params, plain, 2, lengths), run(params, drafted, 2, lengths)
    check_equal(want, got)
    assert int(got.speculation.counts.accepted.sum()) > 0


LOOSE = {  # every lossy rule of the registry, so loose that everything passes
    "conditional": Conditional(beta=0, eos_guard=False),
    "fixed-threshold": FixedThreshold(threshold=0, eos_guard=False),
    "top-k": TopK(k=CONFIG.vocab_size),
    "typical": Typical(epsilon=0),
}


def test_every_lossy_rule_is_loose():
    assert LOOSE.keys() == {n for n, rule in registry.ACCEPT.items() if not rule.exact}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "conditional" else pytest.mark.slow)
        for name in LOOSE
    ],
)
def test_a_lossy_rule_changes_the_output_and_no_other_row(params, name):
    plain, lengths = CASES["full"], [PROMPT, 3, 9]
    script = run(params, plain, 1, lengths).tokens
    loose = dataclasses.replace(plain, accept=LOOSE[name])
    modes = [WRONG, RIGHT, MIXED]
    got = scripted(params, loose, 1, lengths, script, modes)
    assert (got.tokens[0] != script[0]).any()
    np.testing.assert_array_equal(got.tokens[1], script[1])
    assert int(got.speculation.counts.accepted[0].sum()) > 0
    modes[2] = NONE
    other = scripted(params, loose, 1, lengths, script, modes)
    np.testing.assert_array_equal(other.tokens[:2], got.tokens[:2])
