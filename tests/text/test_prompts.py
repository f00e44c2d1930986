"""What may be handed over as prompts, and what is refused by its name."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import BatchEncoding

import jaxkv
from jaxkv.text.prompts import encode, too_long

TEXTS = ["hello world", "a longer prompt of words", "x"]
NO_LIST = "generate: prompts must be a list of texts or of lists of token ids, got "
NEITHER = "generate: prompt 0 must be a text or a list of token ids, got "
BAD = {
    "nothing": (None, NO_LIST + "the NoneType None"),
    "a number": (5, NO_LIST + "the int 5"),
    "no axes": (np.array(3), NO_LIST + "an array 3 of shape () and dtype int64"),
    "no axes, JAX": (jnp.array(3), NO_LIST + "an array 3 of shape () and dtype int32"),
    "bytes": (b"ab", NO_LIST + "the bytes b'ab'"),
    "bytearray": (bytearray(b"ab"), NO_LIST + "the bytearray"),
    "a set": ({"a"}, NO_LIST + "a set, which is no list"),
    "a frozen set": (frozenset({"a"}), NO_LIST + "a frozenset, which is no list"),
    "a mapping": ({"input_ids": [[5]]}, NO_LIST + "a dict with the keys ['input_ids']"),
    "keys": ({"a": 1}.keys(), NO_LIST + "a dict_keys, which is no list"),
    "its like": (collections.UserDict({"a": 1}), NO_LIST + "a UserDict with the keys"),
    "a generator": ((text for text in "ab"), NO_LIST + "a generator, which is no list"),
    "a key": (jax.random.key(0), NO_LIST + "the PRNGKeyArray"),
    "flat": ([5, 6, 7], NEITHER + "the int 5; prompts are a list of such, as in"),
    "flat, NumPy": (np.array([5, 6]), NEITHER + "an array 5 of shape () and dtype"),
    "flat, JAX": (jnp.array([5, 6, 7]), NEITHER + "an array 5 of shape () and dtype"),
    "none": ([None], NEITHER + "the NoneType None"),
    "a scalar": ([np.array(3)], NEITHER + "an array 3 of shape () and dtype int64"),
    "a scalar, JAX": ([jnp.array(3)], NEITHER + "an array 3 of shape () and dtype"),
    "two axes": ([np.ones((1, 2), int)], NEITHER + "an array of shape (1, 2) and"),
    "fractions": ([[1.7, 2]], "prompts[0][0] must be a whole number, got 1.7"),
    "truth": ([[True]], "prompts[0][0] must be a whole number, got True"),
    "truths": ([jnp.array([True])], NEITHER + "an array of shape (1,) and dtype bool"),
    "an array of fractions": ([np.array([1.5])], NEITHER + "an array of shape (1,) an"),
    "bfloat16": ([jnp.ones(3, jnp.bfloat16)], NEITHER + "an array of shape (3,) and d"),
    "an array of texts": (
        [np.array(["a"])],
        NEITHER + "an array of shape (1,) and",
    ),
    "texts in a list": ([["a b", "c"]], NEITHER + "a list with the str 'a b'"),
    "lists in lists": ([[["a"]]], "prompts[0][0] must be a whole number, got ['a']"),
    "a message": (
        [{"role": "user", "content": "a"}],
        NEITHER + "a dict with the keys ['role', 'content']",
    ),
    "a set of ids": ([{5, 6}], NEITHER + "a set, which is no list"),
    "bytes in a list": ([b"ab"], NEITHER + "the bytes b'ab'"),
    "a view of bytes": ([memoryview(b"ab")], NEITHER + "the memoryview"),
    "keys of JAX": ([jax.random.split(jax.random.key(0))], "must be a whole number"),
    "one encoding in a list": (
        [BatchEncoding({"input_ids": [5], "attention_mask": [1]})],
        NEITHER + "a BatchEncoding with the keys ['input_ids', 'attention_mask']",
    ),
    "half a character": (["\ud800"], "prompt 0 is no valid Unicode: character 0"),
    "an empty text": ([""], "prompt 0 is empty"),
    "no prompts": ([], "got no prompts; pass at least one"),
    "no ids": ([[]], "prompt 0 has no tokens"),
    "masked": (
        np.ma.array([[5, 6], [7, 8]], mask=[[0, 0], [0, 1]]),
        "a masked array has no token ids where it is masked",
    ),
    "no ids of NumPy": ([np.array([])], "prompt 0 has no tokens"),
    "negative": ([[-1]], "prompt 0 has token ids outside [0, 4096)"),
    "beyond the vocabulary": ([np.array([5, 4096])], "ids outside [0, 4096)"),
    "huge": ([[2**70]], "prompts[0][0] must be between -2147483647 and 2147483647"),
}
BAD_ENCODINGS = {
    "overflowing": (
        dict(input_ids=[[5]], attention_mask=[[1]], overflow_to_sample_mapping=[0]),
        "read, but it holds overflow_to_sample_mapping, too; pass its input_ids",
    ),
    "no mask": (
        dict(input_ids=[[5, 0], [5, 6]]),
        "the tokenizer's output may be padded, but has no attention_mask",
    ),
    "no ids": (dict(input_ids=None), "input_ids of the tokenizer's output must be a l"),
    "another shape": (
        dict(input_ids=[[5, 6]], attention_mask=[[1]]),
        "input_ids and attention_mask of the tokenizer's output differ in shape",
    ),
    "a hole": (
        dict(input_ids=[5, 6, 7], attention_mask=[1, 0, 1]),
        "the attention mask of prompt 0 must be ones, and zeros where padding is",
    ),
    "weights": (
        dict(input_ids=[5, 6], attention_mask=[0.5, 1]),
        "the attention mask of prompt 0 must be ones",
    ),
    "all padding": (
        dict(input_ids=[[5], [6]], attention_mask=[[1], [0]]),
        "prompt 1 has no tokens",
    ),
    "no rows": (dict(input_ids=[], attention_mask=[]), "prompt 0 has no tokens"),
    "fractions": (
        dict(input_ids=[[5.5]], attention_mask=[[1]]),
        "must be a whole number, got 5.5",
    ),
}


@pytest.mark.parametrize(("prompts", "message"), BAD.values(), ids=BAD)
def test_bad_prompts_are_named(tiny_lm, prompts, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        jaxkv.generate(tiny_lm, prompts)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("given", "message"), BAD_ENCODINGS.values(), ids=BAD_ENCODINGS
)
def test_bad_encodings_are_named(tiny_lm, given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jaxkv.generate(tiny_lm, BatchEncoding(given))


def lists(rows):
    return [np.asarray(row).tolist() for row in rows]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tensors", [None, "np", "pt"])
def test_what_a_tokenizer_returns_is_its_texts(tiny_lm, side, tensors):
    if tensors == "pt":
        pytest.importorskip("torch")
    want = lists(encode(tiny_lm, TEXTS))
    options = dict(padding=True, padding_side=side, return_tensors=tensors)
    assert lists(encode(tiny_lm, tiny_lm.tokenizer(TEXTS, **options))) == want
    plain = tiny_lm.tokenizer(TEXTS, return_attention_mask=False)
    assert lists(encode(tiny_lm, plain)) == want
    one = tiny_lm.tokenizer(TEXTS[0], return_tensors=tensors)
    assert lists(encode(tiny_lm, one)) == want[:1]


def test_a_padded_batch_generates_what_its_texts_do(tiny_lm):
    encoded = tiny_lm.tokenizer(TEXTS[:2], padding=True, padding_side="left")
    out = jaxkv.generate(tiny_lm, encoded, max_new_tokens=3)
    assert out.text == jaxkv.generate(tiny_lm, TEXTS[:2], max_new_tokens=3).text
    message = [{"role": "user", "content": "hi"}]
    chat = tiny_lm.tokenizer.apply_chat_template(message, return_dict=True)
    assert lists(encode(tiny_lm, chat)) == [chat["input_ids"]]


@given(
    rows=st.lists(st.lists(st.integers(0, 4095), min_size=1, max_size=5), min_size=1),
    left=st.booleans(),
    wrap=st.sampled_from([np.array, jnp.array, list]),
)
def test_the_mask_says_what_is_padding(tiny_lm, rows, left, wrap):
    width = max(map(len, rows))
    ids, mask = np.full((2, len(rows), width), [[[7]], [[0]]])
    for number, row in enumerate(rows):
        place = slice(-len(row), None) if left else slice(len(row))
        ids[number, place], mask[number, place] = row, 1
    given = BatchEncoding({"input_ids": wrap(ids), "attention_mask": wrap(mask)})
    assert lists(encode(tiny_lm, given)) == rows


LISTS = {  # the ids [[5, 6], [7, 8]] or the texts ["a", "b"] in other clothes
    "tuples": ((5, 6), (7, 8)),
    "NumPy": np.array([[5, 6], [7, 8]]),
    "JAX": jnp.array([[5, 6], [7, 8]]),
    "of JAX": [jnp.array([5, 6]), jnp.array([7, 8], jnp.uint8)],
    "numbers of JAX": [[jnp.int32(5), jnp.array(6)], [np.int8(7), np.array(8)]],
    "objects": np.array([[5, 6], [7, 8]], dtype=object),
    "generators": [(i for i in (5, 6)), range(7, 9)],
    "texts": collections.deque(["a", "b"]),
    "texts of NumPy": np.array(["a", "b"]),
    "values": {1: "a", 2: "b"}.values(),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_in_other_clothes(tiny_lm, name):
    want = [[5, 6], [7, 8]]
    if "texts" in name or name == "values":
        want = encode(tiny_lm, ["a", "b"])
    if name == "objects":
        with pytest.raises(ValueError, match=r"of shape .* and dtype object"):
            encode(tiny_lm, LISTS[name])
        return
    assert lists(encode(tiny_lm, LISTS[name])) == lists(want)


def test_tables_are_their_rows_or_refused(tiny_lm):
    class Table:  # as pandas' DataFrame, whose elements are the columns' names
        ndim = 2

        def __len__(self):
            return 1

        def __iter__(self):
            return iter(["prompt"])

        def __array__(self, dtype=None, copy=None):
            return np.array([["a b"]], dtype=object)

    with pytest.raises(ValueError, match=r"of shape .* and dtype object"):
        encode(tiny_lm, Table())


class Counting:
    """A tokenizer that counts the characters it has been given."""

    def __init__(self, tokenizer):
        self._tokenizer, self.characters = tokenizer, 0

    def __call__(self, text, **options):
        self.characters += len(text)
        return self._tokenizer(text, **options)


@given(
    unit=st.text(min_size=1, max_size=8)
    | st.sampled_from(["a", " ", "\n", "the ", "é"]),
    times=st.integers(1, 400),
    most=st.integers(1, 64),
)
def test_what_is_called_too_long_is(tiny_lm, unit, times, most):
    text = unit * times
    counted = len(tiny_lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    found = too_long(tiny_lm.tokenizer, text, most)
    assert not found or counted > most
    if len(text) >= 64 * most and counted > 8 * most + 256:
        assert found


def test_a_prompt_without_end_is_not_tokenised_to_its_end(tiny_lm):
    text = "a 1 " * 1_000_000
    tokenizer = Counting(tiny_lm.tokenizer)
    assert too_long(tokenizer, text, 2048)
    assert tokenizer.characters < 64 * 2048
    said = "prompt 0 has 4000000 characters and more than 2048 tokens, but .* shorten"
    with pytest.raises(ValueError, match=said):
        jaxkv.generate(tiny_lm, text)
