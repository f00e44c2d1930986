"""The tokenizer and the chat template out of the metadata of a GGUF file.

transformers reads them with torch only, and splits the text of some vocabularies in
another way than they were made with, so they are put together here.
"""

import itertools
import json
from pathlib import Path
from typing import Any

from jaxkv.models.checkpoint import CheckpointError
from jaxkv.models.checkpoint_values import shown
from jaxkv.models.gguf.config import stop_ids
from jaxkv.models.gguf.header import Header
from jaxkv.models.quiet import quiet_transformers
from jaxkv.models.tokenizer_checks import check, one_line

_PREFIX = "tokenizer.ggml."
_CONTROL, _USER_DEFINED = 3, 4  # of `token_type`
_SPACE = "▁"  # what sentencepiece writes for a space

# How text is cut before merges: the pattern of GPT-2, and those that others follow.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BREAKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_START = r"[^\r\n\p{L}\p{N}]?"
_WORDS = rf"{_START}\p{{L}}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = "GPT-2"
_DIGITS = "digits, then GPT-2"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}|{_BREAKS}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_SIGNS}|{_BREAKS}"
_TEKKEN = (
    rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BREAKS}"
)
_SPLITS = {
    None: _GPT2,
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
# Vocabularies whose tokens are taken whole where a piece of text is one, and which
# begin a text with a token of its own unless the file says otherwise.
_WHOLE = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "tekken"})
_COMPOSED = "qwen2"  # joins accents to their letters first


def read_tokenizer(header: Header) -> Any:
    """Return the transformers tokenizer of a file, or None if it has none.

    Args:
      header: of the file.

    Returns:
      A `PreTrainedTokenizerFast` with the file's special tokens and chat template.

    Raises:
      CheckpointError: if the tokenizer is of an unsupported kind, or one of its keys is
        missing or damaged; the message names the key.
    """
    if header.metadata.get(_PREFIX + "model") in (None, "none", "no_vocab"):
        if _PREFIX + "tokens" in header.metadata:
            raise header.error(f"key {_PREFIX}model is missing.")
        return None
    try:
        return _read(_Keys(header.metadata))
    except CheckpointError as error:
        raise header.error(str(error)) from None


def write_files(header: Header, folder: Path, vocab_size: int) -> None:
    """Write tokenizer and stop ids as the files of a Hugging Face folder.

    Args:
      header: of the GGUF file.
      folder: where they go.
      vocab_size: of the network.

    Raises:
      CheckpointError: as `read_tokenizer` and `stop_ids` do.
    """
    tokenizer = read_tokenizer(header)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    ids = {"eos_token_id": list(stop_ids(header, vocab_size))}
    (folder / "generation_config.json").write_text(json.dumps(ids) + "\n", "utf-8")


def _read(keys: "_Keys") -> Any:
    from tokenizers import AddedToken

    model = keys.metadata[_PREFIX + "model"]
    if model not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{_PREFIX}model={shown(model)} is not supported; supported: 'gpt2', "
            "'llama'."
        )
    tokens = keys.array("tokens", str)
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(t for i, t in enumerate(tokens) if ids[t] != i)
        raise CheckpointError(f"{_PREFIX}tokens has {shown(twice)} twice.")
    backend = _byte_level(keys, ids) if model == "gpt2" else _sentencepiece(keys, ids)
    types = keys.array("token_type", int, length=len(tokens))
    for kind, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(token, normalized=False, special=is_special)
            for token, of in zip(tokens, types, strict=True)
            if of == kind and token
        ]
        (backend.add_special_tokens if is_special else backend.add_tokens)(added)
    special = {
        name: tokens[index]
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
        if (index := keys.token_id(key, len(tokens))) is not None
    }
    begins = model == "llama" or keys.metadata.get(_PREFIX + "pre") in _WHOLE
    backend.post_processor = _ends(
        ids,
        special.get("bos_token") if keys.flag("add_bos_token", begins) else None,
        special.get("eos_token") if keys.flag("add_eos_token", False) else None,
    )
    template = keys.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise CheckpointError("tokenizer.chat_template must be a text.")
    with quiet_transformers() as transformers:
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=template,
            clean_up_tokenization_spaces=False,
            **special,
        )
    check(
        tokenizer,
        "the tokenizer",
        vocabulary=ids,
        encode=lambda text: backend.encode(text, add_special_tokens=False).ids,
        decode=lambda numbers: backend.decode(numbers, skip_special_tokens=False),
    )
    return tokenizer


def _byte_level(keys: "_Keys", ids: dict[str, int]) -> Any:
    """Return a tokenizer that merges bytes within the pieces that a pattern cuts."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre

    name = keys.metadata.get(_PREFIX + "pre")
    if name not in tuple(_SPLITS):
        raise CheckpointError(
            f"{_PREFIX}pre={shown(name)} is not supported; supported: "
            f"{', '.join(repr(key) for key in _SPLITS if key)}."
        )
    split = _SPLITS[name]
    backend = Tokenizer(
        _bpe(models.BPE, ids, keys.merges(), ignore_merges=name in _WHOLE)
    )
    if name == _COMPOSED:
        backend.normalizer = normalizers.NFC()
    steps: list[Any] = []
    if split == _DIGITS:
        steps.append(pre.Digits(individual_digits=True))
    elif split != _GPT2:
        steps.append(pre.Split(Regex(split), behavior="isolated"))
    own = split in (_GPT2, _DIGITS)
    steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=own))
    backend.pre_tokenizer = pre.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(keys: "_Keys", ids: dict[str, int]) -> Any:
    """Return a tokenizer that merges characters, and falls back to bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    if keys.flag("remove_extra_whitespaces", False):
        raise CheckpointError(f"{_PREFIX}remove_extra_whitespaces is not supported.")
    if _PREFIX + "merges" in keys.metadata:
        merges = keys.merges()
    else:
        merges = _merges(ids, keys.array("scores", float, length=len(ids)))
    unknown = keys.token_id("unknown", len(ids))
    backend = Tokenizer(
        _bpe(
            models.BPE,
            ids,
            merges,
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else list(ids)[unknown],
        )
    )
    prefix = keys.flag("add_space_prefix", True)
    # As sentencepiece does it: a space more, also before one and behind special tokens.
    replace = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), replace] if prefix else [replace]
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges(ids: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Return all ways to make a token of two, those of the best score first."""
    found: list[tuple[float, tuple[str, str]]] = []
    for token, index in ids.items():
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in ids and right in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += zip(itertools.repeat(-scores[index]), pairs, strict=False)
    return [pair for _, pair in sorted(found, key=lambda entry: entry[0])]


def _bpe(make: Any, ids: dict[str, int], merges: list[Any], **options: Any) -> Any:
    try:
        return make(vocab=ids, merges=merges, **options)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(
            f"{_PREFIX}merges does not fit {_PREFIX}tokens ({one_line(error)})."
        ) from error


def _ends(ids: dict[str, int], bos: str | None, eos: str | None) -> Any:
    """Return what puts special tokens before and behind a text."""
    from tokenizers.processors import TemplateProcessing

    def around(text: str) -> str:
        return " ".join(part for part in (bos, text, eos) if part)

    return TemplateProcessing(
        single=around("$A"),
        pair=f"{around('$A')} {around('$B:1')}",
        special_tokens=[(token, ids[token]) for token in {bos, eos} if token],
    )


class _Keys:
    """The keys of the tokenizer, each held against its type."""

    def __init__(self, metadata: dict[str, Any]):
        self.metadata = metadata

    def array(self, key: str, kind: type, length: int | None = None) -> list[Any]:
        value = self.metadata.get(_PREFIX + key)
        if value is None:
            raise CheckpointError(f"key {_PREFIX}{key} is missing.")
        if not isinstance(value, list) or not all(type(x) is kind for x in value):
            raise CheckpointError(
                f"{_PREFIX}{key} must be an array of {kind.__name__}."
            )
        if length is not None and len(value) != length:
            raise CheckpointError(
                f"{_PREFIX}{key} must have an entry for each of the {length} tokens, "
                f"found {len(value)}."
            )
        return value

    def merges(self) -> list[tuple[str, str]]:
        pairs = []
        for merge in self.array("merges", str):
            left, space, right = merge.partition(" ")
            if not space or " " in right:
                raise CheckpointError(
                    f"{_PREFIX}merges has {shown(merge)}; expected two tokens and a "
                    "space between them."
                )
            pairs.append((left, right))
        return pairs

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(_PREFIX + key, default)
        if type(value) is not bool:
            raise CheckpointError(
                f"{_PREFIX}{key} must be a bool, found {shown(value)}."
            )
        return value

    def token_id(self, key: str, size: int) -> int | None:
        name = f"{_PREFIX}{key}_token_id"
        value = self.metadata.get(name)
        if value is not None and (type(value) is not int or not 0 <= value < size):
            raise CheckpointError(
                f"{name} must be a token id below {size}, found {shown(value)}."
            )
        return value
