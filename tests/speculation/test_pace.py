"""When drafts are tried: what is promised, what is affordable, and what is learnt."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import Aligned, Conditional, Exact, PromptLookup, Tree, trees
from jaxkv.speculation import pace
from jaxkv.speculation.matching import Context
from jaxkv.trees import DraftTree

NEVER = math.inf
DRAFTER = Tree(num_draft_tokens=15, depth=4)  # in trees of 4 and of 16 nodes
DEPTH, COUNTS = 4, (4, 16)


@pytest.mark.parametrize(
    ("drafter", "rule", "wanted"),
    [
        (Tree(num_draft_tokens=63), Exact(), (4, 16, 64)),
        (Tree(), Exact(), (4, 16)),
        (PromptLookup(), Exact(), (4, 11)),
        (Aligned(num_draft_tokens=7), Exact(), (8,)),
        (Tree(num_draft_tokens=1), Exact(), (2,)),
        (Tree(break_even=0.3), Exact(), (16,)),
        (Tree(), Conditional(), (16,)),
    ],
)
def test_widths(drafter, rule, wanted):
    assert pace.widths(drafter, rule) == wanted
    assert pace.assumed_prices(drafter, rule).shape == (len(wanted),)


def test_assumed_prices():
    assert pace.assumed_prices(Tree(break_even=0.25), Exact()).tolist() == [1.25]
    assert pace.assumed_prices(Tree(break_even=NEVER), Exact()).tolist() == [NEVER]
    assert (pace.assumed_prices(Tree(), Exact()) == np.float32(pace.UNMEASURED)).all()


def test_longer_matches_promise_more():
    text = np.array([[5, 6, 7, 9, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 1]], np.int32)
    context = Context(
        text=jnp.asarray(text),
        position=jnp.asarray([6, 7], jnp.int32),
        prompt=jnp.asarray([8, 8], jnp.int32),
        pool=jnp.asarray([[0, 8], [0, 8]], jnp.int32),
        likeliest=None,
    )
    likely, most = pace.assumed(context, (2, 4, 16), depth=4)
    # Three tokens have occurred before in the first row, one in the second.
    for row, rate in zip(likely, (0.65, 0.35), strict=True):
        sums = np.cumsum(rate ** np.arange(1, 5))
        np.testing.assert_allclose(row, sums[[0, 2, 3]], rtol=1e-6)
    assert (most[None] >= likely).all()


def chain(rows, there=True, token=7):
    """Return trees of 16 nodes, of which a chain of four is drafted."""
    order = jnp.arange(16, dtype=jnp.int32)
    wide = jnp.zeros((rows, 16), jnp.int32)
    here = jnp.asarray(there).reshape(-1, 1) & (order[None] <= 4) | (order[None] == 0)
    return DraftTree(
        tokens=wide + token,
        parents=wide + jnp.where(order <= 4, jnp.maximum(order - 1, 0), 0)[None],
        depths=wide + jnp.where(order <= 4, order, 1)[None],
        valid=jnp.broadcast_to(here, wide.shape),
        kinds=wide,
    )


def newest(
    prices, *, rows=1, there=True, likely=(1.5, 2.0), lengths=None, running=None
):
    tree = chain(rows, there)
    return pace.Drafted(
        tree=tree,
        above=trees.ancestors(tree, depth=DEPTH),
        likely=jnp.broadcast_to(jnp.asarray(likely, jnp.float32), (rows, 2)),
        most=jnp.asarray((2.0, 3.0), jnp.float32),
        running=jnp.ones(rows, bool) if running is None else jnp.asarray(running),
        lengths=jnp.asarray([1] * rows if lengths is None else lengths, jnp.int32),
        prices=jnp.asarray(prices, jnp.float32),
    )


def begun(rows=1, **fields):
    """Return a pace at position 10 that trusts what is assumed."""
    first = jnp.zeros(rows, jnp.int32)
    start = pace.begin(first, first + 10, DRAFTER, Exact())
    fields = {"right": start.promised} | fields
    return dataclasses.replace(start, **fields)


PLAIN = 2  # the index behind the last width


@pytest.mark.parametrize(
    ("prices", "there", "balance", "step", "wait"),
    [
        ((NEVER, NEVER), True, 0.0, PLAIN, 8),
        ((1.0, NEVER), True, 0.0, 0, 0),
        ((1.0, 1.0), False, 0.0, PLAIN, 1),
        ((NEVER, 0.0), False, 0.0, 1, 0),
        ((1.2, 1.4), True, 0.0, 1, 0),  # 2.5 / 1.2 < 3 / 1.4
        ((1.2, 1.5), True, 0.0, 0, 0),
        ((1.2, 1.4), False, 0.0, PLAIN, 1),  # no draft now, but they would pay
        ((1.9, 2.9), True, -0.2, PLAIN, 8),  # more than may be lost
        ((2.6, 3.5), True, 9.0, PLAIN, 1),  # the best drafts would pay
        ((3.1, 4.1), True, 9.0, PLAIN, 8),  # not even they
    ],
)
def test_choice(prices, there, balance, step, wait):
    start = begun(balance=jnp.asarray([balance], jnp.float32))
    now, brings, width = pace.choose(start, newest(prices, there=there), exact=True)
    assert int(width) == step
    assert brings.tolist() == [there and step != PLAIN]
    assert now.wait.tolist() == [wait]
    assert now.pause.tolist() == [2 * wait or 1]


def test_a_step_at_a_plain_ones_price_is_taken_without_hope():
    start, new = begun(right=jnp.zeros((1, 2), jnp.float32)), newest((NEVER, 1.0))
    assert int(pace.choose(start, new, exact=True)[2]) == 1


@pytest.mark.parametrize(
    ("prices", "there", "wanted"),
    [
        ((NEVER, NEVER), True, [8, 16, 24, 24]),
        ((1.2, 1.4), False, [1, 2, 4, 8, 8]),  # as soon as there is one, it pays
    ],
)
def test_waits_grow_up_to_a_bound(prices, there, wanted):
    now, new, waits = begun(), newest(prices, there=there), []
    for _ in wanted:
        now, *_ = pace.choose(now, new, exact=True)
        waits.append(int(now.wait[0]))
        for left in range(waits[-1], 0, -1):
            assert bool(pace.waits(now, new.running)) and int(now.wait[0]) == left
            now = pace.passed(now, new.running)
        assert not pace.waits(now, new.running)
    assert waits == wanted


def test_a_row_ahead_has_less_of_a_say():
    there = np.array([True, False])
    level = newest((NEVER, 1.8), rows=2, there=there)
    # Half of the rows promise 2 tokens: 1 + 2 / 2 for 1.8 plain steps.
    _, brings, width = pace.choose(begun(2), level, exact=True)
    assert (int(width), brings.tolist()) == (1, [True, False])
    ahead = newest((NEVER, 1.8), rows=2, there=there, lengths=[9, 1])
    assert int(pace.choose(begun(2), ahead, exact=True)[2]) == PLAIN
    done = newest((NEVER, 1.8), rows=2, there=there, running=[True, False])
    assert int(pace.choose(begun(2), done, exact=True)[2]) == 1


def test_with_a_lossy_rule_each_row_decides_alone():
    new = newest((NEVER, 1.8), rows=3, there=np.array([True, False, True]))
    start = begun(3, wait=jnp.asarray([0, 0, 5], jnp.int32))
    now, brings, width = pace.choose(start, new, exact=False)
    assert (int(width), brings.tolist()) == (1, [True, False, False])
    assert now.wait.tolist() == [0, 1, 5]
    for row in range(3):  # as if alone
        one = newest((NEVER, 1.8), there=bool(new.tree.valid[row, 1]))
        alone, *_ = pace.choose(begun(wait=start.wait[row : row + 1]), one, exact=False)
        assert alone.wait[0] == now.wait[row]


@pytest.mark.parametrize(
    ("passed", "right", "balance"),
    [
        (3, None, 0.0),  # the draft's end is not reached yet
        (4, [3, 4], 1.0),  # 4 + 1 - 4
        (4, [2, 2], -1.0),  # 2 + 1 - 4
        (4, [0, 0], -2.01),  # no lower than one step below what may be lost
    ],
)
def test_watched_drafts_are_compared_with_what_comes(passed, right, balance):
    new = newest((NEVER, 4.0))
    where = dict(depth=DEPTH, counts=COUNTS, exact=True)
    text = np.full((1, 32), 7, np.int32)
    if right is not None and right[1] < 4:
        text[0, 10 + right[1] + 1] = 8
    start = begun()
    watched = pace.watch(start, new, jnp.asarray(text), start.since, **where)
    assert watched.balance.tolist() == [0.0] and watched.watched.valid[0, 4]
    at = start.since + passed
    got = pace.watch(watched, new, jnp.asarray(text), at, **where)
    np.testing.assert_allclose(got.balance, [balance], rtol=1e-6)
    assert int(got.since[0]) == (10 if right is None else 10 + passed)
    learnt = [2.0, 2.0] if right is None else 0.9 * 2 + 0.1 * np.array(right)
    np.testing.assert_allclose(got.right[0], learnt, rtol=1e-6)


def test_watched_drafts_lift_the_balance_so_far_only():
    new = newest((NEVER, 1.5))
    where = dict(depth=DEPTH, counts=COUNTS, exact=True)
    text, at = jnp.full((1, 32), 7, jnp.int32), jnp.asarray([14], jnp.int32)
    for before, wanted in ((-1.0, 2.0), (5.0, 5.0)):
        # 4 + 1 - 1.5
        balance = jnp.asarray([before], jnp.float32)
        start = begun(watched=chain(1), above=new.above, balance=balance)
        assert pace.watch(start, new, text, at, **where).balance.tolist() == [wanted]


@pytest.mark.parametrize("exact", [True, False])
def test_steps_with_trees_are_paid_for(exact):
    new = newest((1.5, 2.5), rows=2)
    right = jnp.asarray([[3], [0]], jnp.int32)
    brings = jnp.asarray([True, False])
    got = pace.after(begun(2), new, right, brings, exact=exact)
    # Together two rows have gained 3 tokens; alone, the second has paid nothing.
    wanted = [1.0, 1.0] if exact else [2.5, 0.0]
    np.testing.assert_allclose(got.balance, wanted)
    np.testing.assert_allclose(got.right, [[1.8 + 0.3, 2.0], [2.0, 2.0]], rtol=1e-6)
    np.testing.assert_allclose(got.promised, [[1.8 + 0.15, 2.0], [2.0, 2.0]], rtol=1e-6)


def test_a_narrow_tree_is_a_tree():
    narrow = pace.within(chain(2), 3)
    assert narrow.tokens.shape == (2, 3)
    assert (
        trees.ancestors(narrow, depth=2)[0].tolist() == np.tri(3, dtype=bool).tolist()
    )
