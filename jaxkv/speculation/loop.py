"""Speculative decoding: several tokens from one pass through the network.

After "Alignment-Augmented Speculative Decoding with Alignment Sampling and Conditional
Verification" (Wang et al., arXiv 2505.13204), of which only the abstract was available
to us; what it leaves open is our choice. One step, for all rows together:

    tree    <- drafter.draft(text)            what followed the same words before
    if the trees promise less than they cost:
        append(decode_step())                 as without drafts
        hope <- would the draft have had it?
    else:
        pending, logits <- attend_tree(tree)  all nodes in one pass; a node sees the
                                              nodes above it and the cache, less what
                                              would have been evicted on the way to it
        path    <- decide(tree, logits)       the longest on which every token passes
        new     <- tokens of the path, and the one that is chosen behind it
        count   <- len(new), but no further than the first stop id or the limit
        cache   <- commit(pending, path)      as `count` decode steps would have left it
        append(new, count)
        hope, counts <- count(tree, path)

`generation.advance` has the loop; the functions here are its steps.

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
from jaxkv.speculation import contract, counts
from jaxkv.speculation.counts import Counts
from jaxkv.speculation.drafters import Drafter
from jaxkv.speculation.matching import Context
from jaxkv.speculation.rules import Rule
from jaxkv.speculation.verdict import Verdict, decide
from jaxkv.trees import DraftTree

HOPE = 1.0  # accepted tokens per step that are expected of a row not yet tried
_MEMORY = 0.75  # share of the old value in the running mean of accepted tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculation:
    """What the loop carries beside an ordinary generation.

    Attributes:
      text: int32 `[B, W]`, prompt and output without a gap.
      prompt: int32 `[B]`, tokens of the prompts.
      pool: int32 `[B, 2]`, the span of the prompt that drafts are copied from.
      likeliest: int32 `[B, P, 3]` or None, see `matching.Context`.
      tree: drafts for the coming step.
      hope: float32 `[B]`, running mean of the accepted tokens of a step with a draft;
        in plain steps, of whether a draft's first token would have been right.
      counts: statistics.
    """

    text: jax.Array
    prompt: jax.Array
    pool: jax.Array
    likeliest: jax.Array | None
    tree: DraftTree
    hope: jax.Array
    counts: Counts


Drafting = Generation[Speculation]


def begin(
    drafter: Drafter,
    tokens: jax.Array,
    lengths: jax.Array,
    first: jax.Array,
    *,
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
        tree=trees.root_only(first, nodes=1 + drafter.num_draft_tokens),
        hope=jnp.full(batch, HOPE, jnp.float32),
        counts=counts.none_yet(unexpected, depth=drafter.depth),
    )


def draft(drafter: Drafter, g: Drafting) -> Drafting:
    """Return the generation with drafts for the coming step."""
    s = g.speculation
    tree = contract.draft(
        drafter, Context(s.text, g.position, s.prompt, s.pool, s.likeliest)
    )
    return dataclasses.replace(g, speculation=dataclasses.replace(s, tree=tree))


def worth_trying(drafter: Drafter, g: Drafting) -> jax.Array:
    """Return which rows have a draft, and hope enough for it, bool `[B]`."""
    s = g.speculation
    return s.tree.valid[:, 1:].any(1) & (s.hope >= drafter.break_even)


def pays(
    drafter: Drafter, rule: Rule, g: Drafting, running: jax.Array, brings: jax.Array
) -> jax.Array:
    """Return whether the coming step is one with trees, a bool scalar.

    Args:
      drafter: static.
      rule: static.
      g: with its drafts.
      running: bool `[B]`, rows that take the step.
      brings: bool `[B]`, those of them that bring a draft.
    """
    if not rule.exact:
        # A row's output must not depend on the rows beside it, and with a lossy rule it
        # does depend on the kind of the step.
        return brings.any()
    hoped = jnp.where(brings, g.speculation.hope, 0.0).sum()
    price = drafter.break_even * running.sum(dtype=jnp.int32).astype(jnp.float32)
    return brings.any() & (hoped >= price)


def learn(g: Drafting, running: jax.Array) -> Drafting:
    """Note what a plain step has shown: whether the draft would have had the token.

    Args:
      g: after the step.
      running: bool `[B]`, rows that took it.
    """
    s = g.speculation
    first = s.tree.valid & (s.tree.depths == 1)
    drafted = running & first.any(-1)
    right = (first & (s.tree.tokens == g.last[:, None])).any(-1)
    s = dataclasses.replace(
        s,
        text=write(s.text, g.last[:, None], g.position, running.astype(jnp.int32)),
        hope=jnp.where(drafted, _mean(s.hope, right), s.hope),
        counts=counts.count_plain(s.counts, running),
    )
    return dataclasses.replace(g, speculation=s)


def tree_step(
    network: Network,
    params: Any,
    g: Drafting,
    until: jax.Array,
    stop_ids: jax.Array,
    running: jax.Array,
    brings: jax.Array,
    *,
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
      g: with its drafts.
      until: int32 scalar, tokens that no output exceeds.
      stop_ids: int32 `[E]`.
      running: bool `[B]`, rows that take the step.
      brings: bool `[B]`, those of them that bring a draft.
      depth: of the deepest node that a tree may have, `D`, static.
      policy: evicts, static.
      rule: says which drafted tokens pass, static.
      sampler: says what plain decoding chooses, static.
      implementation: of plain decoding; the tree's own goes with it.

    Returns:
      The generation. With the exact rule it is what plain steps would give.
    """
    s = g.speculation
    is_root = jnp.arange(s.tree.tokens.shape[1], dtype=jnp.int32)[None] == 0
    tree = s.tree._replace(valid=s.tree.valid & (brings[:, None] | is_root))
    above = trees.ancestors(tree, depth=depth)
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
    s = dataclasses.replace(
        s,
        text=write(s.text, new, g.position + 1, count),
        hope=jnp.where(brings, _mean(s.hope, accepted), s.hope),
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


def _mean(old: jax.Array, new: jax.Array) -> jax.Array:
    return _MEMORY * old + (1 - _MEMORY) * new.astype(jnp.float32)
