"""The tokenizer of a Hugging Face checkpoint folder.

`tokenizer.json` is the truth where it exists: its ids, its decoding, the special tokens
it puts around a text. transformers chooses a class by the model's type and by names in
`tokenizer_config.json`, and that class may split texts in another way, so no class is
chosen here. The other files say what `tokenizer.json` does not: which special token is
which, chat templates, and tokens behind its last id.

Not followed are `add_bos_token` and `add_eos_token` of `tokenizer_config.json` (as in
transformers 5; the post-processor of `tokenizer.json` says the same where both were
saved together), flags of tokens in which it differs, `model_max_length`,
`clean_up_tokenization_spaces`, and truncation or padding left over from training.

Without `tokenizer.json`, transformers reads the older files, and what it made of them
is checked against them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxkv.models import older_tokenizer
from jaxkv.models.checkpoint import CheckpointError, read_json, read_text
from jaxkv.models.quiet import quiet_transformers
from jaxkv.models.tokenizer_checks import PROBES, damage_named, one_line, probe

_FAST = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_NAMED = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token"),
    "mask_token",
)


def read_tokenizer(folder: Path) -> Any:
    """Return the transformers tokenizer of a folder, or None if it has no vocabulary.

    Args:
      folder: of the checkpoint.

    Returns:
      A transformers tokenizer that warns of no length and tidies no decoded text.

    Raises:
      CheckpointError: a file is damaged, or files contradict one another, or
        transformers makes something else of them; the message names the file.
    """
    if (folder / _FAST).exists():
        return _read_fast(folder)
    if older_tokenizer.is_older_tokenizer(folder):
        return older_tokenizer.read_older_tokenizer(folder, _config(folder))
    return None


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of prompts, special tokens included.

    A chat template that was rendered as text often begins with the token that the
    tokenizer, too, puts in front (BOS). It stands there once, not twice.

    Args:
      tokenizer: from `read_tokenizer`.
      texts: one call of the tokenizer reads all, on all cores.
    """
    if not texts:
        return []
    rows = [list(row) for row in tokenizer(list(texts))["input_ids"]]
    for index, ids in enumerate(rows):
        if len(ids) > 1 and ids[0] == ids[1]:
            plain = tokenizer(texts[index], add_special_tokens=False)["input_ids"]
            if len(plain) < len(ids) and plain[0] == ids[0]:
                rows[index] = ids[1:]
    return rows


def _read_fast(folder: Path) -> Any:
    """Return a tokenizer that is `tokenizer.json`, with the other files' names."""
    from tokenizers import Tokenizer

    path = folder / _FAST
    with damage_named(path):
        truth = Tokenizer.from_str(read_text(path))
    truth.no_truncation()
    truth.no_padding()
    config = _config(folder)
    _add_tokens(truth, folder, config)
    with quiet_transformers() as transformers:
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=truth, chat_template=_chat_template(folder, config)
        )
    tokenizer.name_or_path = str(folder)
    for name, token in _special_tokens(folder, config).items():
        # Not handed over above, where transformers would add what it takes for new.
        if truth.token_to_id(token) is not None:
            setattr(tokenizer, name, token)
    specials = [token.content for token in truth.get_added_tokens_decoder().values()]
    with damage_named(path):  # some of it shows when the tokenizer is used
        truth.encode("", add_special_tokens=True)
        for text in ("", *PROBES, "".join(f"a {s} b{s}" for s in specials)):
            probe(
                *(tokenizer, path, text),
                encode=lambda text: truth.encode(text, add_special_tokens=False).ids,
                decode=lambda ids: truth.decode(ids, skip_special_tokens=False),
            )
    return tokenizer


def _config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    return read_json(path) if path.exists() else {}


def _add_tokens(truth: Any, folder: Path, config: dict[str, Any]) -> None:
    """Add the tokens that other files have behind the last id of `tokenizer.json`."""
    from tokenizers import AddedToken

    path = folder / _CONFIG
    listed = config.get("added_tokens_decoder")
    try:
        if listed is not None:
            tokens = {int(index): dict(token) for index, token in listed.items()}
        elif (path := folder / "added_tokens.json").exists():
            tokens = {i: {"content": token} for token, i in read_json(path).items()}
        else:
            return
        for index, token in sorted(tokens.items()):
            token.pop("__type", None)
            content = token["content"]
            if truth.token_to_id(content) is None and truth.id_to_token(index) is None:
                truth.add_tokens([AddedToken(**token)])
            if truth.token_to_id(content) != index:
                raise CheckpointError(
                    f"{path}: the token {content!r} has the id {index}, but in {_FAST} "
                    f"it has {truth.token_to_id(content)}, and {index} is "
                    f"{truth.id_to_token(index)!r}; fetch both files again."
                )
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: its added tokens must map ids to tokens, found "
            f"{one_line(error)}; fetch the file again."
        ) from error


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return which token is BOS, EOS and so on, as far as the files say it."""
    path = folder / _CONFIG
    older = folder / "special_tokens_map.json"
    found = (read_json(older) if older.exists() else {}) | {
        name: token for name, token in config.items() if token is not None
    }
    named = {}
    for name in _NAMED:
        token = found.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if token is None:
            continue
        half = isinstance(token, str) and any(0xD800 <= ord(c) < 0xE000 for c in token)
        if half or not isinstance(token, str):
            raise CheckpointError(
                f"{path}: {name} must be a token, found {found[name]!r}."
            )
        named[name] = token
    return named


def _chat_template(folder: Path, config: dict[str, Any]) -> Any:
    """Return the chat template or templates: a file of its own goes first."""
    files = {
        path.stem: read_text(path)
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    if (path := folder / "chat_template.jinja").exists():
        files["default"] = read_text(path)
    if files:
        return files["default"] if [*files] == ["default"] else files
    path, template = folder / _CONFIG, config.get("chat_template")
    if template is None and (folder / "chat_template.json").exists():
        path = folder / "chat_template.json"
        template = read_json(path).get("chat_template")
    try:
        if isinstance(template, list):
            template = {each["name"]: each["template"] for each in template}
        texts = [*template.values()] if isinstance(template, dict) else [template]
    except (KeyError, TypeError):
        texts = [template]
    if template is not None and not all(isinstance(text, str) for text in texts):
        raise CheckpointError(
            f"{path}: chat_template must be a text, or a list of names and texts, "
            f"found {type(template).__name__}; fetch the file again."
        )
    return template
