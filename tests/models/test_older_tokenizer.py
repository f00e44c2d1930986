"""Tokenizers without `tokenizer.json`, as transformers reads them."""

import codecs
import json
import logging

import pytest
from hf_checkpoints import raises
from small_tokenizers import byte_level

from jaxkv.models.hf.tokenizer import read_tokenizer


def write_words(folder, tokenizer_class, model_type="qwen2"):
    """Write a vocabulary as Qwen did before `tokenizer.json`."""
    byte_level().model.save(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = {"tokenizer_class": tokenizer_class, "model_max_length": 4}
    if tokenizer_class is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize(
    ("tokenizer_class", "model_type"),
    [("Qwen2Tokenizer", "qwen2"), ("GPT2Tokenizer", "llama"), (None, "qwen2")],
)
def test_older_words(tmp_path, caplog, tokenizer_class, model_type, mark):
    folder = write_words(tmp_path, tokenizer_class, model_type)
    for path in folder.glob("*.json"):
        path.write_bytes(mark + path.read_bytes())
    transformers = logging.getLogger("transformers")  # propagates nothing
    transformers.addHandler(caplog.handler)
    try:
        tokenizer = read_tokenizer(folder)
        ids = tokenizer("the cat of the", verbose=True)["input_ids"]
    finally:
        transformers.removeHandler(caplog.handler)
    assert ids == byte_level().encode("the cat of the").ids
    assert tokenizer.decode(ids) == "the cat of the"
    assert not caplog.records
    assert tokenizer.model_max_length > 10**9


@pytest.mark.parametrize(
    ("tokenizer_class", "damage", "words"),
    [
        ("LlamaTokenizer", None, ["vocab.json", "gives the token", "the id None"]),
        ("Qwen2Tokenizer", "merges.txt", ["transformers cannot read the tokenizer"]),
        ("Qwen2Tokenizer", "vocab.json", ["vocab.json is not valid JSON"]),
    ],
)
def test_older_words_refuse(tmp_path, tokenizer_class, damage, words):
    """A class for other files takes none of these, and would read every text as ''."""
    folder = write_words(tmp_path, tokenizer_class, "llama")
    if damage == "merges.txt":
        (folder / damage).unlink()
    elif damage:
        (folder / damage).write_text("{")
    with raises(*words) as caught:
        read_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_no_code_of_a_checkpoint_is_run_nor_asked_for(tmp_path, monkeypatch):
    folder = write_words(tmp_path, "MineTokenizer", "llama")
    path = folder / "tokenizer_config.json"
    mine = {"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | mine))
    (folder / "mine.py").write_text("raise SystemExit")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with raises("transformers cannot read the tokenizer", "put a tokenizer.json"):
        read_tokenizer(folder)


def test_sentencepiece_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with raises("tokenizer.model is read by", "pip install sentencepiece"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "Qwen2Tokenizer", None])
@pytest.mark.parametrize("bos", [True, False, None])
def test_sentencepiece(tmp_path, tokenizer_class, bos):
    sentencepiece = pytest.importorskip("sentencepiece")
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat and the hat of 12 cats"] * 20),
            **dict(model_writer=file, model_type="bpe", vocab_size=300),
            **dict(byte_fallback=True, minloglevel=2, hard_vocab_limit=False),
            **dict(normalization_rule_name="identity", remove_extra_whitespaces=False),
        )
    config = {"tokenizer_class": tokenizer_class, "add_bos_token": bos}
    config = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = read_tokenizer(tmp_path)
    truth = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "tokenizer.model")
    )
    for text in ("the cat", "  12  cats\n", "北京"):
        first = [] if bos is False else [truth.bos_id()]
        assert tokenizer(text)["input_ids"] == [*first, *truth.encode(text)]
