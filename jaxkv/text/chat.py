"""Conversations through a checkpoint's chat template, in token ids."""

import itertools
from collections.abc import Mapping, Sequence

from jaxkv.language_model import NEEDLE, LanguageModel
from jaxkv.text.prompts import too_long


def speaks_in_chats(lm: LanguageModel) -> bool:
    """Return whether a model was made for conversations; needle only has a template."""
    return lm.name != NEEDLE and bool(getattr(lm.tokenizer, "chat_template", None))


def check_template(lm: LanguageModel) -> None:
    """Raise ValueError where a model has no chat template."""
    if lm.tokenizer is None or not lm.tokenizer.chat_template:
        raise ValueError(
            f"{lm.name} has no chat template; write prompts instead of conversations, "
            "for jaxkv.generate, or jaxkv generate without --chat."
        )


def encode_chat(
    lm: LanguageModel, messages: Sequence[Mapping[str, str]], *, answer_prefix: str = ""
) -> list[int]:
    """Return a conversation and the beginning of the assistant's next turn.

    Args:
      lm: a model whose tokenizer has a chat template.
      messages: in their order, each with a "role" (system, user or assistant) and its
        "content".
      answer_prefix: text that the assistant's turn begins with.

    Returns:
      Token ids; special tokens are those of the template.

    Raises:
      ValueError: there is no template, it fails, or it leaves a message out.
    """
    return encode_chats(lm, [messages], answer_prefix=answer_prefix)[0]


def encode_chats(
    lm: LanguageModel,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    *,
    answer_prefix: str = "",
) -> list[list[int]]:
    """Return what `encode_chat` does of each, tokenised in one call, on all cores.

    Args:
      lm: a model whose tokenizer has a chat template.
      conversations: the messages of each.
      answer_prefix: text that each of the assistant's turns begins with.

    Raises:
      ValueError: as `encode_chat`.
    """
    texts = [_render(lm, messages) + answer_prefix for messages in conversations]
    return _encode(lm, texts)


def encode_addition(
    lm: LanguageModel,
    messages: Sequence[Mapping[str, str]],
    answer: str,
    new: Sequence[Mapping[str, str]],
) -> list[int] | None:
    """Return what comes behind the assistant's answer when a conversation goes on.

    Args:
      lm: a model whose tokenizer has a chat template.
      messages: the conversation up to the answer.
      answer: the assistant's, as the tokens that it gave read.
      new: the messages behind it.

    Returns:
      Token ids, the end of the answer's turn first; None where the template writes
      what was before in another way than it did, as those do that take reasoning out.

    Raises:
      ValueError: there is no template, it fails, or it leaves a message out.
    """
    before = _render(lm, messages)
    spoken = {"role": "assistant", "content": answer}
    after = _render(lm, [*messages, spoken, *new])
    for said in (answer, answer.strip()):  # most templates strip
        if after.startswith(before + said):
            return _encode(lm, [after.removeprefix(before + said)])[0]
    return None


_BREAK = "\n\n"  # between a document and what is asked about it


def _mark(lm: LanguageModel, texts: Sequence[str]) -> str:
    """Return what to cut rendered texts at, which neither they nor the template have.

    It ends by another character than it begins with, so that what stands before it and
    a part of it are no other mark.
    """
    seen = [*texts, str(lm.tokenizer.chat_template)]
    marks = (f"\ue000{number}\ue001" for number in itertools.count())
    return next(mark for mark in marks if not any(mark in text for text in seen))


def encode_documents(
    lm: LanguageModel, documents: Sequence[str], *, system: str | None = None
) -> list[list[int]]:
    """Return beginnings of conversations, up to a document in the user's message.

    Args:
      lm: a model whose tokenizer has a chat template.
      documents: what the user's message of each begins with.
      system: what the system says first.

    Returns:
      The token ids of each, tokenised in one call.

    Raises:
      ValueError: there is no template, it fails, or it leaves a message out.
    """
    check_template(lm)
    said = [] if system is None else [{"role": "system", "content": system}]
    mark = _mark(lm, [system or "", *documents])
    texts = [
        _render(lm, [*said, {"role": "user", "content": document + mark}])
        for document in documents
    ]
    return _encode(lm, [text.partition(mark)[0] for text in texts])


def encode_question(
    lm: LanguageModel, *turns: str, between: str = _BREAK, answer_prefix: str = ""
) -> list[int]:
    """Return what follows a document: the question, and the assistant's beginning.

    Args:
      lm: a model whose tokenizer has a chat template.
      *turns: the user's question and, if the conversation has gone on, the assistant's
        answer, the user's next message, and so on.
      between: what stands between document and question.
      answer_prefix: text that the assistant's turn begins with.

    Raises:
      ValueError: there is no template, it fails, or it leaves a message out.
    """
    check_template(lm)
    mark = _mark(lm, turns)
    roles = ("user", "assistant")
    said = [
        {"role": roles[number % 2], "content": turn}
        for number, turn in enumerate((mark + between + turns[0], *turns[1:]))
    ]
    return _encode(lm, [_render(lm, said).partition(mark)[2] + answer_prefix])[0]


def _encode(lm: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of rendered texts, or raise ValueError for what has none."""
    most = lm.config.max_positions
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"a conversation is no valid Unicode: it has {text[error.start]!r}, "
                "half of a pair (a lone surrogate); take it out, or read the text in "
                "its own encoding."
            ) from None
        if too_long(lm.tokenizer, text, most):
            raise ValueError(
                f"a conversation of {len(text)} characters has more than {most} "
                f"tokens, but {lm.name} was made for {most}; shorten it."
            )
    if not texts:
        return []
    return lm.tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def _render(lm: LanguageModel, messages: Sequence[Mapping[str, str]]) -> str:
    """Return a conversation as text, up to the beginning of the assistant's turn."""
    check_template(lm)
    try:
        text = lm.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template is a program, and may raise anything
        raise ValueError(
            f"the chat template of {lm.name} fails: {type(error).__name__}: {error}"
        ) from error
    shown = "".join(text.split())
    for number, message in enumerate(messages, 1):
        # It may take reasoning out of an assistant's message, as some are made to do.
        content = "".join(message["content"].split())
        if message["role"] != "assistant" and content not in shown:
            raise ValueError(
                f"the chat template of {lm.name} leaves out message {number}, of the "
                f"role {message['role']}."
            )
    return text
