"""The shipped checkpoint: its size, its parity with transformers, what it can do."""

import numpy as np
import pytest

import jaxkv
from jaxkv.evaluation.questions import DEVELOPMENT_SEED, Cell, draw_questions, judge
from jaxkv.language_model import needle_folder


@pytest.fixture(scope="module")
def lm():
    return jaxkv.load("needle")


def test_fits_into_the_package():
    assert sum(f.stat().st_size for f in needle_folder().iterdir()) <= 32e6


def test_equals_transformers(lm):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(needle_folder(), dtype=torch.float32)
    prompts = [
        "The special magic number for kind-tent is: 765",
        "def f(a):\n    return",
    ]
    ours = jaxkv.generate(lm, prompts, max_new_tokens=64, stop_ids=[])
    for prompt, tokens in zip(prompts, ours.tokens, strict=True):
        ids = lm.tokenizer(prompt, return_tensors="pt")["input_ids"]
        wanted = theirs.generate(
            ids, max_new_tokens=64, do_sample=False, eos_token_id=None
        )
        np.testing.assert_array_equal(wanted[0, ids.shape[1] :], tokens)


@pytest.mark.parametrize(
    "task",
    # What `jaxkv demo` shows of the machine, CI sees.
    ["niah_multikey_needles", "vt", pytest.param("machine", marks=pytest.mark.slow)],
)
def test_answers_held_out_samples(lm, task):
    cell = Cell(task=task, length=400)
    questions = draw_questions(lm, [cell], samples=8, seed=DEVELOPMENT_SEED)
    limit = max(q.sample.max_new_tokens for q in questions)
    out = jaxkv.generate(lm, [q.ids for q in questions], max_new_tokens=limit)
    right = [
        judge(q.sample, text, by_lines=q.by_lines)[0]
        for q, text in zip(questions, out.text, strict=True)
    ]
    assert sum(right) >= 7


def test_saved_copy_loads_with_its_tokenizer(lm, tmp_path):
    jaxkv.save(lm, tmp_path / "copy")
    copy = jaxkv.load(tmp_path / "copy")
    assert copy.stop_ids == lm.stop_ids and copy.config == lm.config
    prompt = ["The grass is"]
    assert (
        jaxkv.generate(copy, prompt, max_new_tokens=8).tokens
        == jaxkv.generate(lm, prompt, max_new_tokens=8).tokens
    )
