"""The laws on a network whose layers differ: one holds a window, budgets cut others.

The window of 8 tokens is shorter than prompts and budgets.
"""

import dataclasses

import pytest
from small_policies import DECODE, PREFILL
from tiny import prompts

from jaxkv import Options
from jaxkv.laws import lawbook, programs
from jaxkv.laws.network import MIXED
from jaxkv.laws.programs import LENGTHS, PROMPT, with_budget

TOKENS, _ = prompts(0, LENGTHS, PROMPT)
SMALL = 9
DRAFTED = {name: name for name in ("full prompt, full", "streaming-llm", "longflow")}


@pytest.fixture(scope="module", autouse=True)
def mixed():
    """Let the laws run the network of mixed layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "current", programs.compiled(MIXED))
        yield


def slow_but(names, table):
    return [
        pytest.param(value, id=name, marks=[pytest.mark.slow] * (name not in names))
        for name, value in table.items()
    ]


@pytest.mark.parametrize("policy", slow_but(["pyramidkv"], PREFILL))
def test_laws_of_prompts(policy):
    for law in lawbook.OF_PROMPTS:
        law(policy, TOKENS)


@pytest.mark.parametrize("options", slow_but([], DECODE))
def test_laws_of_decoding(options):
    options = with_budget(options, SMALL)
    prompted = prompts(5, LENGTHS, PROMPT)
    lawbook.full_budget_is_exact(options, *prompted)
    lawbook.bounded(options, *prompted)
    lawbook.rows_are_independent(options, *prompted, 5)
    lawbook.order_free(options, 5)
    for law in lawbook.OF_STEPS[1:]:
        law(options)


@pytest.mark.parametrize("name", slow_but(["longflow"], DRAFTED))
def test_exact_speculation_equals_plain(name):
    options = with_budget(DECODE[name], SMALL)
    prompted = prompts(6, LENGTHS, PROMPT)
    lawbook.exact_speculation_equals_plain(options, *prompted, 6)


def test_full_cache_equals_recomputation():
    lawbook.decoding_equals_recomputation(*prompts(5, LENGTHS, PROMPT))


def test_drafts_that_no_window_holds_are_refused():
    drafter = dataclasses.replace(lawbook.DRAFTER, num_draft_tokens=9, depth=8)
    with pytest.raises(ValueError, match="a path of 9 drafted tokens does not"):
        programs.generate(
            Options(speculate=drafter), *prompts(0, LENGTHS, PROMPT), new=2
        )
