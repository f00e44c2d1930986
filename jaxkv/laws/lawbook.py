"""The laws of the design, each a function that raises AssertionError if it is broken.

They say nothing about which tokens a policy keeps, so that they hold for all. Tests
hold every policy of the registry to them, and then break the library on purpose, to see
that the laws notice. `jaxkv.testing` holds anybody's policy to them.

A law of a prompt's eviction takes a policy, one of decoding takes options. All run the
tiny network, by `programs`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import state as kv
from jaxkv.laws import programs
from jaxkv.laws.network import prompts
from jaxkv.laws.programs import (
    LENGTHS,
    NEW,
    PROMPT,
    SMALL,
    generate,
    may_keep,
    prefill,
    step,
)
from jaxkv.options import Options
from jaxkv.policies.full import Full
from jaxkv.runtime.seeds import key_of
from jaxkv.speculation.drafters import Tree

CLOSE: dict[str, Any] = dict(rtol=2e-4, atol=2e-4)
DRAFTER = Tree(
    num_draft_tokens=7,
    depth=3,
    ngram_max=2,
    ngram_min=1,
    max_matches=3,
    include_output=True,
    break_even=0.0,
)


def by_position(state, array):
    """Return `[B, heads, slots, ...]` in the order of the tokens, free slots last."""
    positions = np.asarray(state.positions)
    order = np.argsort(np.where(positions >= 0, positions, PROMPT + NEW), axis=-1)
    order = order.reshape(order.shape + (1,) * (array.ndim - order.ndim))
    return np.take_along_axis(np.asarray(array), order, axis=2)


def assert_same_tokens_are_held(one, two):
    """Compare caches token by token, wherever these lie; heads may be repeated."""
    for a, b in zip(one, two, strict=True):
        repeat = b.keys.shape[1] // a.keys.shape[1]
        slots = min(a.slots, b.slots)
        old, new = (by_position(x, x.positions) for x in (a, b))
        old = old.repeat(repeat, axis=1)
        held = old[:, :, :slots] >= 0
        np.testing.assert_array_equal(old[:, :, :slots], new[:, :, :slots])
        assert (old[:, :, slots:] < 0).all() and (new[:, :, slots:] < 0).all()
        for field in ("keys", "values"):
            x = by_position(a, getattr(a, field)).repeat(repeat, axis=1)[:, :, :slots]
            y = by_position(b, getattr(b, field))[:, :, :slots]
            np.testing.assert_allclose(x[held], y[held], **CLOSE, err_msg=field)


# The prompt's eviction.


def prompt_at_full_budget_is_exact(policy, tokens):
    """What fits is kept whole, and in order; the first logits are the full cache's."""
    want_logits, want = prefill(None, tokens)
    logits, got = prefill(policy, tokens, keep=(PROMPT,) * len(LENGTHS))
    np.testing.assert_allclose(logits, want_logits, **CLOSE)
    assert_same_tokens_are_held(want, got)
    lengths = np.asarray(LENGTHS)[:, None]
    for state in got:
        held = np.asarray(state.positions)[:, :, :PROMPT]
        first = np.maximum(lengths - (state.window or PROMPT), 0)
        order = first + np.arange(held.shape[2])
        whole = np.where(order < lengths, order, kv.FREE)
        np.testing.assert_array_equal(held, np.broadcast_to(whole[:, None], held.shape))


def prompt_is_bounded(policy, tokens):
    """Each row keeps as many tokens as it may, in order, and aims behind them."""
    _, cache = prefill(policy, tokens)
    keep = np.asarray(may_keep(policy))
    windows = programs.windows()
    keeps = policy.layer_keeps(keep, np.asarray(LENGTHS), windows.count(None))
    for state, keep in zip(kv.global_layers(cache), keeps, strict=True):
        want = np.minimum(keep, LENGTHS)[:, None]
        count = np.asarray(kv.occupancy(state))
        if policy.head_share == 1:
            np.testing.assert_array_equal(count, np.broadcast_to(want, count.shape))
        assert (count <= np.minimum(keep * policy.head_share, LENGTHS)[:, None]).all()
        np.testing.assert_array_equal(count.mean(1, keepdims=True), want)
        np.testing.assert_array_equal(state.target, count)  # the first free slot
        for row in np.asarray(state.positions).reshape(-1, state.slots):
            assert (np.diff(row[row >= 0]) > 0).all()  # in order, hence unique
    for state, window in zip(cache, windows, strict=True):
        if window is not None:  # the last tokens, whatever the policy says
            held, ends = np.asarray(state.positions), np.asarray(LENGTHS)[:, None]
            assert held.shape[2] == window
            assert (held.max(-1) == ends - 1).all()
            assert ((held >= 0).sum(-1) == np.minimum(ends, window)).all()


def prompt_in_a_batch_equals_singles(policy, tokens):
    """What a row keeps depends on no other row, and not on its padding."""
    _, together = prefill(policy, tokens)
    others = prompts(7, LENGTHS, PROMPT)[0].at[2].set(tokens[2])
    lengths, keep = (5, PROMPT, LENGTHS[2]), (5, 8, SMALL[2])
    _, apart = prefill(policy, others, lengths=lengths, keep=keep)
    _, padded = prefill(policy, tokens.at[2, LENGTHS[2] :].set(60))
    for old, new, same in zip(together, apart, padded, strict=True):
        np.testing.assert_array_equal(old.positions[2], new.positions[2])
        np.testing.assert_array_equal(old.positions, same.positions)


def pseudo_tokens_leave_no_trace(policy, tokens):
    """First logits are the full cache's; what is kept is the prompt's own."""
    want_logits, want = prefill(None, tokens)
    logits, got = prefill(policy, tokens)
    np.testing.assert_allclose(logits, want_logits, **CLOSE)
    for old, new in zip(want, got, strict=True):
        if old.window is not None:
            assert_same_tokens_are_held([old], [new])
            continue
        repeat = new.keys.shape[1] // old.keys.shape[1]
        positions = np.asarray(new.positions)
        assert (positions < np.asarray(LENGTHS)[:, None, None]).all()
        held = positions >= 0
        for field in ("keys", "values"):
            whole = np.asarray(getattr(old, field)).repeat(repeat, axis=1)
            where = np.maximum(positions, 0)[..., None]
            whole = np.take_along_axis(whole, where, axis=2)
            kept = np.asarray(getattr(new, field))
            np.testing.assert_allclose(whole[held], kept[held], **CLOSE)


def prompt_is_not_recompiled(policy, tokens):
    """Other prompts, other budgets and equal options compile nothing."""
    prefill(policy, tokens)
    compiled = programs.current.prefill._cache_size()
    equal = dataclasses.replace(policy)
    prefill(equal, tokens[::-1], lengths=(20, 20, 20), keep=(10, 11, 12))
    assert programs.current.prefill._cache_size() == compiled


# Decoding.


def full_budget_is_exact(options, tokens, lengths):
    """With room for all, tokens and cache are those of the full cache."""
    plain = generate(Options(sampler=options.sampler), tokens, lengths)
    whole = isinstance(options.prefill, Full) and not options.decode.evicts
    budget = None if whole else PROMPT + NEW
    options = dataclasses.replace(options, budget=budget)
    got = generate(options, tokens, lengths)
    np.testing.assert_array_equal(got.tokens, plain.tokens)
    assert_same_tokens_are_held(plain.cache, got.cache)


def decoding_equals_recomputation(tokens, lengths, *, new=8):
    """The full cache gives what the network gives that reads all tokens anew."""
    out = np.asarray(generate(Options(), tokens, lengths, new=new).tokens)
    for row, length in enumerate(np.asarray(lengths)):
        known = np.asarray(tokens)[row, :length].tolist()
        for nth in range(new):
            padded = np.zeros((1, PROMPT + NEW), np.int32)
            padded[0, : len(known)] = known
            logits, _ = programs.current.prefill(
                *(*programs.network(), jnp.asarray(padded)),
                jnp.asarray([len(known)], jnp.int32),
                options=Options(prefill_implementation="reference"),
                slots=PROMPT + NEW,
            )
            assert int(logits[0].argmax()) == out[row, nth]
            known.append(int(out[row, nth]))


def bounded(options, tokens, lengths):
    """Never more tokens than the budget, each once, the newest among them."""
    for state in generate(options, tokens, lengths).cache:
        held = np.asarray(state.positions)
        if state.window is not None:
            assert held.shape[-1] <= state.window
        elif options.decode.evicts:
            assert (held >= 0).sum(-1).max() <= options.budget
        assert held.max() < int(lengths.max()) + NEW
        for row in held.reshape(-1, held.shape[-1]):
            real = row[row >= 0]
            assert len(set(real.tolist())) == len(real)
        newest = np.asarray(lengths) + NEW - 2  # the last one that was fed
        assert (held == newest[:, None, None]).any(-1).all()


def batch_equals_singles(options, tokens, lengths, seed):
    """Each row gets what it gets alone, with its own PRNG key."""
    keys = jax.random.split(key_of(seed), len(lengths))
    together = generate(options, tokens, lengths, keys=keys).tokens
    for row in range(len(lengths)):
        one = slice(row, row + 1)
        alone = generate(options, tokens[one], lengths[one], keys=keys[one])
        np.testing.assert_array_equal(alone.tokens[0], together[row])


def rows_are_independent(options, tokens, lengths, seed):
    """Each row gets what it gets in another place, among other rows.

    The batch is as large as before, so that this compiles nothing.
    """
    keys = jax.random.split(key_of(seed), len(lengths))
    together = generate(options, tokens, lengths, keys=keys).tokens
    others = prompts(seed + 1, lengths, PROMPT)[0]
    for row in range(len(lengths)):
        place = (row + 1) % len(lengths)
        apart = generate(
            options,
            others.at[place].set(tokens[row]),
            lengths.at[place].set(lengths[row]),
            keys=keys[::-1].at[place].set(keys[row]),
        )
        np.testing.assert_array_equal(apart.tokens[place], together[row])


def exact_speculation_equals_plain(options, tokens, lengths, seed):
    """Whatever is drafted, tokens and cache are those of plain decoding."""
    keys = jax.random.split(key_of(seed), len(lengths))
    plain = generate(options, tokens, lengths, keys=keys)
    drafted = dataclasses.replace(options, speculate=DRAFTER)
    got = generate(drafted, tokens, lengths, keys=keys)
    np.testing.assert_array_equal(got.tokens, plain.tokens)
    assert_same_tokens_are_held(plain.cache, got.cache)


def stop_ids_end_rows_apart(tokens, lengths):
    """A row ends behind the first stop id it gives, and the others go on."""
    free = np.asarray(generate(Options(), tokens, lengths).tokens)
    stop = (int(free[0, 4]), int(free[1, 9]))
    out = generate(Options(), tokens, lengths, stop_ids=stop)
    for row in range(len(free)):
        hits = np.flatnonzero(np.isin(free[row], stop))
        end = hits[0] + 1 if len(hits) else NEW
        assert int(out.lengths[row]) == end
        assert bool(out.stopped[row]) == bool(len(hits))
        np.testing.assert_array_equal(out.tokens[row, :end], free[row, :end])
        assert (np.asarray(out.tokens)[row, end:] == -1).all()


def not_recompiled(options, tokens, lengths):
    """Other prompts, another number of tokens and equal options compile nothing."""
    generate(options, tokens, lengths, new=3)
    compiled = programs.current.generate._cache_size()
    policies = {
        field: dataclasses.replace(getattr(options, field))
        for field in ("prefill", "decode", "sampler")
    }
    other = dataclasses.replace(options, **policies)
    generate(other, tokens[::-1], lengths[::-1], new=NEW)
    assert programs.current.generate._cache_size() == compiled


# One decode step. The state is what a few steps have left, so it remembers something.


def state_of(options, seed=0):
    """Return tokens, their positions and the cache, at the beginning of a step."""
    tokens, lengths = prompts(seed, LENGTHS, PROMPT)
    new = 4
    out = generate(options, tokens, lengths, new=new)
    return out.tokens[:, new - 1], lengths + new - 1, out.cache


def by_slot(state, change):
    """Return the memory with what it holds for each slot, on its last axis, changed."""
    batch, heads, slots = state.positions.shape

    def per_slot(x):
        return x.shape[:2] == (batch, heads) and x.shape[2:][-1:] == (slots,)

    return jax.tree.map(lambda x: change(x) if per_slot(x) else x, state.memory)


def next_victim(state):
    """Return the position of the token that is overwritten next, -1 if it is none."""
    return np.take_along_axis(
        np.asarray(state.positions), np.asarray(state.target)[..., None], axis=2
    )


def permute(state, order):
    """Return a state whose slots lie in another order."""
    return dataclasses.replace(
        state,
        keys=state.keys[:, :, order],
        values=state.values[:, :, order],
        positions=state.positions[:, :, order],
        target=jnp.asarray(np.argsort(order), jnp.int32)[state.target],
        memory=by_slot(state, lambda x: x[..., order]),
    )


def order_free(options, seed):
    """Permuting the slots changes neither the logits nor which token goes next."""
    token, position, cache = state_of(options)
    rng = np.random.default_rng(seed)
    permuted = tuple(permute(s, rng.permutation(s.slots)) for s in cache)
    plain, after = step(options, token, position, cache)
    other, moved = step(options, token, position, permuted)
    np.testing.assert_allclose(plain, other, **CLOSE)
    if options.decode.evicts:
        for one, two in zip(after, moved, strict=True):
            np.testing.assert_array_equal(next_victim(one), next_victim(two))


def free_slots_are_never_read(options):
    """What lies in them may be NaN."""
    token, position, cache = state_of(
        dataclasses.replace(options, decode_implementation=None)
    )
    assert all((~kv.occupied(s)).any() for s in cache)
    poisoned = tuple(
        dataclasses.replace(
            s,
            keys=jnp.where(kv.occupied(s)[..., None], s.keys, jnp.nan),
            values=jnp.where(kv.occupied(s)[..., None], s.values, jnp.nan),
            memory=by_slot(s, functools.partial(_poison, kv.occupied(s))),
        )
        for s in cache
    )
    plain, _ = step(options, token, position, cache)
    other, _ = step(options, token, position, poisoned)
    np.testing.assert_array_equal(plain, other)


def _poison(occupied, x):
    held = occupied.reshape(*occupied.shape[:2], *(1,) * (x.ndim - 3), -1)
    whole = jnp.issubdtype(x.dtype, jnp.integer)
    wrong = jnp.asarray(jnp.iinfo(x.dtype).min if whole else jnp.nan, x.dtype)
    return jnp.where(held, x, wrong)


def pure(options):
    """The same again gives the same; no input changes, nor any shape or dtype."""
    token, position, cache = state_of(options)
    before = jax.tree.map(np.asarray, cache)
    first, after = step(options, token, position, cache)
    second, _ = step(options, token, position, cache)
    np.testing.assert_array_equal(first, second)
    jax.tree.map(np.testing.assert_array_equal, before, cache)
    structures: list[Any] = [jax.tree.structure(x) for x in (after, cache)]
    assert structures[0] == structures[1]
    for old, new in zip(jax.tree.leaves(cache), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)


def finished_rows_do_not_change(options):
    """Their state stays bit for bit, and their logits are finite."""
    token, position, cache = state_of(options)
    logits, after = step(options, token, position.at[1].set(-1), cache)
    assert np.isfinite(logits).all()
    jax.tree.map(
        lambda old, new: np.testing.assert_array_equal(old[1], new[1]), cache, after
    )


OF_PROMPTS = (
    prompt_at_full_budget_is_exact,
    prompt_is_bounded,
    prompt_in_a_batch_equals_singles,
    pseudo_tokens_leave_no_trace,
    prompt_is_not_recompiled,
)
OF_STEPS = (order_free, free_slots_are_never_read, pure, finished_rows_do_not_change)
LAWS = (
    *OF_PROMPTS,
    full_budget_is_exact,
    decoding_equals_recomputation,
    bounded,
    batch_equals_singles,
    rows_are_independent,
    exact_speculation_equals_plain,
    stop_ids_end_rows_apart,
    not_recompiled,
    *OF_STEPS,
)
