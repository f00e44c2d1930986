"""`jaxkv.generate`: prompts in, text out.

Everything with a shape is padded to a bucket, so that prompts of similar length share
one compiled program: 64, 96, 128, 192, 256, ... tokens. Batches of another size, or
options that differ, compile anew. Prefill policies share the program that decodes.

A process keeps the programs that it used last (`jaxkv.runtime.programs`), so that it
may meet any number of shapes; what was let go of and is needed again compiles again.
With a network of 2 layers on a CPU, 64 programs took 14,500 to 17,200 memory maps
(counted every 20 calls up to the 160th). Resident memory was 1,489 MiB after 40
different calls and 1,538 MiB after 160: JAX keeps traces of what was let go of.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxkv import generation, soundness
from jaxkv.contexts.context import Context
from jaxkv.contexts.sharing import advance_any
from jaxkv.expected import check_truth
from jaxkv.generation import Running
from jaxkv.kernels import decode as decode_kernels
from jaxkv.kernels import prefill as prefill_kernels
from jaxkv.kernels import window_scores
from jaxkv.language_model import LanguageModel
from jaxkv.options import Options
from jaxkv.policies.base import DecodePolicy, PrefillPolicy
from jaxkv.runtime.seeds import row_keys
from jaxkv.sampling import Sampler
from jaxkv.speculation.drafters import Drafter
from jaxkv.speculation.rules import Rule
from jaxkv.text import arguments, planning, pricing, rows
from jaxkv.text.completion import Completion, completion
from jaxkv.text.planning import Plan
from jaxkv.text.prompts import Prompts, encode
from jaxkv.text.questions import alternatives_to_note, kept_context, questions
from jaxkv.text.stopwatch import stopwatch


def generate(
    lm: LanguageModel,
    prompts: Prompts,
    *,
    context: Context | None = None,
    documents: Sequence[int] | None = None,
    max_new_tokens: int = 64,
    budget: int | Sequence[int] | None = None,
    compression_ratio: float | None = None,
    prefill: PrefillPolicy | None = None,
    decode: DecodePolicy | None = None,
    sampler: Sampler | None = None,
    speculate: Drafter | None = None,
    accept: Rule | None = None,
    pool: Sequence[tuple[int, int]] | None = None,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] | None = None,
    on_tokens: Callable[[list[list[int]]], None] | None = None,
    block: int = 32,
    logprobs: bool = False,
    top_logprobs: int = 0,
    return_cache: bool = False,
    prefill_implementation: prefill_kernels.Implementation | None = None,
    decode_implementation: decode_kernels.Implementation | None = None,
    scores_implementation: window_scores.Implementation | None = None,
) -> Completion:
    """Generate a continuation of each prompt.

    Args:
      lm: from `jaxkv.load`.
      prompts: a text; a list of texts, or of lists or arrays of token ids; or what a
        transformers tokenizer returns, whose attention mask says what is padding. They
        may differ in length. Each gets exactly what it would get alone.
      context: from `compress`: documents that the prompts are questions about. They
        follow them, at the positions behind, and are kept whole, unless `decode` evicts
        and `budget` does not hold both; texts get no special tokens. Using a context
        changes nothing.
      documents: index of each prompt's document. None: the only one of the context, or
        one for each prompt.
      max_new_tokens: longest output; changing it within a bucket compiles nothing.
      budget: tokens that each layer and head may keep: of the prompt, and of prompt
        and output together if `decode` evicts. None keeps everything. One number for
        all prompts or, if `decode` does not evict, one for each. The cache is padded
        to a bucket of the largest, so that similar budgets share a program. Where the
        prompts are one list several times over, with other budgets each time, each is
        read once. With `context` it is needed if `decode` evicts: it holds what is left
        of a document, its question and the output. A question that does not fit is fed
        token by token, and `decode` evicts on the way.
      compression_ratio: another way to say it: the fraction of each prompt that is
        removed.
      prefill: eviction of the prompt; None is `Full()`.
      decode: eviction of the output; None is `Full()`.
      sampler: None is `Greedy()`.
      speculate: drafts several tokens per step; None decodes one at a time.
      accept: which drafted tokens pass; None is `Exact()`, which gives what plain
        decoding gives. With a lossy rule the output may also depend on `block`.
      pool: span of each prompt, first token and the one after the last, that drafts
        are copied from; None is all of it.
      seed: one for all rows (row `i` gets the `i`-th key), or one per row.
      stop_ids: token ids that end a row; None takes the checkpoint's.
      on_tokens: called with each row's new tokens: the first ones, and then those of
        about `block` steps.
      block: see `on_tokens`.
      logprobs: whether to return the log-probability of each token of the output.
      top_logprobs: how many alternatives to each token to return theirs of, too.
      return_cache: whether to return the cache, as a context of the texts so far, with
        the last token in it: `context=` of the next call, which reads what is new.
        Where `decode` evicts and a head is full, it lacks the token that the next one
        would have overwritten, so that the same budget does for the next call.
      prefill_implementation: see `jaxkv.kernels.prefill`.
      decode_implementation: see `jaxkv.kernels.decode`.
      scores_implementation: see `jaxkv.kernels.window_scores`.

    Returns:
      Text, tokens and what it cost.

    Raises:
      ValueError: bad prompts or options; the message says what to do.
      LogitsError: the network gives NaN or infinity; a ValueError, too.
      NotImplementedError: a named implementation cannot run here.
    """
    given: dict[str, Any] = dict(locals())
    check_truth("generate", return_cache=return_cache)
    noted = arguments.alternatives(lm, logprobs, top_logprobs)
    options = arguments.static_options(
        "generate",
        prefill=prefill,
        decode=decode,
        sampler=sampler,
        speculate=speculate,
        accept=accept,
        prefill_implementation=prefill_implementation,
        decode_implementation=decode_implementation,
        scores_implementation=scores_implementation,
        top_logprobs=alternatives_to_note(noted, speculate if return_cache else None),
    )
    max_new_tokens, block = arguments.limits(max_new_tokens, block, on_tokens)
    sizes: dict[str, Any] = dict(
        budget=budget,
        compression_ratio=compression_ratio,
        max_new_tokens=max_new_tokens,
    )
    if context is not None:
        asked = questions(lm, context, prompts, documents, options, **sizes)
        plan, ids, begin = asked.plan, asked.rows, asked.start
    elif documents is not None:
        raise ValueError("generate: documents= does nothing without context=.")
    else:
        plan, ids = _planned(lm, prompts, options, **sizes)
        begin = functools.partial(start, plan=plan, ids=ids)
    spans = arguments.spans(pool, ids, options)
    stops = arguments.stop_ids(lm, stop_ids)
    more = rows.missing(lm, len(ids))
    if more and context is None and not return_cache:
        seed = arguments.seeds(seed, len(ids))
        each = dict(prompts=ids, budget=budget, seed=seed, pool=pool)
        given |= {name: rows.filled_up(x, more) for name, x in each.items()}
        given["on_tokens"] = rows.listener(on_tokens, len(ids))
        return rows.first(generate(**given), len(ids))
    # Prompts and outputs are the host's: these transfers are meant.
    with stopwatch() as lap, jax.transfer_guard("allow"):
        state = begin(lm, seed=seed, stops=stops, spans=spans)
        reading = lap()
        state = advance(
            *(lm, plan, state, stops, max_new_tokens), block=block, on_tokens=on_tokens
        )
        decoding = lap()
        out = completion(lm, plan, ids, state, reading, decoding)
        out = out.with_alternatives(noted)
        if return_cache:
            policy = repr(options.prefill) if context is None else context.policy
            left = kept_context(lm, plan.options, ids, out.tokens, state, policy)
            out = dataclasses.replace(out, context=left)
    return out


def _planned(
    lm: LanguageModel,
    prompts: Prompts,
    options: Options,
    *,
    budget: int | Sequence[int] | None,
    compression_ratio: float | None,
    max_new_tokens: int,
) -> tuple[Plan, list[Any]]:
    """Return the shapes of a batch of prompts, and their token ids, all checked."""
    ids = encode(lm, prompts)
    budgets = planning.row_budgets(
        budget, compression_ratio, ids, evicts=options.decode.evicts
    )
    options.check(budgets)
    arguments.check_fit(lm, ids, max_new_tokens, options, budgets)
    plan = planning.plan(
        *(ids, options, budgets),
        max_new_tokens=max_new_tokens,
        windows=lm.config.windows,
    )
    return plan, ids


def start(
    lm: LanguageModel,
    plan: Plan,
    ids: Sequence[Sequence[int]],
    seed: int | Sequence[int],
    stops: np.ndarray,
    spans: np.ndarray | None,
) -> Running:
    """Read the prompts, choose the first tokens, and wait for them."""
    lengths = np.array([len(row) for row in ids[: plan.distinct]], np.int32)
    args = (
        *(lm.network, lm.params, plan.padded(ids), lengths),
        *(row_keys(arguments.seeds(seed, len(ids)), len(ids)), stops),
    )
    shapes = dict(options=plan.options, slots=plan.slots, max_out=plan.max_out)
    keep: Any = plan.keep
    if plan.distinct == len(ids):
        state = generation.start_jit(*args, **shapes, keep=keep, pool=spans)
    else:
        keep = keep.reshape(-1, plan.distinct)
        state = generation.start_copies_jit(*args, **shapes, keep=keep)
    soundness.check(state, lm.params, plan.options)  # waits, too
    return state


def advance(
    lm: LanguageModel,
    plan: Plan,
    state: Running,
    stops: np.ndarray,
    max_new_tokens: int,
    *,
    block: int,
    on_tokens: Callable[[list[list[int]]], None] | None,
) -> Running:
    """Decode to the end; if somebody listens, the first token and then blocks."""
    options = plan.options.of_the_loop()
    prices = None

    def run(state: Running, until: int, prices: np.ndarray | None = None) -> Running:
        return advance_any(
            *(lm.network, lm.params, state, np.int32(until), stops, prices),
            options=options,
        )

    shown, until = np.zeros(len(state.lengths), int), 1
    while True:
        lengths = np.asarray(state.lengths)
        if on_tokens:
            each = zip(np.asarray(state.tokens), shown, lengths, strict=True)
            on_tokens([out[first:last].tolist() for out, first, last in each])
            shown = lengths
        soundness.check(state, lm.params, plan.options)
        if until == max_new_tokens or np.asarray(state.done).all():
            return state
        if prices is None and (found := pricing.of_program(lm, options, state, stops)):
            state = found.measure(run, state, max_new_tokens)
            prices, until = found.array(), int(np.asarray(state.lengths).max())
        until = min(until + block, max_new_tokens) if on_tokens else max_new_tokens
        state = run(state, until, prices)
