"""The shipped tokenizer and the training rows made with it."""

import functools
import json
import pathlib
import shutil

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv import tasks
from jaxkv.needle import rows
from jaxkv.needle import tokenizer as needle_tokenizer

FOLDER = pathlib.Path(__file__).parents[2] / "models" / "needle"


@functools.cache
def tokenizer():
    return tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def ids_of(text):
    return tokenizer().encode(text, add_special_tokens=False).ids


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200).filter(lambda s: "<" not in s))
def test_round_trip(text):
    assert tokenizer().decode(ids_of(text)) == text


@settings(max_examples=100, deadline=None)
@given(st.from_regex(r"[0-9a-f -]{1,60}", fullmatch=True))
def test_each_digit_is_one_token(text):
    tokens = [tokenizer().id_to_token(i) for i in ids_of(text)]
    digits = [token for token in tokens if any(c.isdigit() for c in token)]
    assert all(token.removeprefix("Ġ") in "0123456789" for token in digits)
    assert len(digits) == sum(c.isdigit() for c in text)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.sampled_from([" ", "\n"]), st.text(max_size=60))
def test_cuts_before_a_space_or_line_break_are_clean(before, lead, after):
    before = "x" + before.replace("<", "").strip() + "."
    after = lead + "y" + after.replace("<", "")
    assert ids_of(before) + ids_of(after) == ids_of(before + after)


def test_vocabulary():
    assert tokenizer().get_vocab_size() == needle_tokenizer.VOCAB_SIZE == 4096
    assert [tokenizer().token_to_id(s) for s in needle_tokenizer.SPECIALS] == [
        *range(6)
    ]
    assert max(tokenizer().get_vocab().values()) == 4095
    assert tokenizer().encode("a").ids[0] == tokenizer().token_to_id("<s>")


def test_building_is_deterministic():
    one, two = needle_tokenizer.build(), needle_tokenizer.build()
    assert one.to_str() == two.to_str()


@pytest.mark.parametrize("model_type", [None, "qwen3"])
def test_transformers_loads_it(tmp_path, model_type):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "needle"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(FOLDER / name, folder)
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (
        "<s>",
        "</s>",
        "<pad>",
    )
    text = "kimalo +7 48\n  def f(x):\n\treturn 'é' # 12345"
    ids = loaded(text).input_ids
    assert ids == tokenizer().encode(text).ids
    assert loaded.decode(ids, skip_special_tokens=True) == text
    chat = loaded.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<s><|user|>hi<|end|><|assistant|>"


@pytest.mark.parametrize("length", [512, 2048])
def test_rows(length):
    count = 24
    tokens, weights = rows.rows(
        tokenizer(), length=length, count=count, seed=3, chat=0.5
    )
    assert tokens.shape == weights.shape == (count, length + 1)
    assert tokens.dtype == np.uint16 and weights.dtype == np.float16
    assert tokens.max() < needle_tokenizer.VOCAB_SIZE
    assert set(np.unique(weights)) == {np.float16(0), np.float16(0.1), np.float16(1)}
    special = {s: tokenizer().token_to_id(s) for s in needle_tokenizer.SPECIALS}
    assert (tokens[:, 0] == special["<s>"]).all()
    assert (weights[tokens == special["<s>"]] == 0).all()
    assert (weights[tokens == special["<pad>"]] == 0).all()
    assert (weights[tokens == special["</s>"]] == 1).all()
    assert (tokens != special["<pad>"]).mean() >= 0.9
    for line, loss in zip(tokens, weights, strict=True):
        # What follows an answer's last token is the end of sequence, and only that
        # ends an answer.
        ends = np.flatnonzero((loss[:-1] == 1) & (loss[1:] != 1))
        assert (line[ends] == special["</s>"]).all()


def test_rows_hold_the_answers():
    tokens, weights = rows.rows(
        tokenizer(),
        length=512,
        count=8,
        seed=5,
        mixture={"niah_single_1": 1.0},
        chat=0.0,
    )
    for line, loss in zip(tokens, weights, strict=True):
        line = line[line != 0]
        text = tokenizer().decode(line.tolist(), skip_special_tokens=True)
        answers = tokenizer().decode(line[loss[: len(line)] == 1].tolist()).split()
        assert answers
        assert all(f"is: {answer}." in text for answer in answers)


def test_a_row_depends_on_its_seed_and_index_alone():
    def make(**options):
        return rows.rows(tokenizer(), length=512, **options)

    whole = make(count=6, seed=1)
    again = make(count=6, seed=1)
    part = make(count=2, seed=1, start=3)
    other = make(count=6, seed=2)
    for index in range(2):
        assert np.array_equal(whole[index], again[index])
        assert np.array_equal(whole[index][3:5], part[index])
        assert not np.array_equal(whole[index], other[index])


def test_mixture_covers_all_tasks():
    assert set(rows.MIXTURE) == set(tasks.TASKS)
    assert sum(rows.MIXTURE.values()) == pytest.approx(1.0)


def test_row_errors_say_what_to_do():
    with pytest.raises(ValueError, match="length"):
        rows.rows(tokenizer(), length=64, count=1, seed=0)
    with pytest.raises(ValueError, match="mixture"):
        rows.rows(tokenizer(), length=512, count=1, seed=0, mixture={"x": 1.0})
    other = tokenizers.Tokenizer(tokenizers.models.BPE())
    with pytest.raises(ValueError, match=r"jaxkv\.needle\.tokenizer"):
        rows.rows(other, length=512, count=1, seed=0)
