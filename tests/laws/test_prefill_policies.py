"""The laws of the prompt's eviction, for every prefill policy of the registry."""

import numpy as np
import pytest
from small_policies import PREFILL, SMALL_PREFILL, small
from tiny import prompts

from jaxkv import KNorm, registry
from jaxkv.laws import lawbook
from jaxkv.laws.programs import LENGTHS, PROMPT, prefill

TOKENS, _ = prompts(0, LENGTHS, PROMPT)
policies = pytest.mark.parametrize("policy", PREFILL.values(), ids=PREFILL)


@policies
def test_full_budget_is_exact(policy):
    lawbook.prompt_at_full_budget_is_exact(policy, TOKENS)


@policies
def test_bounded(policy):
    lawbook.prompt_is_bounded(policy, TOKENS)


@policies
def test_batch_equals_singles(policy):
    lawbook.prompt_in_a_batch_equals_singles(policy, TOKENS)


@policies
def test_pseudo_tokens_leave_no_trace(policy):
    lawbook.pseudo_tokens_leave_no_trace(policy, TOKENS)


@policies
def test_no_recompilation(policy):
    lawbook.prompt_is_not_recompiled(policy, TOKENS)


def test_policies_differ():
    """Each line of the table keeps something else, or it would test nothing new."""
    kept = {}
    for name, policy in PREFILL.items():
        _, cache = prefill(policy, TOKENS, [PROMPT] * 3, keep=[9] * 3)
        kept[name] = b"".join(
            np.asarray(state.positions)[:, :, :9].tobytes() for state in cache[1:]
        )
    assert len(set(kept.values())) == len(kept)


def test_a_policy_without_its_line_is_named():
    grown = registry.PREFILL | {"new": KNorm}
    with pytest.raises(LookupError, match=r"add \"new\": KNorm\(\.\.\.\) to TABLE in"):
        small("TABLE", grown, SMALL_PREFILL)
    with pytest.raises(LookupError, match="no such KNorm"):
        small("TABLE", grown, SMALL_PREFILL | {"new": SMALL_PREFILL["tova"]})
