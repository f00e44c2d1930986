"""Reading a tokenizer: `tokenizer.json` is the truth where it exists."""

import codecs
import json
import logging
import subprocess
import sys

import pytest
from hf_checkpoints import raises
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import BOS, EOS, byte_level, pieces, write
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jaxkv.models.hf.tokenizer import encode, read_tokenizer

TEXTS = (
    "the cat and 12 hats, then the end.",
    " the  the\n\n\tthe 12345 ",
    "naïve Straße e\u0301 北京 \u00a0▁ 🙂",
    f"{BOS} the{EOS} the {EOS}",
    "a <tool> the<tool>the <think>\n<tool>",
    "isn 't , it . Ġ <0x41>",
    "",
)
STRIPPING = AddedToken("<think>", lstrip=True, rstrip=True, special=False)
TOKENIZERS = {
    "byte level": byte_level("<tool>"),
    "byte level with BOS": byte_level("<tool>", STRIPPING, bos=BOS),
    "pieces": pieces("<tool>"),
    "pieces with BOS": pieces("<tool>", STRIPPING, bos=BOS),
}
CONFIGS = {
    "plain": {},
    "Llama's class": dict(tokenizer_class="LlamaTokenizerFast", legacy=True),
    "Llama's slow class": dict(tokenizer_class="LlamaTokenizer", legacy=False),
    "Qwen's class": dict(tokenizer_class="Qwen2Tokenizer", add_prefix_space=True),
    "a class of its own": dict(
        tokenizer_class="MyTokenizer", auto_map={"AutoTokenizer": ["mine.Mine", None]}
    ),
    "of transformers 5": dict(tokenizer_class="TokenizersBackend", backend="x"),
    "BOS denied": dict(add_bos_token=False, add_eos_token=True),
    "BOS wanted": dict(add_bos_token=True, tokenizer_class="LlamaTokenizerFast"),
    "short and tidy": dict(model_max_length=4, clean_up_tokenization_spaces=True),
    "specials split": dict(split_special_tokens=True, padding_side="left"),
    "flags that differ": dict(
        added_tokens_decoder={
            "1": dict(content=BOS, lstrip=True, rstrip=True, special=True),
            "2": dict(content=EOS, special=False),
        }
    ),
    "specials it has not": dict(pad_token="<pad>", bos_token="<bos>", eos_token=None),
    "words as specials": dict(bos_token="the", eos_token="he"),
    "specials with flags": dict(
        bos_token=dict(__type="AddedToken", content=BOS, lstrip=True, rstrip=True)
    ),
    "more specials": dict(additional_special_tokens=["<tool>", "the"]),
}


def assert_equal(tokenizer, truth, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == truth.encode(text).ids
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert bare == truth.encode(text, add_special_tokens=False).ids
    for skip in (True, False):
        found = tokenizer.decode(ids, skip_special_tokens=skip)
        assert found == truth.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_json_is_the_truth(tmp_path, name, config, model_type):
    """A `model_type` or a `tokenizer_class` stands for another way to split texts."""
    truth = TOKENIZERS[name]
    folder = write(tmp_path, truth, **CONFIGS[config])
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = read_tokenizer(folder)
    for text in TEXTS:
        assert_equal(tokenizer, truth, text)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """Return each tokenizer as it is read under a class that is not its own."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        name: read_tokenizer(
            write(folder / name, truth, tokenizer_class="LlamaTokenizerFast")
        )
        for name, truth in TOKENIZERS.items()
    }


@given(text=st.text(), name=st.sampled_from(sorted(TOKENIZERS)))
def test_any_text_is_read_as_tokenizer_json_reads_it(read, text, name):
    assert_equal(read[name], TOKENIZERS[name], text)


def test_what_training_left_behind_is_not_followed(tmp_path, caplog):
    truth = byte_level()
    truth.enable_truncation(4)
    truth.enable_padding(length=64)
    tokenizer = read_tokenizer(write(tmp_path, truth, model_max_length=4))
    text = "the end of a text that is longer than four tokens"
    transformers = logging.getLogger("transformers")  # propagates nothing
    transformers.addHandler(caplog.handler)
    try:
        ids = tokenizer(text, verbose=True)["input_ids"]
    finally:
        transformers.removeHandler(caplog.handler)
    assert ids == byte_level().encode(text).ids
    assert not caplog.records  # "sequence length is longer than ..."


def test_special_tokens_have_their_names(tmp_path):
    folder = write(tmp_path, byte_level("<pad>"), eos_token=None, pad_token="<none>")
    names = {"eos_token": {"content": EOS, "special": True}, "bos_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = read_tokenizer(folder)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == (BOS, 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (EOS, 2)
    assert tokenizer.pad_token is None  # it would get an id that the network has not


def added(index, content, **flags):
    return {"added_tokens_decoder": {str(index): {"content": content, **flags}}}


@pytest.mark.parametrize(
    ("config", "file"),
    [
        (added(264, "<tool>", special=True), None),
        ({}, {"<tool>": 264}),
        (added(264, "<tool>", special=True), {"<other>": 7}),
    ],
)
def test_tokens_behind_the_last_one_are_added(tmp_path, config, file):
    truth = byte_level()
    assert truth.get_vocab_size() == 264
    folder = write(tmp_path, truth, **config)
    if file is not None:
        (folder / "added_tokens.json").write_text(json.dumps(file))
    ids = read_tokenizer(folder)("the<tool>the")["input_ids"]
    the = truth.encode("the").ids
    assert ids == [*the, 264, *the]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (added(5, BOS), ["token '<s>' has the id 5", "it has 1", "fetch both files"]),
        (added(5, "<tool>"), ["'<tool>' has the id 5", "it has None", "and 5 is '"]),
        (added(300, "<tool>"), ["'<tool>' has the id 300", "it has 264"]),
        (added("x", "<tool>"), ["must map ids to tokens", "fetch the file again"]),
        (added(264, 5), ["must map ids to tokens"]),
        ({"added_tokens_decoder": [1]}, ["must map ids to tokens"]),
        ({"added_tokens_decoder": {"264": {}}}, ["must map ids to tokens"]),
        ({"bos_token": 1}, ["bos_token must be a token, found 1"]),
        ({"eos_token": "\ud800"}, ["eos_token must be a token, found '\\ud800'"]),
        ({"chat_template": 1}, ["chat_template must be a text", "found int"]),
        ({"chat_template": [{"name": "a"}]}, ["chat_template must be", "found list"]),
    ],
)
def test_config_refuses(tmp_path, config, words):
    with raises("tokenizer_config.json", *words):
        read_tokenizer(write(tmp_path, byte_level(), **config))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["tokenizer.json: the tokenizer cannot be read", "fetch it again"]),
        (b"{}", ["tokenizer.json: the tokenizer cannot be read"]),
        (b'{"version": "1.0", "model": {"type": "New"}}', ["cannot be read"]),
        (b"version https://git-lfs.github.com/spec/v1\n", ["cannot be read"]),
        (b"\xff\xfe", ["tokenizer.json is not UTF-8 text"]),
    ],
)
def test_damaged_tokenizer_json(tmp_path, content, words):
    (write(tmp_path, byte_level()) / "tokenizer.json").write_bytes(content)
    with raises(*words) as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        # The library notices none of these before the tokenizer is used.
        (("post_processor", "special_tokens"), {}),
        (("decoder", "decoders", 3, "stop"), 2**62),
        (("model", "merges", 0), ["a", ""]),
    ],
)
def test_damage_that_shows_late(tmp_path, part, value):
    content = json.loads(pieces(bos=BOS).to_str())
    inner = content
    for key in part[:-1]:
        inner = inner[key]
    inner[part[-1]] = value
    (write(tmp_path, byte_level()) / "tokenizer.json").write_text(json.dumps(content))
    with raises("tokenizer.json: the tokenizer cannot be read", "fetch it again"):
        read_tokenizer(tmp_path)


def test_byte_order_marks(tmp_path):
    folder = write(tmp_path, byte_level(bos=BOS), chat_template="x")
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("y")
    for path in folder.iterdir():
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    tokenizer = read_tokenizer(folder)
    assert tokenizer("the")["input_ids"][0] == 1
    assert tokenizer.chat_template == "y"


JINJA, LEGACY = "chat_template.jinja", "chat_template.json"
MORE = "additional_chat_templates/tool.jinja"


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        ({}, {}, None),
        ({"chat_template": "config"}, {}, "config"),
        ({"chat_template": [{"name": "a", "template": "b"}]}, {}, {"a": "b"}),
        ({"chat_template": "config"}, {JINJA: "jinja"}, "jinja"),
        ({"chat_template": "config"}, {LEGACY: '{"chat_template": "j"}'}, "config"),
        ({}, {LEGACY: '{"chat_template": "json"}'}, "json"),
        ({}, {JINJA: "jinja", LEGACY: "{}"}, "jinja"),
        ({}, {JINJA: "jinja", MORE: "more"}, {"default": "jinja", "tool": "more"}),
    ],
)
def test_chat_templates(tmp_path, config, files, expected):
    folder = write(tmp_path, byte_level(), **config)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    assert read_tokenizer(folder).chat_template == expected


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("added", [0, 1, 2])
def test_one_bos_only(read, name, added):
    """A template that was rendered as text begins with BOS, and so does a prompt."""
    truth, text = TOKENIZERS[name], "the <s> the"
    given = BOS * added + text
    plain = truth.encode(given, add_special_tokens=False).ids
    (ids,) = encode(read[name], [given])
    assert ids[1:].count(1) == max(added - 1, 0) + 1
    assert ids == (plain if added or "BOS" not in name else [1, *plain])


def test_no_vocabulary(tmp_path):
    assert read_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2"}')
    assert read_tokenizer(tmp_path) is None


def test_a_vocabulary_without_letters(tmp_path):
    """Probe texts that a tokenizer cannot read at all do not speak against it."""
    truth = Tokenizer(models.WordLevel(vocab={"the": 0, "end": 1}))
    truth.pre_tokenizer = pre_tokenizers.Whitespace()
    truth.decoder = decoders.WordPiece()
    tokenizer = read_tokenizer(write(tmp_path, truth))
    assert tokenizer("the end")["input_ids"] == [0, 1]


def test_transformers_says_nothing_and_its_log_level_stays(tmp_path):
    """In a process of its own, where transformers is imported for the first time."""
    write(tmp_path, byte_level(), tokenizer_class="LlamaTokenizerFast")
    source = f"""
import logging, pathlib, sys
sys.modules["torch"] = None
from jaxkv.models.hf.tokenizer import read_tokenizer
read_tokenizer(pathlib.Path({str(tmp_path)!r}))("the " * 999)
import transformers
logger = logging.getLogger("transformers")
print(logger.level, len(logger.filters))
transformers.utils.logging.get_logger("transformers.x").warning("heard")
"""
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{logging.WARNING} 0\n"
    assert done.stderr.splitlines()[-1:] == [done.stderr.strip()]
    assert "heard" in done.stderr
