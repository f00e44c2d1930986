"""Damaged GGUF files: one line each, naming the key or the tensor."""

import struct

import pytest
from gguf_files import load, write_changed
from hf_checkpoints import raises
from hypothesis import given
from hypothesis import strategies as st

from jaxkv.models.checkpoint import CheckpointError
from jaxkv.models.gguf.header import read_header

FIRST, LAST = "token_embd.weight", "blk.1.ffn_down.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_changed(tmp_path_factory.mktemp("gguf") / "whole.gguf").read_bytes()


SECTIONS = {
    "nothing": (0, "the first bytes"),
    "within the magic": (3, "the first bytes"),
    "within the version": (6, "the first bytes"),
    "within the counts": (20, "the first bytes"),
    "before the first key": (24, "the name of metadata key 0"),
    "within the first key": (40, "the name of metadata key 0"),
}


@pytest.mark.parametrize("section", SECTIONS)
def test_truncated_at_the_start(tmp_path, whole, section):
    length, what = SECTIONS[section]
    path = tmp_path / "x.gguf"
    path.write_bytes(whole[:length])
    with raises(path, what, "truncated or damaged", "fetch the file again"):
        load(path)


@pytest.mark.parametrize(
    ("behind", "extra", "what"),
    [
        ("general.architecture", 2, "key 'general.architecture'"),
        ("llama.block_count", 6, "key 'llama.block_count'"),
        ("tokenizer.ggml.tokens", 40, "key 'tokenizer.ggml.tokens'"),
        ("tokenizer.ggml.token_type", 20, "key 'tokenizer.ggml.token_type'"),
        ("tokenizer.ggml.merges", 18, "key 'tokenizer.ggml.merges'"),
        ("tokenizer.chat_template", 20, "key 'tokenizer.chat_template'"),
        (LAST, 0, f"the entry of tensor '{LAST}'"),
        (LAST, 30, f"the entry of tensor '{LAST}'"),
    ],
)
def test_truncated_within_the_header(tmp_path, whole, behind, extra, what):
    path = tmp_path / "x.gguf"
    path.write_bytes(whole[: whole.index(behind.encode()) + len(behind) + extra])
    with raises(path, what, "truncated or damaged"):
        load(path)


def test_truncated_within_the_numbers(tmp_path, whole):
    """The first tensor that is not whole is named."""
    path = tmp_path / "x.gguf"
    path.write_bytes(whole)
    tensors = read_header(path).tensors.values()
    assert len(tensors) == 21
    for tensor in tensors:
        path.write_bytes(whole[: tensor.offset + tensor.rows * tensor.row_bytes - 1])
        with raises(path, f"tensor {tensor.name!r}", "truncated or damaged"):
            load(path)


@given(data=st.data())
def test_cut_anywhere(tmp_path_factory, whole, data):
    """Padding behind the last number may go, nothing else."""
    path = tmp_path_factory.mktemp("x") / "x.gguf"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 32))])
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@given(data=st.data())
def test_any_damage_is_a_checkpoint_error_or_none(tmp_path_factory, whole, data):
    """Bytes of the header are overwritten; nothing runs out of time or memory."""
    start = data.draw(st.integers(0, whole.index(b"output_norm")))
    junk = data.draw(st.binary(min_size=1, max_size=9))
    path = tmp_path_factory.mktemp("x") / "x.gguf"
    path.write_bytes(whole[:start] + junk + whole[start + len(junk) :])
    try:
        load(path)
    except CheckpointError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def overwrite(content, position, value):
    return content[:position] + value + content[position + len(value) :]


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, b"GGML", ["is no GGUF file", "starts with b'GGML'"]),
        (0, b"PK\x03\x04", ["is no GGUF file"]),
        (4, struct.pack("<I", 1), ["GGUF version 1 is not supported"]),
        (4, struct.pack("<I", 9), ["GGUF version 9", "supported: 2, 3"]),
        (4, struct.pack(">I", 3), ["is not supported", "big-endian"]),
        (8, struct.pack("<Q", 2**60), ["the entry of tensor ''", "has 0 dimensions"]),
        (16, struct.pack("<Q", 2**60), ["key"]),
        (24, struct.pack("<Q", 2**60), ["the name of metadata key 0", "takes"]),
        (32, b"\xff", ["the name of metadata key 0", "is not UTF-8"]),
        (32, b"a\nb", ["the name of metadata key 0", "is 'a\\nb"]),
        (52, struct.pack("<I", 77), ["'general.architecture'", "of type 77"]),
    ],
)
def test_damaged_starts(tmp_path, whole, position, value, words):
    path = tmp_path / "x.gguf"
    path.write_bytes(overwrite(whole, position, value))
    with raises(path, *words):
        load(path)


def test_a_version_2_file_is_read(tmp_path, whole):
    path = tmp_path / "x.gguf"
    path.write_bytes(overwrite(whole, 4, struct.pack("<I", 2)))
    load(path)


@pytest.mark.parametrize(
    ("behind", "value", "words"),
    [
        ("tokenizer.ggml.tokens", (9, 8, 2**60), ["tokens'", "truncated or damaged"]),
        ("tokenizer.ggml.token_type", (9, 5, 2**62), ["token_type'", "takes"]),
        ("tokenizer.ggml.token_type", (9, 9, 1), ["token_type'", "of type 9"]),
    ],
)
def test_damaged_arrays(tmp_path, whole, behind, value, words):
    """A length is held against the file before an array is made for it."""
    position = whole.index(behind.encode()) + len(behind)
    path = tmp_path / "x.gguf"
    path.write_bytes(overwrite(whole, position, struct.pack("<IIQ", *value)))
    with raises(path, *words):
        load(path)


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (0, struct.pack("<I", 0), ["has 0 dimensions"]),
        (0, struct.pack("<I", 5), ["has 5 dimensions"]),
        (4, struct.pack("<Q", 2**63), ["ends at byte"]),
        (20, struct.pack("<I", 4), ["is of type 4", "does not know"]),
        (20, struct.pack("<I", 2), ["rows of 12 numbers", "32", "Q4_0"]),
        (24, struct.pack("<Q", 64), ["lies at offset 64"]),
        (24, struct.pack("<Q", 2**63), ["lies at offset"]),
    ],
)
def test_damaged_entries(tmp_path, whole, offset, value, words):
    position = whole.index(LAST.encode()) + len(LAST) + offset
    path = tmp_path / "x.gguf"
    path.write_bytes(overwrite(whole, position, value))
    with raises(path, LAST, *words):
        load(path)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("llama.block_count", "llama.vocab_size!"),
        ("blk.0.attn_q.weight", "blk.1.attn_q.weight"),
    ],
)
def test_names_that_occur_twice(tmp_path, first, second):
    def change(keys, tensors):
        keys["llama.vocab_size!"] = 1

    content = write_changed(tmp_path / "x.gguf", change).read_bytes()
    (tmp_path / "x.gguf").write_bytes(content.replace(second.encode(), first.encode()))
    with raises(tmp_path, first, "occurs twice"):
        load(tmp_path / "x.gguf")


def test_bytes_behind_the_last_tensor(tmp_path, whole):
    """Else an alignment that is too small would shift every number."""
    path = tmp_path / "x.gguf"
    path.write_bytes(whole + b"\0")
    with raises(path, "the file goes on after its last tensor"):
        load(path)


def test_a_file_that_cannot_be_read(tmp_path):
    with raises(tmp_path / "x.gguf", "cannot be read (No such file or directory)"):
        read_header(tmp_path / "x.gguf")
