"""Speculative decoding inside the loop: draft, verify, accept, commit.

A step feeds the newest token and a tree of drafted ones through the network at once,
and emits as many tokens as pass, and one more. Where no row has a draft, or where
drafts keep failing, it is an ordinary decode step.

Axis letters: `B` batch, `T` nodes of a tree, `D` its depth, `V` vocabulary, `W` width
of the text, `P` padded prompt.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv import trees
from jaxkv.attention import attend_tree
from jaxkv.kernels import dispatch, tree_attention
from jaxkv.speculation import counts, verdict
from jaxkv.speculation.counts import Counts
from jaxkv.speculation.drafters import Drafter
from jaxkv.speculation.matching import Context
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
    rows = jnp.arange(batch)
    text = jnp.pad(tokens, ((0, 0), (0, max_out))).at[rows, lengths].set(first)
    unexpected = jnp.full(batch, -1, jnp.int32)
    if likeliest is not None:
        index = jnp.arange(length)
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


def advance(
    network: Any,
    params: Any,
    generation: Any,
    until: jax.Array,
    stop_ids: jax.Array,
    *,
    options: Any,
    active: Callable[[Any], jax.Array],
    plain_step: Callable[[Any], Any],
) -> Any:
    """Decode with drafts until no row is active.

    Args:
      network: static.
      params: its parameters.
      generation: a `generation.Generation` with a `speculation`.
      until: int32 scalar, tokens that no output exceeds.
      stop_ids: int32 `[E]`.
      options: a `options.Options` with `speculate` and `accept`.
      active: says which rows of a generation go on, bool `[B]`.
      plain_step: one decode step for the active rows.

    Returns:
      The generation. With the exact rule it is what `plain_step` alone would give.
    """
    drafter, rule = options.speculate, options.accept

    def worth(g):
        """Return which rows bring a draft to a step with a tree, bool `[B]`."""
        s = g.speculation
        return active(g) & s.tree.valid[:, 1:].any(1) & (s.hope >= drafter.break_even)

    def pays(g):
        brings = worth(g)
        if not rule.exact:
            # A row's output must not depend on the rows beside it, and with a lossy
            # rule it does depend on the kind of the step.
            return brings.any()
        hoped = jnp.where(brings, g.speculation.hope, 0.0).sum()
        return brings.any() & (hoped >= drafter.break_even * active(g).sum())

    def plain(g):
        return _after_plain(g, plain_step(g), active(g))

    def with_tree(g):
        return _tree_step(
            *(network, params, g, until, stop_ids),
            options=options,
            running=active(g),
            brings=worth(g),
        )

    def step(g):
        g = _draft(drafter, g)
        tree = pays(g)
        return _if(tree, with_tree, _if(~tree, plain, g))

    return jax.lax.while_loop(lambda g: active(g).any(), step, generation)


def _if(condition, step, g):
    """Return `step(g)` or `g`; a loop of one round, because a branch copies the cache.

    The buffers of a branch's result are not those of its arguments, while a loop's are.
    """
    once = (condition, g)

    def body(carry):
        return jnp.zeros_like(carry[0]), step(carry[1])

    return jax.lax.while_loop(lambda carry: carry[0], body, once)[1]


def _draft(drafter, g):
    """Draft for the coming step."""
    s = g.speculation
    tree = drafter.draft(Context(s.text, g.position, s.prompt, s.pool, s.likeliest))
    return dataclasses.replace(g, speculation=dataclasses.replace(s, tree=tree))


def _after_plain(before, g, running):
    """Note the one new token, and whether the draft would have had it."""
    s = before.speculation
    rows = jnp.arange(g.last.shape[0])
    column = jnp.where(running, g.position, s.text.shape[1])
    first = s.tree.valid & (s.tree.depths == 1)
    drafted = running & first.any(-1)
    right = (first & (s.tree.tokens == g.last[:, None])).any(-1)
    return dataclasses.replace(
        g,
        speculation=dataclasses.replace(
            s,
            text=s.text.at[rows, column].set(g.last, mode="drop"),
            hope=jnp.where(drafted, _mean(s.hope, right), s.hope),
            counts=counts.count_plain(s.counts, running),
        ),
    )


def _mean(old, new):
    return _MEMORY * old + (1 - _MEMORY) * new.astype(jnp.float32)


def _tree_step(network, params, g, until, stop_ids, *, options, running, brings):
    """Feed the trees, and emit what passes; at least one token per running row."""
    drafter = options.speculate
    tree = g.speculation.tree
    is_root = jnp.arange(tree.tokens.shape[1]) == 0
    tree = tree._replace(valid=tree.valid & (brings[:, None] | is_root))
    above = trees.ancestors(tree, depth=drafter.depth)
    position = jnp.where(running, g.position, -1)
    attend = attend_tree(
        options.decode,
        position=position,
        drafts=tree,
        ancestors=above,
        depth=drafter.depth,
        implementation=options.decode_implementation,
    )
    hidden, pending = network.apply(
        {"params": params},
        tree.tokens,
        jnp.maximum(position, 0)[:, None] + tree.depths,
        g.cache,
        attend,
    )
    logits = network.apply({"params": params}, hidden, method="unembed")
    picks, end, accepted = verdict.decide(
        *(logits, tree, above, stop_ids),
        rule=options.accept,
        sampler=options.sampler,
        position=g.position,
        keys=g.keys,
        seen=g.seen,
        running=running,
    )
    path = trees.path_to(end, tree, above, depth=drafter.depth)  # [B, D + 1]
    last = jnp.take_along_axis(picks, end[:, None], axis=1)
    new = jnp.take_along_axis(tree.tokens, path[:, 1:], axis=1)
    new = jnp.concatenate([new, last], axis=1)
    order = jnp.arange(new.shape[1])
    new = jnp.where(order == accepted[:, None], last, new)

    stops = (new[..., None] == stop_ids).any(-1)
    first_stop = jnp.where(stops, order, new.shape[1]).min(-1)
    count = jnp.minimum(jnp.minimum(accepted, first_stop) + 1, until - g.lengths)
    count = jnp.where(running, count, 0)
    how = dispatch.counterpart(
        options.decode_implementation, tree_attention.Implementation
    )
    cache = tuple(
        trees.commit(state, layer, path, count, position, implementation=how)
        for state, layer in zip(g.cache, pending, strict=True)
    )
    g = _emit(dataclasses.replace(g, cache=cache), new, stops, count)
    accepted = jnp.minimum(accepted, count)  # of these, those that became output
    tried, s = running & brings, g.speculation
    counted = counts.count_tree(
        *(s.counts, tree, path, accepted), running=running, brings=tried
    )
    hope = jnp.where(tried, _mean(s.hope, accepted), s.hope)
    s = dataclasses.replace(s, hope=hope, counts=counted)
    return dataclasses.replace(g, speculation=s)


def _emit(g, new, stops, count):
    """Append the first `count` of the new tokens `[B, D + 1]` to each row's output."""
    s = g.speculation
    rows = jnp.arange(new.shape[0])[:, None]
    order = jnp.arange(new.shape[1])
    kept = order < count[:, None]
    column = jnp.where(kept, g.lengths[:, None] + order, g.tokens.shape[1])
    place = jnp.where(kept, g.position[:, None] + 1 + order, s.text.shape[1])
    last = jnp.take_along_axis(new, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    return dataclasses.replace(
        g,
        tokens=g.tokens.at[rows, column].set(new, mode="drop"),
        lengths=g.lengths + count,
        done=g.done | (stops & kept).any(-1),
        last=jnp.where(count > 0, last, g.last),
        position=g.position + count,
        seen=None if g.seen is None else g.seen.at[rows, new].max(kept),
        speculation=dataclasses.replace(
            s, text=s.text.at[rows, place].set(new, mode="drop")
        ),
    )
