"""`jaxkv.score`: how likely continuations are, under a budget."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxkv import soundness
from jaxkv.contexts.candidates import weigh_jit
from jaxkv.contexts.context import Context
from jaxkv.contexts.sharing import shared_of
from jaxkv.kernels import decode as decode_kernels
from jaxkv.kernels import prefill as prefill_kernels
from jaxkv.language_model import LanguageModel
from jaxkv.options import Options
from jaxkv.policies.base import DecodePolicy, PrefillPolicy
from jaxkv.shown import brief
from jaxkv.text import arguments
from jaxkv.text.documents import compress, padded, speaking_of
from jaxkv.text.prompts import Prompts, encode
from jaxkv.text.questions import check, questions, rows_of, slots_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What `score` returns; every field has one entry per continuation.

    Attributes:
      tokens: the continuations' token ids.
      logprobs: the logarithm of the probability of each token, in nats.
      totals: their sums.
      greedy: whether each continuation is what greedy decoding gives.
    """

    tokens: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]
    totals: tuple[float, ...]
    greedy: tuple[bool, ...]

    __repr__ = brief


def score(
    lm: LanguageModel,
    prompts: Prompts | None,
    continuations: Prompts,
    *,
    context: Context | None = None,
    documents: Sequence[int] | None = None,
    budget: int | None = None,
    compression_ratio: float | None = None,
    prefill: PrefillPolicy | None = None,
    decode: DecodePolicy | None = None,
    prefill_implementation: prefill_kernels.Implementation | None = None,
    decode_implementation: decode_kernels.Implementation | None = None,
) -> Scores:
    """Return how likely continuations are behind prompts that are cut to a budget.

    Args:
      lm: from `jaxkv.load`.
      prompts: as in `generate`: one for each continuation, or one that all follow and
        that is read once. None, with `context`, lets them follow its documents.
      continuations: as prompts; texts get no special tokens.
      context: see `generate`.
      documents: see `generate`; of each prompt or, without prompts, continuation.
      budget: see `generate`. If `decode` does not evict, the prompts' alone.
      compression_ratio: see `generate`.
      prefill: eviction of the prompt; None is `Full()`.
      decode: eviction while the continuation is read, token by token; None is `Full()`,
        with which it is read at once.
      prefill_implementation: see `jaxkv.kernels.prefill`.
      decode_implementation: see `jaxkv.kernels.decode`.

    Raises:
      ValueError: bad prompts or options; the message says what to do.
      LogitsError: the network gives NaN or infinity; a ValueError, too.
    """
    options = arguments.static_options(
        "score",
        prefill=prefill if context is not None else None,
        decode=decode,
        prefill_implementation=prefill_implementation,
        decode_implementation=decode_implementation,
    )
    with speaking_of("score", "continuation"):
        ids = encode(lm, continuations, behind=True)
        budget = None if budget is None else arguments.integer("budget", budget)
    if prompts is None and context is None:
        raise ValueError("score: pass prompts, or a context.")
    if documents is not None and context is None:
        raise ValueError("score: documents= does nothing without context=.")
    if context is None:
        spare = options.decode.spare
        options.check(None if budget is None else (budget,))
        with speaking_of("score", "prompt", before=("compress", "document")):
            context = compress(
                *(lm, () if prompts is None else prompts),
                budget=None if budget is None else budget - spare,
                compression_ratio=compression_ratio,
                prefill=prefill,
                prefill_implementation=prefill_implementation,
            )
    elif prompts is not None:
        with speaking_of("score", "prompt"):
            asked = questions(
                *(lm, context, prompts, documents, options),
                budget=budget,
                compression_ratio=compression_ratio,
                max_new_tokens=1,
            )
        context, documents = asked.read(lm), None
    else:
        with speaking_of("score", "prompt"):
            check(lm, context, options, budget, compression_ratio)
    if prompts is not None and len(context) not in (1, len(ids)):
        raise ValueError(
            f"score: got {len(ids)} continuations for {len(context)} prompts; pass one "
            "prompt, or one for each."
        )
    with speaking_of("score", "continuation"):
        chosen = rows_of(context, documents, len(ids))
    _check_fit(lm, context, chosen, ids)
    return _weighed(lm, context, chosen, ids, options, budget)


def _weighed(
    lm: LanguageModel,
    context: Context,
    documents: np.ndarray,
    ids: Sequence[Sequence[int]],
    options: Options,
    budget: int | None,
) -> Scores:
    tokens, counts = padded(ids), np.array([len(row) for row in ids], np.int32)
    shared = shared_of(context, documents, options, lm.params)
    slots = slots_of(
        *(context, documents, options.decode, budget),
        more=tokens.shape[1],
        shared=shared,
    )
    with jax.transfer_guard("allow"):
        found = weigh_jit(
            *(lm.network, lm.params, dataclasses.replace(context, policy="")),
            *(documents, tokens, counts),
            options=options.of_the_loop(),
            slots=slots,
            shared=shared,
        )
        found = jax.tree.map(np.asarray, found)
    rows = [row[:count] for row, count in zip(found.logprobs, counts, strict=True)]
    firsts = [int(np.isfinite(row).argmin()) for row in rows]
    broken = {
        number: first
        for number, (row, first) in enumerate(zip(rows, firsts, strict=True))
        if not np.isfinite(row[first])
    }
    if broken:
        why = soundness.cause(lm.params)
        raise soundness.LogitsError(broken, why, row="score: prompt")
    best = zip(found.likeliest, counts, strict=True)
    return Scores(
        tokens=tuple(tuple(map(int, row)) for row in ids),
        logprobs=tuple(tuple(row.tolist()) for row in rows),
        totals=tuple(float(row.sum()) for row in rows),
        greedy=tuple(bool(row[:count].all()) for row, count in best),
    )


def _check_fit(
    lm: LanguageModel,
    context: Context,
    documents: np.ndarray,
    ids: Sequence[Sequence[int]],
) -> None:
    """Raise ValueError where a continuation goes beyond the model's positions."""
    seen = np.asarray(context.lengths)[documents]
    for index, (before, row) in enumerate(zip(seen, ids, strict=True)):
        if before + len(row) > lm.config.max_positions:
            raise ValueError(
                f"score: continuation {index} of {len(row)} tokens behind {before} "
                f"needs {before + len(row)} positions, but {lm.name} was made for "
                f"{lm.config.max_positions}; shorten one of them."
            )
