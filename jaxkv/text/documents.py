"""`jaxkv.compress`: documents in, a context out."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxkv import soundness
from jaxkv.contexts import context as contexts
from jaxkv.contexts.context import Context, Documents
from jaxkv.expected import check_text, check_truth
from jaxkv.kernels import prefill as prefill_kernels
from jaxkv.kernels import window_scores
from jaxkv.language_model import LanguageModel, check_model
from jaxkv.policies.base import PrefillPolicy
from jaxkv.speculation.drafters import Drafter
from jaxkv.text import arguments, planning
from jaxkv.text.chat import encode_documents, encode_question
from jaxkv.text.planning import Plan, bucket
from jaxkv.text.prompts import Prompts, encode


def compress(
    lm: LanguageModel,
    documents: Prompts,
    *,
    budget: int | Sequence[int] | None = None,
    compression_ratio: float | None = None,
    prefill: PrefillPolicy | None = None,
    question: Prompts | None = None,
    chat: bool = False,
    system: str | None = None,
    speculate: Drafter | None = None,
    prefill_implementation: prefill_kernels.Implementation | None = None,
    scores_implementation: window_scores.Implementation | None = None,
) -> Context:
    """Read documents once, keep a budget of each, to be asked any number of times.

    Args:
      lm: from `jaxkv.load`.
      documents: as the prompts of `generate`.
      budget: tokens that each layer and head may keep of a document; one number, or one
        for each. None keeps everything. Where the documents are one list several times
        over, with other budgets each time, each is read once.
      compression_ratio: another way to say it: the fraction of each document that is
        removed.
      prefill: what chooses them; None is `Full()`.
      question: what the choice should serve, one for all documents or one for each. The
        policy sees it as the end of a prompt, and nothing of it is kept: ask it, or
        another, of the context. Without it, the document's own end is looked at.
      chat: whether documents, then texts, begin a user's message of the chat template.
        Questions that are texts end it, and the assistant's turn begins.
      system: what the system says first, with `chat`.
      speculate: the drafter of answers to come, if it looks at what the network held
        likeliest along the document, as `Aligned()` does; others need no mention here.
      prefill_implementation: see `jaxkv.kernels.prefill`.
      scores_implementation: see `jaxkv.kernels.window_scores`.

    Returns:
      The context, for `generate(context=)`.

    Raises:
      ValueError: bad documents or options; the message says what to do.
      LogitsError: the network gives NaN or infinity; a ValueError, too.
      NotImplementedError: a named implementation cannot run here.
    """
    with speaking_of("compress", "document"):
        options = arguments.static_options(
            "generate",
            prefill=prefill,
            speculate=speculate,
            prefill_implementation=prefill_implementation,
            scores_implementation=scores_implementation,
        )
        check_model("generate", lm)
        check_truth("generate", chat=chat)
        if chat:
            documents = _in_chat(lm, documents, system)
        elif system is not None:
            raise ValueError("generate: system= does nothing without chat=True.")
        ids = encode(lm, documents)
        budgets = planning.row_budgets(budget, compression_ratio, ids, evicts=False)
        options.check(budgets)
        asked = _asked(lm, question, len(ids), chat=chat)
        rows = [[*row, *more] for row, more in zip(ids, asked, strict=True)]
        fit = None
        if budgets is not None:  # none of the question is kept
            both = zip(budgets, asked, strict=True)
            fit = tuple(kept + len(more) for kept, more in both)
        behind = "a token behind it"
        arguments.check_fit(lm, rows, 1, options, fit, output=behind)
    plan = planning.plan(
        *(ids, options, budgets), max_new_tokens=0, windows=lm.config.windows
    )
    distinct = plan.distinct if question is None else len(ids)
    lengths, sizes = (
        np.array([len(row) for row in each], np.int32) for each in (ids, asked)
    )
    texts = (padded(rows)[:distinct], lengths[:distinct], sizes[:distinct])
    read = (lm.network, lm.params, *texts)
    shapes: dict[str, Any] = {
        "slots": plan.slots,
        "options": dataclasses.replace(plan.options, speculate=None),
    }
    keep: Any = plan.keep
    # Documents are the host's: these transfers are meant.
    with jax.transfer_guard("allow"):
        if distinct == len(ids):
            noted = options.speculate is not None and options.speculate.likeliest
            found = contexts.read_documents_jit(*read, keep, **shapes, likeliest=noted)
        else:
            keep = keep.reshape(-1, distinct)
            found = contexts.read_copies_jit(*read, keep, **shapes)
        _check(lm, found, plan)
        return Context(
            cache=found.cache,
            tokens=jax.numpy.asarray(padded(ids)),
            lengths=jax.numpy.asarray(lengths),
            kept=contexts.most_kept(found),
            logits=found.logits,
            likeliest=found.likeliest,
            identity=lm.identity,
            policy=repr(options.prefill),
            chat=chat,
        )


def encode_questions(
    lm: LanguageModel, prompts: Prompts, *, chat: bool
) -> list[Sequence[int]]:
    """Return the token ids of questions.

    Args:
      lm: the model.
      prompts: the questions.
      chat: whether texts end a user's message that a document has begun.
    """
    if chat:
        if isinstance(prompts, str):
            prompts = [prompts]
        if isinstance(prompts, list | tuple):
            prompts = [
                encode_question(lm, prompt) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ]
    return encode(lm, prompts, behind=True)


def _in_chat(lm: LanguageModel, documents: Any, system: str | None) -> list[Any]:
    """Return documents with the beginning of a user's message in front of them."""
    if system is not None:
        check_text("generate", system=system)
    texts = [documents] if isinstance(documents, str) else documents
    if not isinstance(texts, list | tuple) or not all(
        isinstance(text, str) for text in texts
    ):
        raise ValueError(
            "generate: chat=True takes a list of texts, got "
            f"{arguments.brief(documents)}."
        )
    return encode_documents(lm, texts, system=system)


def _asked(
    lm: LanguageModel, question: Any, rows: int, *, chat: bool
) -> list[Sequence[int]]:
    """Return the question behind each document, as token ids."""
    if question is None:
        return [()] * rows
    with speaking_of("generate", "question"):
        found = encode_questions(lm, question, chat=chat)
    if len(found) not in (1, rows):
        raise ValueError(
            f"generate: got {len(found)} questions for {rows} prompts; pass one, or "
            "one for each."
        )
    return found * rows if len(found) == 1 else found


def padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return token ids as int32 `[B, P]`, right-padded to a bucket."""
    tokens = np.zeros((len(rows), bucket(max(map(len, rows)))), np.int32)
    for line, row in zip(tokens, rows, strict=True):
        line[: len(row)] = row
    return tokens


def _check(lm: LanguageModel, found: Documents, plan: Plan) -> None:
    """Raise unless what was read is numbers."""
    spoilt, finite = jax.device_get(
        (found.spoilt, jax.numpy.isfinite(found.logits).all(-1))
    )
    if not finite.all():
        broken = dict.fromkeys(np.flatnonzero(~finite).tolist(), 0)
        why = soundness.cause(lm.params)
        raise soundness.LogitsError(broken, why, row="compress: document")
    with speaking_of("compress", "document"):
        for layer, row in np.argwhere(spoilt.any(1)):
            is_nan, exceeds = spoilt[layer, :, row].tolist()
            soundness.check_prompt(is_nan, exceeds, plan.options.prefill, row, layer)


@contextlib.contextmanager
def speaking_of(
    call: str, what: str, *, before: tuple[str, str] = ("generate", "prompt")
) -> Iterator[None]:
    """Let what is said of prompts of `generate` speak of what another call takes.

    Args:
      call: its name.
      what: one of them.
      before: what the call, and what it takes, are named in what is said.
    """
    try:
        yield
    except soundness.LogitsError as error:
        if error.row != f"{before[0]}: {before[1]}":
            raise
        own = soundness.LogitsError(error.tokens, error.cause, row=f"{call}: {what}")
        raise own from error
    except ValueError as error:
        said = str(error).replace(f"{before[0]}: ", f"{call}: ")
        said = re.sub(rf"\b{before[1]}(?=s?\b)(?!\.)", what, said)
        raise ValueError(said) from error
