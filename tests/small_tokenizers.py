"""Small tokenizers of the two kinds that checkpoints have, and their files."""

import json

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

BOS, EOS, UNKNOWN = "<s>", "</s>", "<unk>"
_MERGES = ["t h", "th e", "Ġ the", "Ġ a", "1 2"]


def byte_level(*specials, bos=None):
    """Return byte-level BPE, as GPT-2, Llama 3 and Qwen have it.

    Args:
      *specials: more special tokens than BOS and EOS, or `AddedToken`s.
      bos: the token put in front of a text.
    """
    vocab = {UNKNOWN: 0, BOS: 1, EOS: 2}
    for piece in (
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        *(merge.replace(" ", "") for merge in _MERGES),
    ):
        vocab.setdefault(piece, len(vocab))
    merges = [tuple(merge.split()) for merge in _MERGES]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finish(tokenizer, specials, bos)


def pieces(*specials, bos=None):
    """Return metaspace pieces with byte fallback, as Llama 2 and CodeQwen have them."""
    vocab = {UNKNOWN: 0, BOS: 1, EOS: 2} | {f"<0x{i:02X}>": i + 3 for i in range(256)}
    for piece in ("▁", *"abcdefghijklmnopqrstuvwxyz0123456789.,", "▁t", "he", "▁the"):
        vocab.setdefault(piece, len(vocab))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[("▁", "t"), ("h", "e"), ("▁t", "he")],
            unk_token=UNKNOWN,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _finish(tokenizer, specials, bos)


def write(folder, tokenizer, **config):
    """Write `tokenizer.json` and `tokenizer_config.json`; return the folder."""
    folder.mkdir(exist_ok=True, parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = dict(bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN) | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _finish(tokenizer, specials, bos):
    tokens = (BOS, EOS, *specials)
    tokenizer.add_special_tokens(
        [
            t if isinstance(t, AddedToken) else AddedToken(t, special=True)
            for t in tokens
        ]
    )
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer
