"""What is asked of a context: checked, padded, put behind documents, and gone on with.

A question stands behind its document whole, at the positions that follow it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxkv import soundness
from jaxkv import state as kv
from jaxkv.contexts import context as contexts
from jaxkv.contexts.asking import ask_jit
from jaxkv.contexts.context import Context, Documents, check_context
from jaxkv.contexts.sharing import Layers, shared_of
from jaxkv.contexts.turns import read_on_jit, settle_jit
from jaxkv.generation import Running
from jaxkv.language_model import LanguageModel, check_model
from jaxkv.options import Options
from jaxkv.policies.base import DecodePolicy
from jaxkv.policies.full import Full
from jaxkv.runtime.seeds import row_keys
from jaxkv.speculation.drafters import Drafter
from jaxkv.speculation.likeliest import CANDIDATES
from jaxkv.state import Cache
from jaxkv.text import arguments
from jaxkv.text.documents import encode_questions, padded
from jaxkv.text.planning import Plan, bucket
from jaxkv.text.prompts import Prompts


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Questions:
    """What is asked of a context, checked and padded.

    Attributes:
      context: what is asked.
      plan: shapes of the batch.
      documents: int32 `[B]`, which document each question is about.
      ids: the questions.
      shared: what rows do not copy of their documents, by layer.
      crowded: whether one of them does not fit into the budget beside what is kept of
        its document, so that the decode policy evicts while it is read.
    """

    context: Context
    plan: Plan
    documents: np.ndarray
    ids: Sequence[Sequence[int]]
    shared: Layers
    crowded: bool

    @property
    def rows(self) -> list[list[int]]:
        """The tokens of each document and its question."""
        texts = np.asarray(self.context.tokens)
        sizes = np.asarray(self.context.lengths)
        return [
            [*texts[document, : sizes[document]].tolist(), *row]
            for document, row in zip(self.documents, self.ids, strict=True)
        ]

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
        state = ask_jit(
            # The program is the same whatever has chosen the tokens.
            *(lm.network, lm.params, dataclasses.replace(self.context, policy="")),
            *(self.documents, self.plan.padded(self.ids)),
            np.array([len(row) for row in self.ids], np.int32),
            *(row_keys(arguments.seeds(seed, rows), rows), stops),
            options=self.plan.options.of_the_loop(),
            slots=self.plan.slots,
            max_out=self.plan.max_out,
            pool=spans,
            crowded=self.crowded,
            shared=self.shared,
        )
        state = dataclasses.replace(state, cache=kv.beside(state.cache, self.shared))
        soundness.check(state, lm.params, self.plan.options)
        return state

    def read(self, lm: LanguageModel) -> Context:
        """Return documents and questions, as documents that are longer."""
        tokens = self.plan.padded(self.ids)
        found = read_on_jit(
            *(lm.network, lm.params, dataclasses.replace(self.context, policy="")),
            *(self.documents, tokens, np.array([len(x) for x in self.ids], np.int32)),
            options=self.plan.options.of_the_loop(),
            slots=tuple(s.slots + tokens.shape[1] for s in self.context.cache),
        )
        return _context(lm, found, found.cache, self.rows, self.context.policy)


def kept_context(
    lm: LanguageModel,
    options: Options,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    state: Running,
    policy: str,
) -> Context:
    """Return the cache behind outputs as a context, with their last tokens in it.

    Args:
      lm: the model.
      options: of the generation.
      prompts: all that stood before the outputs.
      outputs: of each row.
      state: of the loop, at its end.
      policy: what has chosen from the prompts, as text.
    """
    texts = [[*row, *out] for row, out in zip(prompts, outputs, strict=True)]
    found = settle_jit(
        *(lm.network, lm.params, state.last, state.position, state.cache),
        options=options.of_the_loop(),
    )
    # Slots of outputs that ended early are not carried along.
    sizes = [bucket(int(layer.max())) for layer in jax.device_get(found.kept)]
    cache = tuple(
        kv.resize(layer, min(size, layer.slots))
        for layer, size in zip(found.cache, sizes, strict=True)
    )
    if options.decode.evicts:
        policy += f", {options.decode}"
    found = found._replace(likeliest=_likeliest(state, prompts, outputs))
    return _context(lm, found, cache, texts, policy)


def alternatives_to_note(asked: int | None, drafter: Drafter | None) -> int | None:
    """Return how many alternatives to each token to note, None for none of them.

    Args:
      asked: by who wants log-probabilities.
      drafter: that is to draft again behind a context, and may look at three of each
        token; None if there is none.
    """
    if drafter is None or not getattr(drafter, "likeliest", False):
        return asked
    return max(asked or 0, CANDIDATES)


def _likeliest(
    state: Running,
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
) -> jax.Array | None:
    """Return `Context.likeliest` of prompts and outputs, None where nobody asked."""
    drafts, noted = state.speculation, state.logprobs
    if drafts is None or drafts.likeliest is None or noted is None:
        return None
    texts = [[*row, *out] for row, out in zip(prompts, outputs, strict=True)]
    found = np.zeros((*padded(texts).shape, CANDIDATES), np.int32)
    before, after = np.asarray(drafts.likeliest), np.asarray(noted.tokens)
    for index, (row, out) in enumerate(zip(prompts, outputs, strict=True)):
        first, last = len(row), len(row) + len(out)
        found[index, :first] = before[index, :first]
        found[index, first:last] = after[index, : len(out), :CANDIDATES]
    return jax.numpy.asarray(found)


def _context(
    lm: LanguageModel,
    found: Documents,
    cache: Cache,
    texts: Sequence[Sequence[int]],
    policy: str,
) -> Context:
    return Context(
        cache=cache,
        tokens=jax.numpy.asarray(padded(texts)),
        lengths=jax.numpy.asarray([len(row) for row in texts], np.int32),
        kept=contexts.most_kept(found),
        logits=found.logits,
        likeliest=found.likeliest,
        identity=lm.identity,
        policy=policy,
    )


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
      room: slots for the output and what may follow; None is those of the output,
        behind which nothing does.

    Raises:
      ValueError: they do not go together; the message says what to do.
    """
    check(lm, context, options, budget, compression_ratio)
    ids = encode_questions(lm, prompts, chat=context.chat)
    chosen = rows_of(context, documents, len(ids))
    seen = jax.device_get(context.lengths)
    for index, (document, row) in enumerate(zip(chosen, ids, strict=True)):
        left = lm.config.max_positions - int(seen[document])
        if len(row) + max_new_tokens > left:
            raise ValueError(
                f"generate: prompt {index} has {len(row)} tokens, which with "
                f"{max_new_tokens=} do not fit behind document {document}, whose "
                f"{seen[document]} tokens leave {left} positions of "
                f"{lm.config.max_positions}; shorten one of them."
            )
    prompt = bucket(max(map(len, ids)))
    max_out = bucket(max_new_tokens if room is None else room)
    shared = shared_of(*(context, chosen, options, lm.params), goes_on=room is not None)
    plan = Plan(
        options=options,
        bound=None,
        keep=None,
        slots=slots_of(
            *(context, chosen, options.decode, budget),
            more=prompt + max_out,
            shared=shared,
        ),
        prompt=prompt,
        max_out=max_out,
        distinct=len(ids),
    )
    crowded = _crowded(context, chosen, ids, options, budget)
    return Questions(
        context=context,
        plan=plan,
        documents=chosen,
        ids=ids,
        shared=shared,
        crowded=crowded,
    )


def _crowded(
    context: Context,
    documents: np.ndarray,
    ids: Sequence[Sequence[int]],
    options: Options,
    budget: Any,
) -> bool:
    """Return whether a question does not fit beside its document, or raise."""
    decode, drafter = options.decode, options.speculate
    if not decode.evicts:
        return False
    kept = np.asarray(context.kept)[documents]
    need = int((kept + np.array([len(row) for row in ids])).max()) + decode.spare
    size = arguments.integer("budget", budget)
    crowded = need > size
    if crowded and drafter is not None and drafter.likeliest:
        raise ValueError(
            f"generate: budget={size} does not hold a document and its question "
            f"together, but {type(drafter).__name__} drafts from what the network held "
            f"likeliest along both; use at least {need}, or another drafter."
        )
    return crowded


def slots_of(
    context: Context,
    documents: np.ndarray,
    decode: DecodePolicy,
    budget: Any,
    *,
    more: int,
    shared: Layers,
) -> tuple[int, ...]:
    """Return the slots of each layer's state behind documents.

    Args:
      context: the documents.
      documents: int32 `[B]`, which one each row follows.
      decode: the policy.
      budget: slots, if the policy evicts.
      more: slots beside those of the context, if it does not.
      shared: what rows do not copy of the context, by layer.

    Raises:
      ValueError: the budget is too small.
    """
    if not decode.evicts:
        sizes = (
            more if found else state.slots + more
            for state, found in zip(context.cache, shared, strict=True)
        )
        return tuple(
            min(size, state.window or size)
            for size, state in zip(sizes, context.cache, strict=True)
        )
    size = arguments.integer("budget", budget)
    kept = np.asarray(context.kept)
    need = int(kept[documents].max()) + min(decode.spare, 1)
    if size < need:
        raise ValueError(
            f"generate: budget={size} is too small for the {kept.max()} tokens that "
            "the context keeps of a document, and what "
            f"{type(decode).__name__} leaves free; use at least {need}."
        )
    windows = [state.window for state in context.cache]
    return kv.all_slots(windows, size)


def check(
    lm: LanguageModel,
    context: Any,
    options: Options,
    budget: Any,
    compression_ratio: float | None,
) -> None:
    """Raise ValueError for a context of another model, and for options without use."""
    check_model("generate", lm)
    check_context("generate", "context", context)
    context.identity.check(lm.identity)
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
            "jaxkv.compress, or to the call that returned the context, too, or use "
            "another drafter."
        )


def rows_of(context: Context, given: Any, rows: int) -> np.ndarray:
    """Return which document each of the rows is about, int32 `[B]`, or raise."""
    number = len(context)
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
