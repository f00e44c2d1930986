"""Loss of given text: against transformers' definition, and under a budget."""

import dataclasses

import numpy as np
import pytest

import jaxkv
from jaxkv.evaluation.likelihood import losses, windows
from jaxkv.evaluation.methods import Method

LENGTH, PROMPT = 96, 32


@pytest.fixture(scope="module")
def lm():
    return jaxkv.load("needle")


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(5, 4000, (2, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def read(lm, tokens):
    return losses(lm, tokens, Method(name="full"), None, prompt=PROMPT)


def test_all_at_once_is_token_by_token(lm, tokens, read):
    assert read.shape == (2, LENGTH - PROMPT) and (read > 0).all()
    method = Method(name="streaming-llm", decode=jaxkv.StreamingLLM())
    fed = losses(lm, tokens, method, LENGTH, prompt=PROMPT)
    np.testing.assert_allclose(fed, read, atol=1e-4)


def test_against_torch(lm, tokens, read):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(lm.folder, dtype=torch.float32)
    ids = torch.tensor(tokens).long()
    with torch.no_grad():
        logits = network(ids).logits[:, PROMPT - 1 : -1]
    wanted = torch.nn.functional.cross_entropy(
        logits.swapaxes(1, 2), ids[:, PROMPT:], reduction="none"
    )
    np.testing.assert_allclose(read, wanted.numpy(), atol=1e-3)


def test_what_a_budget_forgets_costs(lm, tokens, read):
    method = Method(name="snapkv", prefill=jaxkv.SnapKV(window_size=4))
    kept = losses(lm, tokens, method, 8, prompt=PROMPT)
    assert np.abs(kept - read).max() > 0.1
    np.testing.assert_allclose(kept[:, 0], read[:, 0], atol=1e-4)  # before any eviction


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneByOne(jaxkv.Full):
    """Keeps everything, and is not known for it."""


def test_blocks_cost_what_single_tokens_do(lm, tokens):
    prefill = jaxkv.SnapKV(window_size=4)
    blocks, single = (
        losses(
            *(lm, tokens, Method(name="x", prefill=prefill, decode=decode), 8),
            prompt=PROMPT,
        )
        for decode in (jaxkv.Full(), OneByOne())
    )
    np.testing.assert_allclose(blocks, single, atol=1e-4)


def test_windows_do_not_overlap(lm):
    text = " ".join(map(str, range(200)))
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    found = windows(lm, ["7", text], length=64)
    assert found.shape == (len(ids) // 64, 64)
    np.testing.assert_array_equal(found.reshape(-1), ids[: found.size])
    bare = dataclasses.replace(lm, tokenizer=None)
    with pytest.raises(ValueError, match="has no tokenizer"):
        windows(bare, ["a text"], length=2)
    with pytest.raises(ValueError, match="no text has 1048576 tokens"):
        windows(lm, [text], length=1 << 20)
