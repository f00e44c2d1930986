"""The laws where layers have experts, and sinks and a window as in gpt-oss."""

import dataclasses

import pytest
from small_policies import DAPQ
from tiny import CONFIG, prompts

from jaxkv import LongFlow, Options
from jaxkv.laws import lawbook, programs
from jaxkv.laws.programs import LENGTHS, PROMPT
from jaxkv.models.config import Experts, LayerKind

NETWORK = dataclasses.replace(
    CONFIG,
    kinds=(LayerKind(window=8), LayerKind()),
    sinks=True,
    experts=Experts(count=6, per_token=2, size=16, bias=True),
)
PROGRAMS = programs.compiled(NETWORK)
LONGFLOW = Options(prefill=DAPQ, decode=LongFlow(), budget=9)


@pytest.fixture(autouse=True)
def network_of_experts(monkeypatch):
    monkeypatch.setattr(programs, "current", PROGRAMS)


def test_full_budget_is_exact():
    lawbook.full_budget_is_exact(LONGFLOW, *prompts(3, LENGTHS, PROMPT))


def test_batch_equals_singles():
    lawbook.batch_equals_singles(LONGFLOW, *prompts(3, LENGTHS, PROMPT), 0)


def test_exact_speculation_equals_plain():
    lawbook.exact_speculation_equals_plain(LONGFLOW, *prompts(3, LENGTHS, PROMPT), 0)
