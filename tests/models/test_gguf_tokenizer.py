"""Tokenizers of GGUF files against the tokenizers whose contents they hold.

The originals are trained here and cut text as their makers' tokenizers do, with the
patterns of transformers.
"""

import functools
import io
import json
import unicodedata
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from gguf_files import TEMPLATE, write_changed
from hf_checkpoints import raises
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2 import tokenization_qwen2

from jaxkv.models.gguf import tokenizer as gguf_tokenizer
from jaxkv.models.gguf.header import Header, read_header
from jaxkv.models.gguf.tokenizer import read_tokenizer

TEXT = (Path(__file__).parents[2] / "README.md").read_text("utf-8") + (
    "def f(x):\n    return x + 12345  # naïve café, I'm, YOU'RE\n\n\n1. one\n\n2. two\n"
)
CONTROL, THINK = ["<|end|>", "<|user|>"], "<think>"
PROBES = [
    "",
    "Hello world, it's 2,345.67 or 1000000",
    "  12 apples\n\n1. one\n\n  2. two \t\t x",
    "def f(x):\n    return x\r\n\r\n",
    "na\u00efve cafe\u0301 \u2014 \u201cq\u201d \u5317 \U0001f469\u200d\U0001f467",
    "I'M you'RE we'll 'quoted'",
    "a<|user|>b <think>\n x<|end|>",
    "<|use r|><think",
]
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
PATTERNS = {
    "qwen2": tokenization_qwen2.PRETOKENIZE_REGEX,
    "llama-bpe": TikTokenConverter("").pattern,
    # Mistral's, of which transformers has no copy without a file beside it.
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}"
    r"\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}"
    r"\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
CUTS = {"gpt-2": [GPT2], "smollm": [DIGITS, GPT2]} | {
    name: [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    for name, pattern in PATTERNS.items()
}


@functools.cache
def original(pre):
    """Train a byte-level tokenizer, and put special tokens in front of the others."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(CUTS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        special_tokens=[*CONTROL, "[UNUSED]"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([THINK])
    return tokenizer


def keys_of(tokenizer, pre, **changes):
    """Return the keys that the converter would write of a tokenizer."""
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    types = {CONTROL[0]: 3, CONTROL[1]: 3, THINK: 4, "[UNUSED]": 5}
    keys = dict(
        model="gpt2",
        pre=pre,
        tokens=tokens,
        token_type=[types.get(token, 1) for token in tokens],
        merges=[" ".join(merge) for merge in merges],
        eos_token_id=tokens.index(CONTROL[0]),
    )
    return {f"tokenizer.ggml.{key}": v for key, v in (keys | changes).items()}


def read(keys):
    return read_tokenizer(Header(path=Path("x.gguf"), metadata=keys, tensors={}))


@functools.cache
def ours(pre):
    return read(keys_of(original(pre), pre))


def assert_same(pre, text):
    expected = original(pre).encode(text, add_special_tokens=False).ids
    assert ours(pre)(text, add_special_tokens=False)["input_ids"] == expected
    found = ours(pre).decode(expected)
    assert found == (unicodedata.normalize("NFC", text) if pre == "qwen2" else text)


@pytest.mark.parametrize("text", PROBES)
@pytest.mark.parametrize("pre", CUTS)
def test_texts_are_cut_and_merged_as_by_the_original(pre, text):
    assert_same(pre, text)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["12", "a", "b"]),
        ("smollm", ["1", "2", "a", "b"]),
        ("qwen2", ["1", "2", "a", "b"]),
        ("llama-bpe", ["12", "ab"]),
        ("tekken", ["1", "2", "ab"]),
    ],
)
def test_digits_and_words_that_are_tokens(pre, pieces):
    """Digits stand alone or not; a word that no merge makes is whole or not."""
    tokens = ["1", "2", "12", "a", "b", "ab"]
    keys = dict(model="gpt2", pre=pre, tokens=tokens, merges=["1 2"])
    keys |= dict(token_type=[1] * len(tokens))
    tokenizer = read({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    assert tokenizer.convert_ids_to_tokens(tokenizer("12ab")["input_ids"]) == pieces


@pytest.mark.parametrize("pre", CUTS)
@given(text=st.text(st.sampled_from("ab 1\n\r\tZ'\u00e9\u5317<_/")))
def test_any_text(pre, text):
    assert_same(pre, text)


def test_the_patterns_differ():
    """Else the tests above would prove nothing."""
    cut = {
        pre: tuple(
            piece
            for piece, _ in original(pre).pre_tokenizer.pre_tokenize_str(
                "  I'M 1234\n\n5. HelloWorld"
            )
        )
        for pre in CUTS
    }
    assert len(set(cut.values())) == len(CUTS)


def test_names_of_one_pattern():
    for name, pre in (
        ("llama3", "llama-bpe"),
        ("starcoder", "smollm"),
        (None, "gpt-2"),
    ):
        keys = keys_of(original(pre), name)
        if name is None:
            del keys["tokenizer.ggml.pre"]
        for text in PROBES:
            assert (
                read(keys)(text, add_special_tokens=False) == ours(pre)(text)
                or pre == "llama-bpe"
            )


def test_special_tokens_are_left_out_of_texts():
    tokenizer = ours("smollm")
    ids = tokenizer("a<|user|>b<think>c<|end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<think>c"
    assert tokenizer.eos_token == "<|end|>" and tokenizer.bos_token is None


@pytest.mark.parametrize("pre", ["smollm", "llama-bpe"])
@pytest.mark.parametrize("begin", [None, True, False])
@pytest.mark.parametrize("end", [None, True, False])
def test_ends_of_texts(pre, begin, end):
    """Llama 3's begin with a token unless the file says otherwise; GPT-2's do not."""
    changes = dict(add_bos_token=begin, add_eos_token=end)
    changes = {key: value for key, value in changes.items() if value is not None}
    keys = keys_of(original(pre), pre, bos_token_id=1, **changes)
    starts = pre == "llama-bpe" if begin is None else begin
    plain = original(pre).encode("ab", add_special_tokens=False).ids
    expected = [1] * starts + plain + [0] * bool(end)
    assert read(keys)("ab")["input_ids"] == expected
    assert read(keys)("ab", add_special_tokens=False)["input_ids"] == plain


def test_no_token_to_begin_with():
    tokenizer = read(keys_of(original("smollm"), "smollm", add_bos_token=True))
    assert tokenizer("")["input_ids"] == []


def test_the_chat_template(tmp_path):
    tokenizer = read_tokenizer(read_header(write_changed(tmp_path / "x.gguf")))
    turns = [{"role": "user", "content": "ab"}, {"role": "user", "content": "c"}]
    assert tokenizer.chat_template == TEMPLATE
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|user|>ab<|user|>c<|end|>"
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    assert ids == [1, 5, 1, 4, 0]


def test_a_file_without_a_tokenizer(tmp_path):
    def change(keys, tensors):
        for key in gguf_files.TOKENIZER:
            del keys[key]

    path = write_changed(tmp_path / "x.gguf", change)
    assert read_tokenizer(read_header(path)) is None
    path = write_changed(
        path, lambda keys, _: change(keys, _) or keys.update({MODEL: "no_vocab"})
    )
    assert read_tokenizer(read_header(path)) is None


MODEL = "tokenizer.ggml.model"


@functools.cache
def trained():
    """Return a model of sentencepiece as Llama 2's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_keys():
    model = trained()
    ids = range(model.get_piece_size())
    keys = dict(
        model="llama",
        tokens=[model.id_to_piece(i) for i in ids],
        scores=[model.get_score(i) for i in ids],
        token_type=[
            *(2, 3, 3),
            *(6 if model.is_byte(i) else 1 for i in ids if i > 2),
        ],
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
    )
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


@functools.cache
def from_pieces():
    return read(sentencepiece_keys())


@given(text=st.text(st.sampled_from("tehanrd 1  \n\tZ'\u00e9\u5317"), max_size=40))
@example(text="")
@example(text=" the  cache of the network ")
@example(text=TEXT[:2000])
def test_sentencepiece(text):
    expected = trained().encode(text)
    assert from_pieces()(text, add_special_tokens=False)["input_ids"] == expected
    assert from_pieces().decode(expected) == text


def test_options_of_sentencepiece():
    def pieces(text="the", **changes):
        changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        tokenizer = read(sentencepiece_keys() | changes)
        return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])

    assert pieces() == ["<s>", "▁the"]
    assert pieces(add_space_prefix=False) == ["<s>", "t", "he"]
    assert pieces(add_bos_token=False) == ["▁the"]
    assert pieces(add_eos_token=True) == ["<s>", "▁the", "</s>"]
    assert pieces(merges=["▁ t"]) == ["<s>", "▁t", "h", "e"]
    assert pieces("the</s>the") == ["<s>", "▁the", "</s>", "▁the"]
    with raises("remove_extra_whitespaces is not supported"):
        pieces(remove_extra_whitespaces=True)
    with raises("scores must have an entry for each of the 500 tokens, found 1"):
        pieces(scores=[0.0])
    keys = {k: v for k, v in sentencepiece_keys().items() if not k.endswith("scores")}
    with raises("key tokenizer.ggml.scores is missing"):
        read(keys)


def test_what_transformers_makes_of_it_is_checked(monkeypatch):
    """Another class could read the same backend in another way."""
    import transformers

    class Other(transformers.PreTrainedTokenizerFast):
        def decode(self, *args, **options):
            return super().decode(*args, **options).upper()

    monkeypatch.setattr(transformers, "PreTrainedTokenizerFast", Other)
    with raises("x.gguf", "decodes"):
        read(keys_of(original("smollm"), "smollm"))


def test_against_transformers(tmp_path):
    """transformers reads the file itself where it has torch."""
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    def change(keys, tensors):
        for key in gguf_files.TOKENIZER:
            del keys[key]
        keys |= keys_of(original("qwen2"), "qwen2") | {"general.name": "x"}
        size = len(keys["tokenizer.ggml.tokens"])
        for name in ("token_embd.weight", "output.weight"):
            tensors[name] = np.ones((size, 8), np.float32)

    path = write_changed(tmp_path / "x.gguf", change, arch="qwen2")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    mine = read_tokenizer(read_header(path))
    assert theirs.eos_token == mine.eos_token
    for text in PROBES:
        if unicodedata.is_normalized("NFC", text):
            assert theirs(text)["input_ids"] == mine(text)["input_ids"]


def test_files_are_written_for_the_folder_of_a_copy(tmp_path):
    from jaxkv.models.hf import generation as hf_generation
    from jaxkv.models.hf import tokenizer as hf_tokenizer

    header = read_header(write_changed(tmp_path / "x.gguf"))
    gguf_tokenizer.write_files(header, tmp_path, 20)
    copy, first = hf_tokenizer.read_tokenizer(tmp_path), read_tokenizer(header)
    for text in ("a abc 12\n\n1", "<|user|>ab<|end|>"):
        assert copy(text)["input_ids"] == first(text)["input_ids"]
    assert copy.chat_template == TEMPLATE
    assert copy.special_tokens_map == first.special_tokens_map
    assert hf_generation.stop_ids(tmp_path) == (0,)
