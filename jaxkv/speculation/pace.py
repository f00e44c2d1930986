"""Whether the coming step takes drafts, and how many: drafts that pay, or none.

A step with a tree gives more tokens than a plain one, and takes longer. Its *price* is
what it takes, in plain steps; it grows with the tree's *width*, the nodes that are fed.
A few widths are compiled. A narrow tree is the first nodes of the wide one, so that a
step with one shows what the narrower ones would have given.

What a tree will give follows from how many of the newest tokens have occurred before:
the longer the match, the likelier is what followed it. That is an assumption, measured
on one network. How far it holds for these drafts and this row is learnt: from steps
with trees, and from *watched* drafts, which are not fed but compared with what comes.

The step that promises the most tokens for its price is taken. Where that is a plain
one, nothing is drafted for a while, because drafts cost something, too: a step at
first, and twice as many each time. Promises may be wrong. So the *balance* of what
drafts have brought is kept, and while it is too low, drafts are watched only, until
they would have paid. Thus drafts that fail cost a plain step and 1 % at most.

Rows of a batch share their steps. With the exact rule they decide together, and a row
that is ahead of the others has less of a say: the last one ends the batch. With a lossy
rule a row's output depends on the kind of its steps, so that each decides alone.

Axis letters: `B` batch, `T` nodes of a tree, `L` widths, `D` depth, `W` width of text.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxkv import trees
from jaxkv.speculation import matching
from jaxkv.speculation.drafters import Drafter
from jaxkv.speculation.matching import Context
from jaxkv.speculation.rules import Rule
from jaxkv.trees import DraftTree

UNMEASURED = 1.35  # price where nobody has measured it
_NARROWEST = 4  # nodes

# Newest tokens that have occurred before, at least, and how likely then each further
# drafted token is right if those before it are. Without a match the drafts come from
# elsewhere, and nothing is known.
_MATCHED = (1, 2, 3, 5, 9)
_RATES = (0.65, 0.35, 0.5, 0.65, 0.75, 0.85)

_MEMORY = 0.9  # share of the old value in the running means
_TRUST = 2.0  # weight of what is assumed, in samples
_LAG = 4.0  # tokens ahead that halve a row's say

_CREDIT = 1.0  # plain steps that drafts may lose at first
_RATE = 0.01  # and more of them with every token
_MOST = 8.0  # that the balance remembers of what was gained
_LIFT = 2.0  # to which watched drafts alone may lift it
_HOPEFUL = 8  # plain steps, at most, after which something is drafted again
_HOPELESS = 8  # the same where not even the best drafts would pay, at first
_LONGEST = 24  # and at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """What decides the coming step.

    Attributes:
      right: float32 `[B, L]`, running sum of tokens that drafts had right.
      promised: float32 `[B, L]`, the same of what was assumed of them.
      balance: float32 `[B]`, what drafts have brought, in plain steps.
      wait: int32 `[B]`, plain steps that the row takes before it drafts again.
      pause: int32 `[B]`, what `wait` becomes when drafts do not pay.
      watched: a draft that is compared with what comes, whatever steps it comes by.
      above: bool `[B, T, T]`, its `trees.ancestors`.
      since: int32 `[B]`, position of its root.
      likely: float32 `[B, L]`, what is assumed of it.
    """

    right: jax.Array
    promised: jax.Array
    balance: jax.Array
    wait: jax.Array
    pause: jax.Array
    watched: DraftTree
    above: jax.Array
    since: jax.Array
    likely: jax.Array


class Drafted(NamedTuple):
    """The newest drafts, and who may use them.

    Attributes:
      tree: the drafts.
      above: bool `[B, T, T]`, their `trees.ancestors`.
      likely: float32 `[B, L]`, tokens of it that are assumed to be right.
      most: float32 `[L]`, the same of the best drafts.
      running: bool `[B]`, rows that take the coming step.
      lengths: int32 `[B]`, tokens of the outputs.
      prices: float32 `[L]`, of a step of each width, in plain steps.
    """

    tree: DraftTree
    above: jax.Array
    likely: jax.Array
    most: jax.Array
    running: jax.Array
    lengths: jax.Array
    prices: jax.Array


def widths(drafter: Drafter, rule: Rule) -> tuple[int, ...]:
    """Return the nodes of the trees that are compiled, roots included, `L` of them.

    Of a number for `break_even` all widths would have the same price. With a lossy rule
    the output depends on the width, and so would on the other rows.

    Args:
      drafter: its trees are the widest.
      rule: says which drafted tokens pass.
    """
    nodes = 1 + drafter.num_draft_tokens
    found = [nodes]
    while drafter.break_even == "auto" and rule.exact and nodes > 2 * _NARROWEST:
        nodes = max(nodes // 4, _NARROWEST)
        found.insert(0, nodes)
    return tuple(found)


def assumed_prices(drafter: Drafter, rule: Rule) -> jax.Array:
    """Return the prices that nobody has measured, float32 `[L]`."""
    even = drafter.break_even
    price = UNMEASURED if isinstance(even, str) else 1.0 + even
    return jnp.full(len(widths(drafter, rule)), price, jnp.float32)


def begin(first: jax.Array, position: jax.Array, drafter: Drafter, rule: Rule) -> Pace:
    """Return what is known before the first step.

    Args:
      first: int32 `[B]`, the first token of the output.
      position: int32 `[B]`, where it stands.
      drafter: static.
      rule: static.
    """
    batch, nodes = len(first), 1 + drafter.num_draft_tokens
    shape = (batch, len(widths(drafter, rule)))
    # A lossy rule lets about twice as many pass.
    share = 0.8 if rule.exact else 2.0
    return Pace(
        right=jnp.full(shape, share * _TRUST, jnp.float32),
        promised=jnp.full(shape, _TRUST, jnp.float32),
        balance=jnp.zeros(batch, jnp.float32),
        wait=jnp.zeros(batch, jnp.int32),
        pause=jnp.ones(batch, jnp.int32),
        watched=trees.root_only(first, nodes=nodes),
        above=jnp.zeros((batch, nodes, nodes), bool),
        since=position,
        likely=jnp.zeros(shape, jnp.float32),
    )


def waits(pace: Pace, running: jax.Array) -> jax.Array:
    """Return whether all running rows wait and some row runs, a bool scalar."""
    return running.any() & ~(running & (pace.wait <= 0)).any()


def passed(pace: Pace, running: jax.Array) -> Pace:
    """Return the pace after a step of the running rows, bool `[B]`."""
    wait = pace.wait - (running & (pace.wait > 0)).astype(jnp.int32)
    return dataclasses.replace(pace, wait=wait)


def within(tree: DraftTree, width: int) -> DraftTree:
    """Return the first `width` nodes of trees, a tree each: parents come first."""
    return DraftTree(*(nodes[:, :width] for nodes in tree))


def assumed(
    context: Context, counts: tuple[int, ...], *, depth: int
) -> tuple[jax.Array, jax.Array]:
    """Return how many tokens of a draft are right, as far as the text tells.

    Args:
      context: what drafts are made from.
      counts: the widths.
      depth: `D`, of the deepest node that a tree may have.

    Returns:
      Those of these drafts, float32 `[B, L]`, and of the best, float32 `[L]`.
    """
    context = matching.with_output(context)
    matched = matching.match_lengths(context, longest=_MATCHED[-1]).max(1)
    longer = matched[:, None] >= jnp.asarray(_MATCHED, jnp.int32)[None]
    kind = longer.sum(1, dtype=jnp.int32)
    reach = [min(nodes - 1, depth) for nodes in counts]
    table = jnp.asarray(
        [[sum(r**k for k in range(1, n + 1)) for n in reach] for r in _RATES],
        jnp.float32,
    )
    return table[kind], table[-1]


def watch(
    pace: Pace,
    new: Drafted,
    text: jax.Array,
    position: jax.Array,
    *,
    depth: int,
    counts: tuple[int, ...],
    exact: bool,
) -> Pace:
    """Learn from the watched drafts that the text has passed, and watch newer ones.

    Args:
      pace: so far.
      new: the newest drafts.
      text: int32 `[B, W]`, prompt and output.
      position: int32 `[B]`, of the newest token.
      depth: `D`, of the deepest node that a tree may have.
      counts: the widths.
      exact: see `choose`.
    """
    old, asked = pace.watched, _asked(pace, new, exact)
    drafted = old.valid[:, 1:].any(1)
    over = asked & drafted & (position >= pace.since + depth)
    at = jnp.minimum(pace.since[:, None] + old.depths, text.shape[1] - 1)
    right = old.valid & (old.tokens == jnp.take_along_axis(text, at, axis=1))
    right |= old.depths == 0
    whole = ~(pace.above & ~right[:, None]).any(-1)
    order = jnp.arange(old.tokens.shape[1], dtype=jnp.int32)
    wide = order[None] < jnp.asarray(counts, jnp.int32)[:, None]  # [L, T]
    reached = jnp.where(whole[:, None] & wide[None], old.depths[:, None], 0).max(-1)

    would = _share(new, jnp.where(over[:, None], reached, 0), exact)
    would = (would + 1 - new.prices[None]).max(1)
    balance, least = pace.balance, -_limit(new, exact) - 1
    balance = jnp.where(
        would > 0,
        jnp.maximum(balance, jnp.minimum(balance + would, _LIFT)),
        jnp.minimum(balance, jnp.maximum(balance + would, least)),
    )
    seen = _share(new, over[:, None], exact)[:, 0] > 0
    pace = _learn(pace, reached, pace.likely, over)
    fresh = asked & (over | ~drafted)

    def newer(new, old):
        return jnp.where(fresh[:, None], new, old)

    return dataclasses.replace(
        pace,
        balance=jnp.where(seen, balance, pace.balance),
        watched=DraftTree(*map(newer, new.tree, old)),
        above=jnp.where(fresh[:, None, None], new.above, pace.above),
        since=jnp.where(fresh, position, pace.since),
        likely=newer(new.likely, pace.likely),
    )


def choose(
    pace: Pace, new: Drafted, *, exact: bool
) -> tuple[Pace, jax.Array, jax.Array]:
    """Decide the coming step, or the coming wait.

    A price of 1 or less is always worth it, an infinite one never.

    Args:
      pace: after `watch`.
      new: the newest drafts.
      exact: whether the rule is, static. If not, each row decides alone.

    Returns:
      The pace; bool `[B]`, which rows bring their drafts; and an int32 scalar, the
      width by its index, `L` for no step with trees.
    """
    asked = _asked(pace, new, exact)
    drafted = asked & new.tree.valid[:, 1:].any(1)
    holds = pace.right / pace.promised
    hoped = jnp.where(drafted[:, None], new.likely * holds, 0)
    gain = (1 + _share(new, hoped, exact)) / jnp.maximum(new.prices, 1e-6)[None]
    width = jnp.argmax(gain, axis=1).astype(jnp.int32)
    gain = gain.max(1)
    limit = _limit(new, exact)
    affords = pace.balance + 1 - new.prices[width] >= -limit
    some = _share(new, drafted[:, None], exact)[:, 0] > 0
    pays = ((gain > 1) | ((gain >= 1) & some)) & affords
    could = 1 + _share(new, new.most[None] * holds, exact) >= new.prices[None]
    hopeful = could.any(1) & affords
    pause = jnp.where(hopeful, pace.pause, jnp.maximum(pace.pause, _HOPELESS))
    decides = new.running.any() if exact else asked
    pays, stops = decides & pays, decides & ~pays
    longer = jnp.minimum(2 * pause, jnp.where(hopeful, _HOPEFUL, _LONGEST))
    pace = dataclasses.replace(
        pace,
        wait=jnp.where(stops, pause, jnp.where(pays, 0, pace.wait)),
        pause=jnp.where(pays, 1, jnp.where(stops, longer, pace.pause)),
    )
    step = jnp.where(pays.any(), width.max(), len(new.prices)).astype(jnp.int32)
    return pace, drafted & pays, step


def after(
    pace: Pace, new: Drafted, right: jax.Array, brings: jax.Array, *, exact: bool
) -> Pace:
    """Return the pace after a step with trees.

    Args:
      pace: before it.
      new: its drafts.
      right: int32 `[B, n]`, tokens that passed, with trees of the `n` narrowest widths,
        the last of which were fed.
      brings: bool `[B]`, rows that brought theirs.
      exact: see `choose`.
    """
    width = right.shape[1]
    gained = _share(new, jnp.where(brings, right[:, -1], 0)[:, None], exact)[:, 0]
    balance = pace.balance + gained + 1 - new.prices[width - 1]
    paid = brings | exact
    pace = _learn(pace, right, new.likely[:, :width], brings)
    balance = jnp.where(paid, jnp.minimum(balance, _MOST), pace.balance)
    return passed(dataclasses.replace(pace, balance=balance), new.running)


def _learn(pace, right, likely, drafted):
    """Note how many drafted tokens were right, of the narrowest widths `[B, n]`."""
    known = (slice(None), slice(right.shape[1]))

    def mean(total, sample):
        old = total[known]
        new = _MEMORY * old + (1 - _MEMORY) * sample.astype(jnp.float32)
        return total.at[known].set(jnp.where(drafted[:, None], new, old))

    return dataclasses.replace(
        pace, right=mean(pace.right, right), promised=mean(pace.promised, likely)
    )


def _asked(pace, new, exact):
    """Return the rows that decide, bool `[B]`."""
    return new.running if exact else new.running & (pace.wait <= 0)


def _share(new, values, exact):
    """Return the mean of `[B, n]` over the rows that decide together, for each row."""
    values = values.astype(jnp.float32)
    if not exact:
        return values
    last = jnp.where(new.running, new.lengths, jnp.iinfo(jnp.int32).max).min()
    ahead = jnp.maximum(new.lengths - last, 0).astype(jnp.float32)
    say = jnp.where(new.running, 1 / (1 + ahead / _LAG), 0)[:, None]
    mean = (say * values).sum(0, keepdims=True) / jnp.maximum(say.sum(), 1e-6)
    return jnp.broadcast_to(mean, values.shape)


def _limit(new, exact):
    """Return how far below 0 the balance may be, float32 `[B]`."""
    tokens = new.lengths.astype(jnp.float32)[:, None]
    return _CREDIT + _RATE * _share(new, tokens, exact)[:, 0]
