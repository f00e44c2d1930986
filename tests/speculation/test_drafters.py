"""Matching and trees of drafts, against slow oracles that share no code with them."""

import collections
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxkv.fields import check_types
from jaxkv.speculation import matching, merging
from jaxkv.speculation.drafters import Aligned, PromptLookup, Tree
from jaxkv.speculation.matching import Context
from jaxkv.speculation.merging import Sequences
from jaxkv.trees import ALIGNED, KINDS, SAMPLED, UNALIGNED, UNCHECKED

WIDTH, PROMPT, ROWS = 24, 16, 3

draft = jax.jit(lambda drafter, context: drafter.draft(context), static_argnums=0)


@functools.partial(jax.jit, static_argnames=("longest", "shortest", "most", "order"))
def longest_matches(context, **options):
    return matching.longest_matches(context, **options)


def random_context(seed, vocabulary=3):
    """Rows of few different tokens, so that matches of every length occur."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(1, PROMPT + 1, ROWS)
    start = rng.integers(0, prompt)
    return Context(
        text=jnp.asarray(rng.integers(0, vocabulary, (ROWS, WIDTH)), jnp.int32),
        position=jnp.asarray(rng.integers(prompt, WIDTH), jnp.int32),
        prompt=jnp.asarray(prompt, jnp.int32),
        pool=jnp.asarray(np.stack([start, prompt], 1), jnp.int32),
        likeliest=jnp.asarray(
            np.argsort(rng.random((ROWS, PROMPT, max(3, vocabulary))))[..., :3],
            jnp.int32,
        ),
    )


def context_of(text, *, prompt, pool=None, likeliest=None):
    pool = (0, prompt) if pool is None else pool
    padded = np.full((1, WIDTH), 99)
    padded[0, : len(text)] = text
    return Context(
        text=jnp.asarray(padded, jnp.int32),
        position=jnp.asarray([len(text) - 1], jnp.int32),
        prompt=jnp.asarray([prompt], jnp.int32),
        pool=jnp.asarray([pool], jnp.int32),
        likeliest=None if likeliest is None else jnp.asarray([likeliest], jnp.int32),
    )


def oracle_ends(text, pool, *, longest, shortest):
    """Try every n from the longest on: the ends of all occurrences, in order."""
    first, after = pool
    for n in range(longest, shortest - 1, -1):
        wanted = text[len(text) - n :] if n <= len(text) else None
        ends = [
            end
            for end in range(first + n - 1, min(after - 1, len(text) - 1))
            if text[end - n + 1 : end + 1] == wanted
        ]
        if wanted is not None and ends:
            return ends
    return []


def row_of(context, row):
    position = int(context.position[row])
    text = np.asarray(context.text)[row, : position + 1].tolist()
    return text, tuple(int(x) for x in context.pool[row])


@pytest.mark.parametrize("order", ["latest", "earliest"])
@pytest.mark.parametrize("output", [False, True])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**20))
def test_longest_matches(order, output, seed):
    context = random_context(seed)
    if output:
        context = matching.with_output(context)
    found = longest_matches(context, longest=4, shortest=2, most=3, order=order)
    for row in range(ROWS):
        text, pool = row_of(context, row)
        want = oracle_ends(text, pool, longest=4, shortest=2)
        want = (want[::-1] if order == "latest" else want)[:3]
        assert [e for e in found[row].tolist() if e >= 0] == want


def oracle_tree(sequences, nodes, main=None):
    """Count every beginning, sort by the rule, keep the first: {path: kind}."""
    count, first, kind = collections.Counter(), {}, {}
    for q, (tokens, kinds, copied) in enumerate(sequences):
        for r in range(1, len(tokens) + 1):
            path = tuple(tokens[:r])
            count[path] += copied
            if path not in first:
                first[path], kind[path] = q, kinds[r - 1]

    def key(path):
        return (-count[path], len(path), first[path])

    order = sorted(first, key=key)
    if main is not None:
        frequent = [path for path in order if count[path]]
        kept = set(frequent[:main])

        def group(path):
            beginnings = [path[:r] for r in range(1, len(path) + 1)]
            good = all(b in kept for b in beginnings if count[b])
            return (0 if good else 2) if count[path] else (1 if good else 3)

        order = sorted(first, key=lambda path: (group(path), *key(path)))
    return {path: kind[path] for path in order[:nodes]}


def paths_of(tree, row=0):
    """Read a tree back: {path: kind}; parents come first, and siblings differ."""
    tokens, parents, depths, valid, kinds = (np.asarray(x)[row] for x in tree)
    assert valid[0] and depths[0] == 0
    paths, found = [()], {}
    for node in range(1, len(tokens)):
        assert parents[node] < node
        paths.append((*paths[parents[node]], int(tokens[node])))
        if valid[node]:
            assert valid[parents[node]]
            assert depths[node] == len(paths[node])
            assert paths[node] not in found
            found[paths[node]] = int(kinds[node])
    return found


merge = jax.jit(merging.merge, static_argnames=("nodes", "main"))


@pytest.mark.parametrize("main", [None, 3])
@settings(max_examples=25)
@given(seed=st.integers(0, 2**20))
def test_merge(main, seed):
    rng = np.random.default_rng(seed)
    number, length = 6, 4
    tokens = rng.integers(0, 2, (number, length))
    lengths = rng.integers(0, length + 1, number)
    kinds = rng.integers(0, len(KINDS), (number, length))
    copied = np.arange(number) < (number if main is None else 3)
    tree = merge(
        jnp.asarray([7], jnp.int32),
        Sequences(
            jnp.asarray(tokens[None], jnp.int32),
            jnp.asarray((np.arange(length) < lengths[:, None])[None]),
            jnp.asarray(kinds[None], jnp.int32),
            jnp.asarray(copied[None]),
        ),
        nodes=7,
        main=main,
    )
    rows = [
        (tokens[q, : lengths[q]].tolist(), kinds[q].tolist(), bool(copied[q]))
        for q in range(number)
    ]
    got, want = paths_of(tree), oracle_tree(rows, 7, main)
    assert got == want
    assert list(got) == list(want)  # in the same order
    assert tree.tokens[0, 0] == 7


def test_tree_by_hand():
    #          0  1  2  3  4  5  6  7  8  9
    context = context_of([1, 2, 3, 4, 1, 2, 3, 5, 1, 2], prompt=8)
    prompt = dict(include_output=False)
    tree = Tree(num_draft_tokens=5, depth=3, ngram_max=4, ngram_min=1, **prompt)
    got = paths_of(draft(tree, context))
    # (1, 2) has occurred twice: both go on with 3, the later one with 5.
    assert list(got) == [(3,), (3, 5), (3, 4), (3, 4, 1)]
    assert set(got.values()) == {UNCHECKED}


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"ngram_min": 3}, []),  # only two tokens have occurred before
        ({"max_matches": 1}, [(3,), (3, 5)]),
        ({"depth": 1}, [(3,)]),
        ({"num_draft_tokens": 2}, [(3,), (3, 5)]),
        ({"ngram_max": 1}, [(3,), (3, 5), (3, 4), (3, 4, 1)]),
        ({"include_output": True}, [(3,), (3, 5), (3, 4), (3, 5, 1), (3, 4, 1)]),
    ],
)
def test_options_of_the_tree(options, want):
    context = context_of([1, 2, 3, 4, 1, 2, 3, 5, 1, 2], prompt=8)
    usual = dict(num_draft_tokens=5, depth=3, ngram_max=4, ngram_min=1)
    usual |= dict(include_output=False)
    drafter = Tree(**(usual | options))
    assert list(paths_of(draft(drafter, context))) == want


def test_the_pool_bounds_matches_and_copies():
    text = [1, 2, 3, 4, 1, 2, 5, 6, 1, 2]
    whole = context_of(text, prompt=8)
    span = context_of(text, prompt=8, pool=(1, 4))
    drafter = Tree(num_draft_tokens=4, depth=4, ngram_min=1, include_output=False)
    assert (5, 6) in paths_of(draft(drafter, whole))
    assert list(paths_of(draft(drafter, span))) == [(3,), (3, 4)]  # after 2 alone
    two = Tree(num_draft_tokens=4, depth=4, ngram_min=2, include_output=False)
    assert paths_of(draft(two, span)) == {}  # the 1 lies outside


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, [3, 4, 1]),  # the earliest, as transformers and vLLM have it
        ({"match": "latest"}, [3, 5, 1]),
        ({"match": "latest", "include_output": False}, [3, 5]),
        ({"ngram_min": 3}, []),
        ({"num_draft_tokens": 1}, [3]),
    ],
)
def test_prompt_lookup(options, want):
    context = context_of([1, 2, 3, 4, 1, 2, 3, 5, 1, 2], prompt=8)
    drafter = PromptLookup(**({"num_draft_tokens": 3} | options))
    tree = draft(drafter, context)
    assert list(paths_of(tree)) == [tuple(want[:n]) for n in range(1, len(want) + 1)]


def test_prompt_lookup_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    generator = pytest.importorskip("transformers.generation.candidate_generator")
    rng = np.random.default_rng(0)
    for options in (dict(ngram_max=2), dict(ngram_max=4, num_draft_tokens=5)):
        drafter = PromptLookup(**options)
        theirs = generator.PromptLookupCandidateGenerator(
            num_output_tokens=drafter.num_draft_tokens,
            max_matching_ngram_size=drafter.ngram_max,
            max_length=1000,
        )
        for _ in range(40):
            text = rng.integers(0, 4, int(rng.integers(5, WIDTH)))
            found, _ = theirs.get_candidates(torch.tensor(text)[None])
            tree = draft(drafter, context_of(text, prompt=3))
            got = np.asarray(tree.tokens[0, 1:])[np.asarray(tree.valid[0, 1:])]
            assert got.tolist() == found[0, len(text) :].tolist()


def test_aligned_by_hand():
    #            0  1  2  3  4  5
    text = [1, 2, 3, 4, 1, 2]
    likeliest = [(0, 0, 0), (2, 8, 9), (7, 3, 8), (4, 8, 9), (6, 5, 1)]
    context = context_of(text, prompt=5, likeliest=likeliest)
    options = dict(num_draft_tokens=9, depth=3, ngram_min=2)
    leaf = paths_of(draft(Aligned(**options), context))
    # Position 2 holds 3, but 7 was likelier (and 8 is the next one that is not 3);
    # position 3 is as expected; position 4 holds 1, where 6 and 5 were likelier.
    assert leaf == {
        (3,): UNALIGNED,
        (3, 4): ALIGNED,
        (3, 4, 1): UNALIGNED,
        (7,): SAMPLED,
        (8,): SAMPLED,
        (3, 4, 6): SAMPLED,
        (3, 4, 5): SAMPLED,
    }
    assert paths_of(draft(Aligned(num_alternatives=1, **options), context)) == {
        path: kind for path, kind in leaf.items() if path not in ((8,), (3, 4, 5))
    }
    more = options | {"num_draft_tokens": 15}
    tail = paths_of(draft(Aligned(tail=True, **more), context))
    assert tail[7, 4] == ALIGNED and tail[8, 4] == ALIGNED
    assert leaf.items() <= tail.items()
    few = draft(Aligned(num_main=1, **options | {"num_draft_tokens": 4}), context)
    assert list(paths_of(few)) == [(3,), (7,), (8,), (3, 4)]


def oracle_aligned(context, row, drafter):
    """Build the sequences of one row with lists, then the tree."""
    text, pool = row_of(context, row)
    prompt, likeliest = int(context.prompt[row]), np.asarray(context.likeliest)[row]
    ends = oracle_ends(
        text, pool, longest=drafter.ngram_max, shortest=drafter.ngram_min
    )
    sequences, varied = [], []
    for m, end in enumerate(ends[::-1][: drafter.max_matches]):
        index = range(end + 1, min(end + 1 + drafter.depth, pool[1]))
        tokens, kinds = [text[i] for i in index], []
        for i in index:
            if not 0 < i < prompt:
                kinds.append(UNCHECKED)
            else:
                kinds.append(ALIGNED if likeliest[i, 0] == text[i] else UNALIGNED)
        sequences.append((tokens, kinds, True))
        for r, i in enumerate(index):
            if m >= drafter.sources or kinds[r] != UNALIGNED:
                continue
            others = [int(t) for t in likeliest[i] if t != text[i]]
            for other in others[: drafter.num_alternatives]:
                rest = slice(r + 1, len(tokens) if drafter.tail else r + 1)
                varied.append(
                    (
                        [*tokens[:r], other, *tokens[rest]],
                        [*kinds[:r], SAMPLED, *kinds[rest]],
                        False,
                    )
                )
    main = drafter.num_draft_tokens - drafter.num_draft_tokens // 3
    return oracle_tree(sequences + varied, drafter.num_draft_tokens, main)


@pytest.mark.parametrize("tail", [False, True])
@settings(max_examples=20)
@given(seed=st.integers(0, 2**20))
def test_aligned(tail, seed):
    drafter = Aligned(
        num_draft_tokens=8,
        depth=3,
        ngram_max=3,
        ngram_min=1,
        max_matches=3,
        tail=tail,
        include_output=False,
    )
    context = random_context(seed, vocabulary=4)
    tree = draft(drafter, context)
    for row in range(ROWS):
        got, want = paths_of(tree, row), oracle_aligned(context, row, drafter)
        assert got == want
        assert list(got) == list(want)


@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        (PromptLookup(num_draft_tokens=0), "num_draft_tokens must be at least 1"),
        (PromptLookup(ngram_min=0), "ngram_min must be at least 1"),
        (PromptLookup(ngram_max=1, ngram_min=2), "less than"),
        (PromptLookup(break_even=-1.0), "break_even"),
        (Tree(depth=0), "depth must be at least 1"),
        (Tree(max_matches=0), "max_matches must be at least 1"),
        (Tree(max_matches=257), "be at least 1 and at most 256, got 257"),
        (Tree(num_draft_tokens=10**9), "num_draft_tokens must be .* at most 1023"),
        (Tree(depth=65), "depth must be .* at most 64"),
        (PromptLookup(ngram_max=129), "ngram_max must be .* at most 128"),
        (Tree(break_even=float("nan")), "break_even takes a number or auto, got nan"),
        (Aligned(num_alternatives=3), "num_alternatives must be .* at most 2"),
        (Aligned(sources=0), "sources must be at least 1"),
        (Aligned(sources=33), "sources must be in .1, max_matches=32., got 33"),
        (Aligned(num_main=64), "num_main must be in"),
    ],
)
def test_bad_options(drafter, message):
    with pytest.raises(ValueError, match=message):
        check_types(drafter)
        drafter.check()
    type(drafter)().check()
