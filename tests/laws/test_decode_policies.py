"""The laws of decoding, for every decode policy of the registry."""

import dataclasses

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from small_policies import DECODE
from tiny import prompts

from jaxkv import Categorical, Greedy, registry
from jaxkv.laws import lawbook
from jaxkv.laws.programs import LENGTHS, PROMPT, with_budget

# How a token is drawn has nothing to do with what evicts, so one proves it for all.
SAMPLERS = {
    "penalised": Greedy(repetition_penalty=1.3),
    "drawn": Categorical(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02),
}
OPTIONS = DECODE | {
    f"longflow, {name}": dataclasses.replace(DECODE["longflow"], sampler=sampler)
    for name, sampler in SAMPLERS.items()
}
SMALL = 9
policies = pytest.mark.parametrize(
    "options",
    [with_budget(options, SMALL) for options in DECODE.values()],
    ids=DECODE,
)
policies_and_samplers = pytest.mark.parametrize(
    "options",
    [with_budget(options, SMALL) for options in OPTIONS.values()],
    ids=OPTIONS,
)
ragged = st.lists(st.integers(1, PROMPT), min_size=3, max_size=3)
seeds = st.integers(0, 2**16)


@policies_and_samplers
@settings(max_examples=5)
@given(seed=seeds, lengths=ragged)
def test_full_budget_is_exact(options, seed, lengths):
    lawbook.full_budget_is_exact(options, *prompts(seed, lengths, PROMPT))


@pytest.mark.parametrize("seed", [5, 6])
def test_full_cache_equals_recomputation(seed):
    tokens, lengths = prompts(seed, LENGTHS, PROMPT)
    lawbook.decoding_equals_recomputation(tokens, lengths)


@policies
@settings(max_examples=8)
@given(seed=seeds, lengths=ragged)
def test_bounded(options, seed, lengths):
    lawbook.bounded(options, *prompts(seed, lengths, PROMPT))


def test_bounded_by_another_budget():
    options = with_budget(DECODE["streaming-llm, four sinks"], 6)
    lawbook.bounded(options, *prompts(0, LENGTHS, PROMPT))


@policies_and_samplers
@settings(max_examples=4)
@given(seed=seeds)
def test_rows_are_independent(options, seed):
    lawbook.rows_are_independent(options, *prompts(seed, LENGTHS, PROMPT), seed)


@pytest.mark.parametrize("name", ["r-kv", "longflow, drawn"])
@settings(max_examples=4)
@given(seed=seeds)
def test_batch_equals_singles(name, seed):
    options = with_budget(OPTIONS[name], SMALL)
    lawbook.batch_equals_singles(options, *prompts(seed, LENGTHS, PROMPT), seed)


@pytest.mark.parametrize(
    "name",
    [name for name in registry.DECODE if hasattr(DECODE[name].decode, "attend_tree")],
)
@settings(max_examples=4)
@given(seed=seeds, lengths=ragged)
def test_exact_speculation_equals_plain(name, seed, lengths):
    options = with_budget(DECODE[name], SMALL)
    prompted = prompts(seed, lengths, PROMPT)
    lawbook.exact_speculation_equals_plain(options, *prompted, seed)


@policies
@settings(max_examples=5)
@given(seed=seeds)
def test_order_free(options, seed):
    lawbook.order_free(options, seed)


@policies
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_free_slots_are_never_read(options, implementation):
    lawbook.free_slots_are_never_read(
        dataclasses.replace(options, decode_implementation=implementation)
    )


@policies
def test_pure(options):
    lawbook.pure(options)


@policies
def test_finished_rows_do_not_change(options):
    lawbook.finished_rows_do_not_change(options)


@policies
def test_no_recompilation(options):
    lawbook.not_recompiled(options, *prompts(0, LENGTHS, PROMPT))


def test_stop_ids_end_rows_apart():
    lawbook.stop_ids_end_rows_apart(*prompts(3, (20, 11, 4), PROMPT))
