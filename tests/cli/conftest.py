"""What the tests of `jaxkv eval` share."""

import pytest

import jaxkv
from jaxkv.evaluation import sweep
from jaxkv.text.completion import Stats


@pytest.fixture
def reader(monkeypatch, tiny_lm):
    """Let `generate` answer with what the cache would hold: the prompt's last tokens.

    Returns the list of its calls; each is the arguments but model and prompts.
    """
    calls = []

    def generate(lm, prompts, **arguments):
        calls.append(arguments)
        budgets = arguments["budget"] or 10**6
        if type(budgets) is int:
            budgets = [budgets] * len(prompts)
        texts = tuple(
            tiny_lm.tokenizer.decode(ids[-kept:])
            for ids, kept in zip(prompts, budgets, strict=True)
        )
        stats = Stats(
            prompt_tokens=tuple(map(len, prompts)),
            cache_bytes=100 * len(prompts),
            slots=max(budgets),
            compile_seconds=1.0,
            prefill_seconds=2.0,
            decode_seconds=3.0,
            tokens_per_second=0.0,
            prefill_implementation="xla",
            decode_implementation="xla",
        )
        lengths = tuple(map(len, prompts))
        reasons = ("stop",) * len(prompts)
        return jaxkv.Completion(
            decoded=texts,
            tokens=tuple(map(tuple, prompts)),
            lengths=lengths,
            finish_reason=reasons,
            stats=stats,
        )

    monkeypatch.setattr(sweep, "generate", generate)
    return calls
