"""`jaxkv.compress`: documents in, a context out; and the checks of what is asked of it.

A question stands behind its document whole, at the positions that follow it.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxkv import contexts, soundness
from jaxkv.contexts import Context, Documents
from jaxkv.generation import Running
from jaxkv.kernels import prefill as prefill_kernels
from jaxkv.kernels import window_scores
from jaxkv.language_model import LanguageModel
from jaxkv.options import Options
from jaxkv.policies.base import PrefillPolicy
from jaxkv.policies.full import Full
from jaxkv.runtime.seeds import row_keys
from jaxkv.speculation.drafters import Drafter
from jaxkv.text import arguments, planning
from jaxkv.text.chat import encode_document, encode_question
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
        for each. None keeps everything.
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
    with _of_documents():
        options = arguments.static_options(
            prefill=prefill,
            speculate=speculate,
            prefill_implementation=prefill_implementation,
            scores_implementation=scores_implementation,
        )
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
            sizes = zip(budgets, asked, strict=True)
            fit = tuple(kept + len(more) for kept, more in sizes)
        arguments.check_fit(lm, rows, 1, options, fit)
    plan = planning.plan(
        *(ids, options, budgets), max_new_tokens=0, num_layers=lm.config.num_layers
    )
    lengths = np.array([len(row) for row in ids], np.int32)
    tokens = _padded(rows)
    # Documents are the host's: these transfers are meant.
    with jax.transfer_guard("allow"):
        found = contexts.read_documents_jit(
            *(lm.network, lm.params, tokens, lengths),
            *(np.array([len(row) for row in asked], np.int32), plan.keep),
            options=dataclasses.replace(plan.options, speculate=None),
            slots=plan.slots,
            likeliest=options.speculate is not None and options.speculate.likeliest,
        )
        _check(lm, found, plan)
        return Context(
            cache=found.cache,
            tokens=jax.numpy.asarray(_padded(ids)),
            lengths=jax.numpy.asarray(lengths),
            kept=found.kept.max(0),
            logits=found.logits,
            likeliest=found.likeliest,
            identity=lm.identity,
            policy=repr(options.prefill),
            chat=chat,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Questions:
    """What is asked of a context, checked and padded.

    Attributes:
      context: what is asked.
      plan: shapes of the batch.
      documents: int32 `[B]`, which document each question is about.
      ids: the questions.
      lengths: tokens of document and question.
    """

    context: Context
    plan: Plan
    documents: np.ndarray
    ids: Sequence[Sequence[int]]
    lengths: tuple[int, ...]

    @property
    def rows(self) -> list[range]:
        """Positions of each document and its question, in place of their tokens."""
        return [range(length) for length in self.lengths]

    def start(
        self,
        lm: LanguageModel,
        *,
        seed: int | Sequence[int],
        stops: np.ndarray,
        spans: np.ndarray | None,
    ) -> Running:
        """Read the questions, choose the first tokens, and wait for them."""
        rows = len(self.ids)
        state = contexts.ask_jit(
            # The program is the same whatever has chosen the tokens.
            *(lm.network, lm.params, dataclasses.replace(self.context, policy="")),
            *(self.documents, self.plan.padded(self.ids)),
            np.array([len(row) for row in self.ids], np.int32),
            *(row_keys(arguments.seeds(seed, rows), rows), stops),
            options=self.plan.options.of_the_loop(),
            slots=self.plan.slots,
            max_out=self.plan.max_out,
            pool=spans,
        )
        soundness.check(state, lm.params, Full())
        return state


def questions(
    lm: LanguageModel,
    context: Context,
    prompts: Prompts,
    documents: Sequence[int] | None,
    options: Options,
    *,
    budget: int | Sequence[int] | None,
    compression_ratio: float | None,
    max_new_tokens: int,
    room: int | None = None,
) -> Questions:
    """Check what is asked of a context, and decide all shapes.

    Args:
      lm: the model.
      context: what is asked.
      prompts: the questions.
      documents: of each question; see `generate`.
      options: of the call, without a budget.
      budget: slots of decoding, if the decode policy evicts.
      compression_ratio: refused; the context has been cut.
      max_new_tokens: the longest output.
      room: slots for the output and what may follow; None is those of the output.

    Raises:
      ValueError: they do not go together; the message says what to do.
    """
    if not isinstance(context, Context):
        raise ValueError(
            "generate: context= takes what jaxkv.compress returns, got "
            f"{arguments.brief(context)}."
        )
    context.identity.check(lm.identity)
    ids = encode_questions(lm, prompts, chat=context.chat)
    _check_options(context, options, budget, compression_ratio)
    chosen = _documents(documents, len(ids), len(context))
    seen, kept = jax.device_get((context.lengths, context.kept))
    lengths = tuple(int(seen[d]) + len(row) for d, row in zip(chosen, ids, strict=True))
    for index, (document, row) in enumerate(zip(chosen, ids, strict=True)):
        left = lm.config.max_positions - int(seen[document])
        if len(row) + max_new_tokens > left:
            raise ValueError(
                f"generate: prompt {index} of {len(row)} tokens and max_new_tokens="
                f"{max_new_tokens} do not fit behind document {document}, whose "
                f"{seen[document]} tokens leave {left} positions of "
                f"{lm.config.max_positions}; shorten one of them."
            )
    prompt = bucket(max(map(len, ids)))
    max_out = bucket(max_new_tokens if room is None else room)
    if options.decode.evicts:
        size = arguments.integer("budget", budget)
        most = zip(chosen, ids, strict=True)
        need = max(int(kept[d]) + len(row) for d, row in most) + options.decode.spare
        if size < need:
            raise ValueError(
                f"generate: budget={size} is too small for the {kept.max()} tokens "
                "that the context keeps of a document, a question, and what "
                f"{type(options.decode).__name__} leaves free; use at least {need}."
            )
        slots: tuple[int, ...] = (size,) * len(context.cache)
    else:
        slots = tuple(state.slots + prompt + max_out for state in context.cache)
    plan = Plan(
        options=options,
        bound=None,
        keep=None,
        slots=slots,
        prompt=prompt,
        max_out=max_out,
        distinct=len(ids),
    )
    return Questions(
        context=context, plan=plan, documents=chosen, ids=ids, lengths=lengths
    )


def _check_options(context, options, budget, compression_ratio):
    """Raise ValueError for options that a context has no use for."""
    if options.prefill != Full() or compression_ratio is not None:
        name = "compression_ratio" if compression_ratio is not None else "prefill"
        raise ValueError(
            f"generate: {name}= does nothing with context=, whose documents have been "
            f"cut; pass {name}= to jaxkv.compress."
        )
    if not options.decode.evicts and budget is not None:
        raise ValueError(
            "generate: budget= with context= is that of a decode policy that evicts; "
            "pass decode=, or leave the budget to jaxkv.compress."
        )
    options.check(None if budget is None else (arguments.integer("budget", budget),))
    drafter = options.speculate
    if drafter is not None and drafter.likeliest and context.likeliest is None:
        name = type(drafter).__name__
        raise ValueError(
            f"generate: {name} drafts from what the network held likeliest along the "
            f"document, which this context has not noted; pass speculate={name}() to "
            "jaxkv.compress, too, or use another drafter."
        )


def _documents(given: Any, rows: int, number: int) -> np.ndarray:
    """Return which document each question is about, int32 `[B]`."""
    if given is None:
        if number not in (1, rows):
            raise ValueError(
                f"generate: {rows} prompts about {number} documents; pass documents=, "
                "the index of each prompt's document."
            )
        return np.arange(rows, dtype=np.int32) % number
    found = arguments.integers("documents", given)
    if len(found) != rows:
        raise ValueError(
            f"generate: got {len(found)} indices in documents= for {rows} prompts."
        )
    for index in found:
        if not 0 <= index < number:
            raise ValueError(
                f"generate: documents= has the index {index}, but the context has "
                f"{number} documents, from 0 on."
            )
    return np.array(found, np.int32)


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
    texts = [documents] if isinstance(documents, str) else documents
    if not isinstance(texts, list | tuple) or not all(
        isinstance(text, str) for text in texts
    ):
        raise ValueError(
            "generate: chat=True takes a list of texts, got "
            f"{arguments.brief(documents)}."
        )
    return [encode_document(lm, text, system=system) for text in texts]


def _asked(
    lm: LanguageModel, question: Any, rows: int, *, chat: bool
) -> list[Sequence[int]]:
    """Return the question behind each document, as token ids."""
    if question is None:
        return [()] * rows
    found = encode_questions(lm, question, chat=chat)
    if len(found) not in (1, rows):
        raise ValueError(
            f"generate: got {len(found)} questions for {rows} prompts; pass one, or "
            "one for each."
        )
    return found * rows if len(found) == 1 else found


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    tokens = np.zeros((len(rows), bucket(max(map(len, rows)))), np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return tokens


def _check(lm: LanguageModel, found: Documents, plan: Plan) -> None:
    """Raise unless what was read is numbers."""
    name = type(plan.options.prefill).__name__
    spoilt, finite = jax.device_get(
        (found.spoilt, jax.numpy.isfinite(found.logits).all(-1))
    )
    if not finite.all():
        broken = dict.fromkeys(np.flatnonzero(~finite).tolist(), 0)
        raise soundness.LogitsError(broken, soundness.cause(lm.params))
    for layer, row in np.argwhere(spoilt):
        raise ValueError(
            f"compress: {name} scores tokens of document {row} as NaN in layer {layer};"
            " look for a division by 0 in compress."
        )


@contextlib.contextmanager
def _of_documents() -> Iterator[None]:
    """Let what is said of prompts of `generate` speak of documents of `compress`."""
    try:
        yield
    except soundness.LogitsError:
        raise
    except ValueError as error:
        said = str(error).replace("generate: ", "compress: ")
        said = said.replace("prompt", "document")
        raise ValueError(said) from error
