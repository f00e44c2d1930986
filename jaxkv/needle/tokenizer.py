"""Build the tokenizer of the checkpoint shipped with the package.

Byte-level BPE with 4,096 tokens. A digit is always a token of its own, so that
numbers and UUIDs have one spelling in tokens wherever they stand behind a space.

Run as `python -m jaxkv.needle.tokenizer OUT_DIR`.
"""

import json
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxkv import tasks
from jaxkv.tasks import lexicon, passages

VOCAB_SIZE = 4096
MAX_LENGTH = 8192
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
SPECIALS = (PAD, BOS, EOS, USER, ASSISTANT, END)

# Letters, one digit or a run of signs, each with the space before it; then white
# space. No piece runs over a line break, so text cut before a space or a line break
# gives the same tokens as the whole.
SPLIT = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

# The answer of the assistant ends with the end of sequence, as without a template.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}<|user|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _rough_count(text: str) -> int:
    """Tokens of a text, about right: sizes samples before there is a tokenizer."""
    return len(text) // 3 + 1


def training_texts(seed: int = 0) -> Iterator[str]:
    """Yield the text the vocabulary is learned from; train split only."""
    # So many pseudo-words that every syllable is merged before a pair of letters
    # that runs over two syllables: a name then has one token a syllable.
    rng = np.random.default_rng(seed)
    for _ in range(40):
        words = lexicon.names(rng, 1500, "train")
        yield " ".join(words[:1000]) + "\n" + "\n".join(words[1000:])
    for index, task in enumerate(tasks.TASKS):
        rng = np.random.default_rng([seed, index])
        for _ in range(12):
            sample = tasks.make(
                task,
                rng,
                length=2048,
                count_tokens=_rough_count,
                split="train",
            )
            yield sample.prompt + sample.answer
    for document in passages.topic_documents("train"):
        yield "\n\n".join(document)
    for document in passages.stdlib_documents("train"):
        yield "\n\n".join(document[:60])


def build(texts: Iterator[str] | None = None) -> tokenizers.Tokenizer:
    """Train the tokenizer; the same texts give the same tokenizer."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        # Keeps rulers and indents of every width from filling the vocabulary.
        max_token_length=16,
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts() if texts is None else texts, trainer)
    size = tokenizer.get_vocab_size()
    if size != VOCAB_SIZE:
        raise ValueError(
            f"Expected a vocabulary of {VOCAB_SIZE} tokens, got {size}. "
            "Train on more text."
        )
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return tokenizer


def save(tokenizer: tokenizers.Tokenizer, folder: str | pathlib.Path) -> None:
    """Write the files `transformers.AutoTokenizer.from_pretrained` reads."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [USER, ASSISTANT, END],
        "model_max_length": MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }
    names = ("bos_token", "eos_token", "pad_token", "additional_special_tokens")
    special = {name: config[name] for name in names}
    for name, content in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
    ):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Build the tokenizer and write it to the folder named."""
    if len(arguments) != 1:
        raise SystemExit(
            f"Expected one argument, the folder to write to, got {arguments}. "
            "Run: python -m jaxkv.needle.tokenizer OUT_DIR"
        )
    save(build(), arguments[0])
    print(f"Wrote {VOCAB_SIZE} tokens to {arguments[0]}.")


if __name__ == "__main__":
    main(sys.argv[1:])
