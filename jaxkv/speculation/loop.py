"""Speculative decoding: several tokens from one pass through the network.

After "Alignment-Augmented Speculative Decoding with Alignment Sampling and Conditional
Verification" (Wang et al., arXiv 2505.13204), of which only the abstract was available
to us; what it leaves open is our choice. One step, for all rows together:

    while drafts wait:
        append(decode_step())                 as without drafts
    tree    <- drafter.draft(text)            what followed the same words before
    learn from an earlier draft               would it have been right?
    if the trees promise more than they cost:
        pending, logits <- attend_tree(tree)  all nodes in one pass; a node sees the
                                              nodes above it and the cache, less what
                                              would have been evicted on the way to it
        path    <- decide(tree, logits)       the longest on which every token passes
        new     <- tokens of the path, and the one that is chosen behind it
        count   <- len(new), but no further than the first stop id or the limit
        cache   <- commit(pending, path)      as `count` decode steps would have left it
        append(new, count)
        learn, counts <- count(tree, path)
    else: drafts wait

`generation.advance` has the loop; the functions here are its steps. `pace` decides when
drafts wait, and how many nodes of a tree are fed.

With the rule `Exact` this gives, token for token, what plain decoding gives, whatever
is drafted. By induction along the path: the root is plain decoding's newest token. What
a node of the path sees is what plain decoding's cache would hold there, so its logits
are the same, but for rounding; the sampler picks with the same key, which depends on
row and position alone, and the same penalty; and a child passes only if it is that
pick. A lossy rule lets other children pass, and nothing else differs.

Axis letters: `B` batch, `T` nodes of a tree, `D` its depth, `W` width of the text, `P`
padded prompt, `E` stop ids.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv import trees
from jaxkv.attention import Network, attend_tree
from jaxkv.kernels import dispatch, tree_attention
from jaxkv.kernels.decode import Implementation
from jaxkv.policies.base import Speculable
from jaxkv.sampling import Sampler
from jaxkv.sequences import Generation, append, is_stop, write
from jaxkv.speculation import contract, counts, pace
from jaxkv.speculation.counts import Counts
from jaxkv.speculation.drafters import Drafter
from jaxkv.speculation.matching import Context
from jaxkv.speculation.pace import Drafted, Pace
from jaxkv.speculation.rules import Rule
from jaxkv.speculation.verdict import Verdict, decide
from jaxkv.trees import DraftTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculation:
    """What the loop carries beside an ordinary generation.

    Attributes:
      text: int32 `[B, W]`, prompt and output without a gap.
      prompt: int32 `[B]`, tokens of the prompts.
      pool: int32 `[B, 2]`, the span of the prompt that drafts are copied from.
      likeliest: int32 `[B, P, 3]` or None, see `matching.Context`.
      pace: decides what the coming step is.
      counts: statistics.
    """

    text: jax.Array
    prompt: jax.Array
    pool: jax.Array
    likeliest: jax.Array | None
    pace: Pace
    counts: Counts


Drafting = Generation[Speculation]


def begin(
    drafter: Drafter,
    tokens: jax.Array,
    lengths: jax.Array,
    first: jax.Array,
    *,
    rule: Rule,
    max_out: int,
    likeliest: jax.Array | None = None,
    pool: jax.Array | None = None,
) -> Speculation:
    """Return what the loop needs, after the first token of the output.

    Args:
      drafter: static.
      tokens: int32 `[B, P]`, right-padded prompts.
      lengths: int32 `[B]`.
      first: int32 `[B]`, the first token of the output.
      rule: static.
      max_out: size of the output buffer.
      likeliest: int32 `[B, P, 3]`, from `likeliest_tokens`, if the drafter asks.
      pool: int32 `[B, 2]`; None is the whole prompt.
    """
    batch, length = tokens.shape
    rows = jnp.arange(batch, dtype=jnp.int32)
    text = jnp.pad(tokens, ((0, 0), (0, max_out))).at[rows, lengths].set(first)
    unexpected = jnp.full(batch, -1, jnp.int32)
    if likeliest is not None:
        index = jnp.arange(length, dtype=jnp.int32)[None]
        asked = (index > 0) & (index < lengths[:, None])
        unexpected = asked & (likeliest[..., 0] != tokens)
        unexpected = unexpected.sum(-1, dtype=jnp.int32)
    if pool is None:
        pool = jnp.stack([jnp.zeros_like(lengths), lengths], axis=1)
    return Speculation(
        text=text,
        prompt=lengths,
        pool=pool,
        likeliest=likeliest,
        pace=pace.begin(first, lengths, drafter, rule),
        counts=counts.none_yet(unexpected, depth=drafter.depth),
    )


def wait(
    g: Drafting,
    step: Callable[[Drafting], Drafting],
    running: Callable[[Drafting], jax.Array],
) -> Drafting:
    """Take plain steps until some row's drafts have waited long enough.

    Args:
      g: the sequences.
      step: a plain step.
      running: says which rows take it, bool `[B]`.
    """

    def waits(g):
        return pace.waits(g.speculation.pace, running(g))

    def body(g):
        now = pace.passed(g.speculation.pace, running(g))
        s = dataclasses.replace(g.speculation, pace=now)
        return dataclasses.replace(step(g), speculation=s)

    before = g.lengths
    g = jax.lax.while_loop(waits, body, g)
    s = g.speculation
    # What was appended is copied at once, so that a plain step is nothing but that.
    index = jnp.arange(s.text.shape[1], dtype=jnp.int32)[None] - s.prompt[:, None]
    output = (index >= 0) & (index < g.lengths[:, None])
    index = jnp.clip(index, 0, g.tokens.shape[1] - 1)
    s = dataclasses.replace(
        s,
        text=jnp.where(output, jnp.take_along_axis(g.tokens, index, axis=1), s.text),
        counts=counts.count_plain(s.counts, g.lengths - before),
    )
    return dataclasses.replace(g, speculation=s)


def draft(
    drafter: Drafter,
    rule: Rule,
    g: Drafting,
    running: jax.Array,
    prices: jax.Array,
) -> tuple[Drafting, Drafted, jax.Array, jax.Array]:
    """Draft, learn from what was drafted before, and decide the coming step.

    Args:
      drafter: static.
      rule: static.
      g: the sequences.
      running: bool `[B]`, rows that go on.
      prices: float32 `[L]`, of a step of each width, in plain steps.

    Returns:
      The sequences, the drafts, and what `pace.choose` says of them: the rows that
      bring theirs, and the width by its index.
    """
    s = g.speculation
    context = Context(s.text, g.position, s.prompt, s.pool, s.likeliest)
    where: Any = dict(depth=drafter.depth, counts=pace.widths(drafter, rule))
    likely, most = pace.assumed(context, **where)
    tree = contract.draft(drafter, context)
    new = Drafted(
        tree=tree,
        above=trees.ancestors(tree, depth=drafter.depth),
        likely=likely,
        most=most,
        running=running,
        lengths=g.lengths,
        prices=prices,
    )
    seen = pace.watch(s.pace, new, s.text, g.position, exact=rule.exact, **where)
    now, brings, width = pace.choose(seen, new, exact=rule.exact)
    g = dataclasses.replace(g, speculation=dataclasses.replace(s, pace=now))
    return g, new, brings, width


def once_if(
    condition: jax.Array, step: Callable[[Drafting], Drafting], g: Drafting
) -> Drafting:
    """Return `step(g)` or `g`; a loop of one round, because a branch copies the cache.

    The buffers of a branch's result are not those of its arguments, while a loop's are.
    """
    once = (condition, g)

    def body(carry):
        return jnp.zeros_like(carry[0]), step(carry[1])

    return jax.lax.while_loop(lambda carry: carry[0], body, once)[1]


def tree_step(
    network: Network,
    params: Any,
    g: Drafting,
    drafts: Drafted,
    brings: jax.Array,
    until: jax.Array,
    stop_ids: jax.Array,
    *,
    widths: tuple[int, ...],
    depth: int,
    policy: Speculable,
    rule: Rule,
    sampler: Sampler,
    implementation: Implementation | None,
) -> Drafting:
    """Feed the trees, and append what passes: at least one token per running row.

    Args:
      network: static.
      params: its parameters.
      g: the sequences.
      drafts: of them, and which rows take the step.
      brings: bool `[B]`, those of them that bring a draft.
      until: int32 scalar, tokens that no output exceeds, or `[B]`, of each row.
      stop_ids: int32 `[E]`, or `[B, E]`, of each row.
      widths: nodes that are fed, the last, and narrower ones to learn of, static.
      depth: of the deepest node that a tree may have, `D`, static.
      policy: evicts, static.
      rule: says which drafted tokens pass, static.
      sampler: says what plain decoding chooses, static.
      implementation: of plain decoding; the tree's own goes with it.

    Returns:
      The generation. With the exact rule it is what plain steps would give.
    """
    s, running = g.speculation, drafts.running
    tree = pace.within(drafts.tree, widths[-1])
    is_root = jnp.arange(widths[-1], dtype=jnp.int32)[None] == 0
    tree = tree._replace(valid=tree.valid & (brings[:, None] | is_root))
    above = drafts.above[:, : widths[-1], : widths[-1]]
    depth = min(depth, widths[-1] - 1)
    position = jnp.where(running, g.position, -1)
    logits, pending = _attend(
        *(network, params, g.cache, position, tree, above),
        depth=depth,
        policy=policy,
        implementation=implementation,
    )
    verdict = decide(
        *(logits, tree, above, stop_ids),
        rule=rule,
        sampler=sampler,
        position=g.position,
        rngs=g.rngs,
        seen=g.seen,
        running=running,
    )
    path = trees.path_to(verdict.end, tree, above, depth=depth)  # [B, D + 1]
    new = _along(path, tree, verdict)
    # One token more than passed, but no further than the first stop id or the limit,
    # and none that was chosen from something else than numbers.
    order = jnp.arange(depth + 1, dtype=jnp.int32)[None]
    first_stop = jnp.where(is_stop(new, stop_ids), order, depth + 1).min(-1)
    count = 1 + jnp.minimum(verdict.accepted, first_stop)
    count = jnp.where(running, jnp.minimum(count, until - g.lengths), 0)
    picks = jnp.take_along_axis(verdict.picks, path, axis=1)
    chosen = logits[jnp.arange(len(path), dtype=jnp.int32)[:, None], path, picks]
    broken = jnp.where(jnp.isfinite(chosen), depth + 1, order).min(-1)
    finite = g.finite & (broken >= count)
    count = jnp.minimum(count, broken)
    how = dispatch.counterpart(implementation, tree_attention.Implementation)
    cache = tuple(
        trees.commit(state, layer, path, count, position, implementation=how)
        for state, layer in zip(g.cache, pending, strict=True)
    )
    accepted = jnp.minimum(verdict.accepted, count)  # of these, what became output
    passed = jnp.arange(depth + 1, dtype=jnp.int32)[None] <= accepted[:, None]
    limits = jnp.asarray(widths, jnp.int32)
    fits = passed[..., None] & (path[..., None] < limits[None, None])  # [B, D + 1, L]
    right = fits.sum(1, dtype=jnp.int32) - 1  # the root is no draft
    s = dataclasses.replace(
        s,
        text=write(s.text, new, g.position + 1, count),
        pace=pace.after(s.pace, drafts, right, brings, exact=rule.exact),
        counts=counts.count_tree(
            *(s.counts, tree, path, accepted), running=running, brings=brings
        ),
    )
    g = dataclasses.replace(g, cache=cache, finite=finite, speculation=s)

    def along_path():
        return jnp.take_along_axis(logits, path[..., None], axis=1)

    return append(g, new, count, stop_ids, along_path)


def _attend(
    network, params, cache, position, tree, above, *, depth, policy, implementation
):
    """Return the logits behind each node, `[B, T, V]`, and what is pending by layer."""
    attend = attend_tree(
        policy,
        position=position,
        drafts=tree,
        ancestors=above,
        depth=depth,
        implementation=implementation,
    )
    hidden, pending = network.apply(
        {"params": params},
        tree.tokens,
        jnp.maximum(position, 0)[:, None] + tree.depths,
        cache,
        attend,
    )
    return network.apply({"params": params}, hidden, method="unembed"), pending


def _along(path: jax.Array, tree: DraftTree, verdict: Verdict) -> jax.Array:
    """Return the tokens that passed and the one chosen behind them, int32 `[B, D + 1]`.

    Beyond it the entries mean nothing.
    """
    last = jnp.take_along_axis(verdict.picks, verdict.end[:, None], axis=1)
    drafted = jnp.take_along_axis(tree.tokens, path[:, 1:], axis=1)
    new = jnp.concatenate([drafted, last], axis=1)
    order = jnp.arange(new.shape[1], dtype=jnp.int32)[None]
    return jnp.where(order == verdict.accepted[:, None], last, new)
