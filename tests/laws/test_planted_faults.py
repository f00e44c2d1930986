"""Faults that are planted on purpose, each in one function, and the law that notices.

A law that no fault breaks proves nothing. Under a fault everything is compiled anew: a
program that is compiled already would not see that a function was replaced.
"""

import dataclasses
import functools
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import pytest
from small_policies import DECODE, PREFILL
from tiny import prompts

from jaxkv import Categorical
from jaxkv import state as kv
from jaxkv.laws import lawbook, programs
from jaxkv.laws.programs import LENGTHS, PROMPT, with_budget

# A fault of these laws shows where tokens are drawn.
DRAWN = (lawbook.rows_are_independent, lawbook.batch_equals_singles)
TOKENS, ROWS = prompts(0, LENGTHS, PROMPT)


class Fault(NamedTuple):
    """One fault.

    Attributes:
      where: the function that is replaced, by its full name.
      replace: of the function to the faulty one.
      law: the law of `lawbook` that must notice.
      policy: what it is checked for, a line of the tables; None if the law is of none.
    """

    where: str
    replace: Callable[[Any], Any]
    law: Callable[..., None]
    policy: str | None


def keep_values_for_keys(gather):
    return lambda state, keys, values, positions: gather(state, values, keys, positions)


def attend_with_values_for_keys(attend):
    def swap(state):
        return dataclasses.replace(state, keys=state.values, values=state.keys)

    def faulty(query, key, value, state, position, **options):
        out, state = attend(query, value, key, swap(state), position, **options)
        return out, swap(state)

    return faulty


def see_one_token_more(attend):
    def faulty(query, key, value, **options):
        def pad(x, before):
            return jnp.pad(x, ((0, 0), (before, 1 - before), (0, 0), (0, 0)))

        return attend(pad(query, 1), pad(key, 0), pad(value, 0), **options)[:, 1:]

    return faulty


def keep_one_more(keep_top):
    return lambda *args, keep, **budget: keep_top(*args, keep=keep + 1, **budget)


def keep_padding(keep_top):
    def faulty(prompt, *args, **budget):
        everything = jnp.full_like(prompt.lengths, prompt.keys.shape[1])
        return keep_top(prompt._replace(lengths=everything), *args, **budget)

    return faulty


def hold_one_more(num_slots):
    return lambda self, *args, **kept: num_slots(self, *args, **kept) + 1


def keep_a_pseudo_token(keep_top):
    return lambda prompt, *args, keep, **budget: keep_top(
        prompt._replace(lengths=prompt.lengths + 1), *args, keep=keep + 1, **budget
    )


def overwrite_the_youngest(oldest):
    del oldest
    return lambda state, n_sink: jnp.argmax(state.positions, -1).astype(jnp.int32)


def overwrite_the_first_slot(choose_victim):
    def faulty(importance, *args, **options):
        order = jnp.arange(importance.shape[-1], dtype=jnp.float32)
        order = jnp.broadcast_to(order, importance.shape)
        return choose_victim(order, *args, **options)

    return faulty


def read_free_slots(attend):
    def faulty(query, key, value, state, position, **options):
        everywhere = jnp.maximum(state.positions, 0)
        occupied = dataclasses.replace(state, positions=everywhere)
        out, _ = attend(query, key, value, occupied, position, **options)
        return out, attend(query, key, value, state, position, **options)[1]

    return faulty


def renumber_positions(gather):
    def faulty(*args):
        state = gather(*args)
        order = jnp.arange(state.slots, dtype=jnp.int32)
        positions = jnp.where(kv.occupied(state), order, kv.FREE)
        return dataclasses.replace(state, positions=positions)

    return faulty


def share_the_first_row_s_key(pick):
    return lambda self, logits, keys: pick(
        self, logits, jnp.broadcast_to(keys[:1], keys.shape)
    )


def ignore_stop_ids(advance):
    def faulty(network, params, generation, until, stop_ids, **options):
        never = jnp.full_like(stop_ids, -1)
        return advance(network, params, generation, until, never, **options)

    return faulty


def move_finished_rows(attend_cache):
    return lambda policy, *, position, **options: attend_cache(
        policy, position=jnp.maximum(position, 0), **options
    )


def shorten_positions(decode_step):
    @functools.wraps(decode_step)
    def faulty(*args, **options):
        logits, cache = decode_step(*args, **options)
        short = (state.positions.astype(jnp.int16) for state in cache)
        pairs = zip(cache, short, strict=True)
        return logits, tuple(dataclasses.replace(s, positions=p) for s, p in pairs)

    return faulty


def accept_one_node_too_many(longest):
    def faulty(tree, above, ok, merit):
        ok = ok.at[:, 0].set(True)
        parent = jnp.take_along_axis(ok, tree.parents, axis=1)
        return longest(tree, above, ok | parent, merit)

    return faulty


def compare_by_identity(eq):
    del eq
    return object.__eq__


FAULTS = {
    "keys and values swapped as the prompt is kept": Fault(
        "jaxkv.state.gather",
        keep_values_for_keys,
        lawbook.prompt_at_full_budget_is_exact,
        "knorm",
    ),
    "keys and values swapped in the cache": Fault(
        "jaxkv.policies.full.attend_and_write",
        attend_with_values_for_keys,
        lawbook.decoding_equals_recomputation,
        None,
    ),
    "mask shifted by one": Fault(
        "jaxkv.kernels.prefill.causal_attention",
        see_one_token_more,
        lawbook.pseudo_tokens_leave_no_trace,
        "dapq",
    ),
    "mask shifted by one, while decoding goes on": Fault(
        "jaxkv.kernels.prefill.causal_attention",
        see_one_token_more,
        lawbook.decoding_equals_recomputation,
        None,
    ),
    "budget off by one": Fault(
        "jaxkv.policies.base.keep_top",
        keep_one_more,
        lawbook.prompt_is_bounded,
        "knorm",
    ),
    "budget off by one, while decoding": Fault(
        "jaxkv.options.Options.num_slots", hold_one_more, lawbook.bounded, "longflow"
    ),
    "padding kept": Fault(
        "jaxkv.policies.base.keep_top",
        keep_padding,
        lawbook.prompt_in_a_batch_equals_singles,
        "knorm",
    ),
    "pseudo tokens in the cache": Fault(
        "jaxkv.policies.base.keep_top",
        keep_a_pseudo_token,
        lawbook.pseudo_tokens_leave_no_trace,
        "dapq",
    ),
    "positions renumbered": Fault(
        "jaxkv.state.gather",
        renumber_positions,
        lawbook.pseudo_tokens_leave_no_trace,
        "knorm",
    ),
    "eviction of the wrong end": Fault(
        "jaxkv.policies.streaming_llm.oldest",
        overwrite_the_youngest,
        lawbook.full_budget_is_exact,
        "streaming-llm",
    ),
    "eviction by slot": Fault(
        "jaxkv.kernels.victims.choose_victim",
        overwrite_the_first_slot,
        lawbook.order_free,
        "h2o",
    ),
    "free slots read": Fault(
        "jaxkv.policies.full.attend_and_write",
        read_free_slots,
        lawbook.free_slots_are_never_read,
        "full",
    ),
    "a PRNG key shared by rows": Fault(
        "jaxkv.sampling.Categorical.pick",
        share_the_first_row_s_key,
        lawbook.rows_are_independent,
        "full",
    ),
    "a PRNG key shared by rows, in a batch and alone": Fault(
        "jaxkv.sampling.Categorical.pick",
        share_the_first_row_s_key,
        lawbook.batch_equals_singles,
        "full",
    ),
    "stop ids ignored": Fault(
        "jaxkv.generation.advance",
        ignore_stop_ids,
        lawbook.stop_ids_end_rows_apart,
        None,
    ),
    "finished rows moved": Fault(
        "jaxkv.forward.attend_cache",
        move_finished_rows,
        lawbook.finished_rows_do_not_change,
        "streaming-llm",
    ),
    "a dtype that changes": Fault(
        "jaxkv.forward.decode_step", shorten_positions, lawbook.pure, "full"
    ),
    "accepted path one too long": Fault(
        "jaxkv.speculation.verdict._longest",
        accept_one_node_too_many,
        lawbook.exact_speculation_equals_plain,
        "full",
    ),
    "options compared by identity": Fault(
        "jaxkv.policies.knorm.KNorm.__eq__",
        compare_by_identity,
        lawbook.prompt_is_not_recompiled,
        "knorm",
    ),
    "options compared by identity, while decoding": Fault(
        "jaxkv.policies.tova.TOVADecode.__eq__",
        compare_by_identity,
        lawbook.not_recompiled,
        "tova",
    ),
}


def check(fault):
    """Hold the fault's policy to its law."""
    given = inspect.signature(fault.law).parameters
    arguments = {"tokens": TOKENS, "lengths": ROWS, "seed": 0}
    if "policy" in given:
        arguments["policy"] = PREFILL[fault.policy]
    if "options" in given:
        options = DECODE[fault.policy]
        if fault.law in DRAWN:
            options = dataclasses.replace(options, sampler=Categorical(temperature=2.0))
        arguments["options"] = with_budget(options, 9)
    fault.law(**{k: v for k, v in arguments.items() if k in given})


@functools.cache
def holds(law, policy):
    """Check that the library as it is keeps the law, once for all faults."""
    check(Fault("", None, law, policy))


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_the_law_notices(fault, monkeypatch):
    holds(fault.law, fault.policy)
    faulty = fault.replace(pkgutil.resolve_name(fault.where))
    monkeypatch.setattr(fault.where, faulty)
    monkeypatch.setattr(programs, "current", programs.compiled())
    with pytest.raises(AssertionError):
        check(fault)


def test_every_law_notices_a_fault():
    assert {fault.law for fault in FAULTS.values()} == set(lawbook.LAWS)
