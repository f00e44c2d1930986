"""Streamed text is the whole text, whatever a decoder does where tokens meet."""

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from jaxkv.text.terminal import TextStream

SPECIAL = ("<s>", "</s>", "<|end|>")
ADDED = ("<tool>", "日本")  # they are no special tokens


def wrapped(tokenizer: Tokenizer, **options) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.add_tokens([AddedToken(name, special=False) for name in ADDED])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def model(pieces, **options):
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return Tokenizer(models.BPE(vocab=vocab, merges=[], **options))


def of_bytes(*pieces):
    """All bytes as GPT-2 writes them, and pieces that end within characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable}
    letter |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    whole = [" the", " 日本".encode()[:4], "🙂".encode()[:3], b"\xf0\x9f", " é", "\n"]
    encoded = [p if isinstance(p, bytes) else p.encode() for p in (*whole, *pieces)]
    return [*letter.values(), *("".join(letter[b] for b in p) for p in encoded), ""]


def of_words(*pieces):
    """Pieces with spaces in front, and bytes for what they cannot say."""
    words = ["<unk>", "▁", "▁▁", "▁the", "end", ".", "▁.", "'", "▁n't", "é", ""]
    return [*words, "<0xZZ>", "<0xc3>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]


SPACES = decoders.Replace("▁", " ")
BYTES = decoders.ByteFallback()
FUSE = decoders.Fuse()
STREAMED = {  # a vocabulary and a decoder whose text comes while it is made
    "bytes": (of_bytes, decoders.ByteLevel()),
    "bytes in a sequence": (of_bytes, decoders.Sequence([decoders.ByteLevel()])),
    "Llama 2": (of_words, [SPACES, BYTES, FUSE, decoders.Strip(" ", 1, 0)]),
    "twelve spaces": (of_words, [SPACES, BYTES, FUSE, decoders.Strip(" ", 12, 0)]),
    "Gemma": (of_words, [SPACES, BYTES, FUSE]),
    "each piece": (of_words, [SPACES, BYTES, decoders.Strip(" ", 1, 0)]),
    "metaspace": (of_words, [BYTES, decoders.Metaspace()]),
    "metaspace, whole": (of_words, [BYTES, FUSE, decoders.Metaspace()]),
}
HELD = {  # others, whose text comes at the end
    "none": (of_words, None),
    "patterns": (of_words, [decoders.Replace(Regex("▁+"), " "), FUSE]),
    "across tokens": (of_words, [SPACES, FUSE, decoders.Replace(" n", "n")]),
    "bytes of the whole": (of_words, [FUSE, BYTES]),
    "words": (of_words, decoders.WordPiece()),
    "suffixes": (of_words, decoders.BPEDecoder("d")),
    "no token twice": (of_words, decoders.CTC()),
    "both": (of_words, [BYTES, decoders.ByteLevel()]),
}


@functools.cache
def made(name):
    pieces, decoder = (STREAMED | HELD)[name]
    tokenizer = model(pieces(), byte_fallback=pieces is of_words)
    if decoder is not None:
        sequence = isinstance(decoder, list)
        tokenizer.decoder = decoders.Sequence(decoder) if sequence else decoder
    return wrapped(tokenizer)


def streamed(tokenizer, ids, cuts=()):
    """Return the pieces that come before the end, and the text in all."""
    pieces, ends = [], sorted({min(cut, len(ids)) for cut in cuts} | {len(ids)})
    stream = TextStream(tokenizer, pieces.append)
    for first, last in zip([0, *ends], ends, strict=False):
        stream([ids[first:last]])
    before = list(pieces)
    stream.finish(tokenizer.decode(ids, skip_special_tokens=True))
    return before, "".join(pieces)


def ids_of(tokenizer):
    """Draw ids, some of which the tokenizer does not have, and runs of a kind."""
    size = len(tokenizer)
    few = st.lists(st.integers(0, size + 2), min_size=1, max_size=4)
    any_id = st.integers(0, size + 2)
    drawn = few.flatmap(
        lambda ids: st.lists(any_id | st.sampled_from(ids), max_size=40)
    )
    return drawn | st.lists(any_id, max_size=40)


@pytest.mark.parametrize("name", STREAMED | HELD)
@given(data=st.data())
def test_streamed_text_is_the_whole_text(name, data):
    tokenizer = made(name)
    ids = data.draw(ids_of(tokenizer))
    cuts = data.draw(st.lists(st.integers(0, 40)))
    before, text = streamed(tokenizer, ids, cuts or range(len(ids)))
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert name in STREAMED or not before


@pytest.mark.parametrize("name", STREAMED)
def test_text_comes_while_it_is_made(name):
    tokenizer = made(name)
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "d", "<tool>", "d", ".")]
    ids = [i for i in ids if i is not None] * 10
    before, text = streamed(tokenizer, ids, range(len(ids)))
    assert len(before) > 10 and "".join(before) == text


def byte(tokenizer, value):
    return tokenizer.convert_tokens_to_ids(f"<0x{value:02X}>")


def test_a_character_that_later_bytes_spoil_is_held_back():
    tokenizer = made("Llama 2")
    ids = [*(byte(tokenizer, b) for b in (0xC3, 0xA9)), byte(tokenizer, 0xF0)]
    ids += [tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "▁the", "end")]
    before, text = streamed(tokenizer, ids, range(len(ids)))
    assert text == "���" + " theend"
    assert before == ["���" + " the", "end"]


def test_a_token_without_text_ends_a_run_of_bytes():
    tokenizer = made("metaspace")
    ids = [byte(tokenizer, 0xC3), *tokenizer.convert_tokens_to_ids(["", ""])]
    ids += [byte(tokenizer, 0xA9), *tokenizer.convert_tokens_to_ids(["end"])]
    before, text = streamed(tokenizer, ids, range(len(ids)))
    assert text == "".join(before) == "��end"


class Counting:
    """A tokenizer that counts the tokens it has decoded."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.backend_tokenizer = tokenizer.backend_tokenizer
        self.decoded = 0

    def decode(self, ids, **options):
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, **options)


LONG = {  # tokens that come over and over
    "words": ("Llama 2", ["▁the", "end", "."]),
    "one run of bytes": ("Llama 2", ["<0xC3>", "<0xA9>"]),
    "runs of bytes": ("Llama 2", ["<0xC3>", "<0xA9>", "end"]),
    "special tokens": ("Llama 2", ["<s>", "</s>"]),
    "spaces": ("twelve spaces", ["▁"]),
    "nothing": ("Gemma", [""]),
    "nothing, cut": ("twelve spaces", [""]),
    "nothing of each": ("each piece", ["▁"]),
    "text": ("bytes", ["a", "b"]),
    "no characters": ("bytes", ["ð"]),
    "parts of characters": ("bytes", ["ð", "Ł", "Ļ", "Ĥ"]),
    "hidden": ("bytes", ["</s>"]),
}


@pytest.mark.parametrize(("name", "tokens"), LONG.values(), ids=LONG)
@pytest.mark.parametrize("block", [1, 16])
def test_the_work_grows_as_the_text_does(name, tokens, block):
    tokenizer = Counting(made(name))
    ids = made(name).convert_tokens_to_ids(tokens) * 1000
    pieces = []
    stream = TextStream(tokenizer, pieces.append)
    for first in range(0, len(ids), block):
        stream([ids[first : first + block]])
    assert tokenizer.decoded <= 80 * len(ids)
    stream.finish(made(name).decode(ids, skip_special_tokens=True))
    assert "".join(pieces) == made(name).decode(ids, skip_special_tokens=True)


def test_what_transformers_changes_behind_a_decoder_is_held_back():
    class Cleaned(PreTrainedTokenizerFast):
        def _decode(self, *args, **options):
            return super()._decode(*args, **options).replace(" .", ".")

    tokenizer = Cleaned(tokenizer_object=made("Llama 2").backend_tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["end", "▁", ".", "end"])
    before, text = streamed(tokenizer, ids, range(4))
    assert (before, text) == ([], "end.end")


def test_a_decoder_that_takes_off_the_end_is_held_back():
    tokenizer = model(of_words(), byte_fallback=True)
    tokenizer.decoder = decoders.Sequence([SPACES, FUSE, decoders.Strip(" ", 0, 1)])
    tokenizer = wrapped(tokenizer)  # of an empty text it panics, so no random ids
    ids = tokenizer.convert_tokens_to_ids(["end", "▁", "end", "▁"])
    assert streamed(tokenizer, ids, range(4)) == ([], "end end")


def test_any_other_tokenizer_is_held_back():
    class Backwards:
        def decode(self, ids, **_):
            return " ".join(map(str, reversed(ids)))

    assert streamed(Backwards(), [1, 2, 3], range(3)) == ([], "3 2 1")


def test_a_decoder_that_is_not_what_it_says_loses_nothing():
    tokenizer, pieces = made("Gemma"), []
    stream = TextStream(tokenizer, pieces.append)
    stream([tokenizer.convert_tokens_to_ids(["end", "."])])
    stream.finish("another end")
    assert "".join(pieces) == "end.\nanother end"
