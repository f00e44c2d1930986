"""`jaxkv.generate`: prompts in, text out.

Everything with a shape is padded to a bucket, so that prompts of similar length share
one compiled program: 64, 96, 128, 192, 256, ... tokens. Batches of another size, or
options that differ, compile anew.
"""

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import arguments, generation
from jaxkv import state as kv
from jaxkv.kernels import decode as decode_kernels
from jaxkv.kernels import prefill as prefill_kernels
from jaxkv.kernels import window_scores
from jaxkv.language_model import LanguageModel
from jaxkv.options import Options
from jaxkv.policies.base import DecodePolicy, PrefillPolicy
from jaxkv.policies.full import Full
from jaxkv.sampling import Greedy, Sampler
from jaxkv.speculation.counts import DraftStats, draft_stats
from jaxkv.speculation.drafters import Drafter
from jaxkv.speculation.rules import Exact, Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """What a call of `generate` cost.

    Attributes:
      prompt_tokens: of each row.
      cache_bytes: of the whole cache, bookkeeping included.
      slots: of the layer with the largest state.
      compile_seconds: spent tracing and compiling; 0 once the shapes are known.
      prefill_seconds: until the first token, compilation not counted.
      decode_seconds: for all other tokens, compilation not counted.
      tokens_per_second: of decoding, over all rows; 0 if there was nothing to decode.
      prefill_implementation: kernel that attended over the prompt.
      decode_implementation: kernel that attended over the cache.
      drafts: what speculation came to; None without it.
    """

    prompt_tokens: tuple[int, ...]
    cache_bytes: int
    slots: int
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float
    prefill_implementation: str
    decode_implementation: str
    drafts: DraftStats | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What `generate` returns; every field but `stats` has one entry per prompt.

    Attributes:
      text: the outputs, special tokens left out; None without a tokenizer.
      tokens: the outputs' token ids, a stop id included.
      lengths: how many they are.
      finish_reason: "stop" (a stop id) or "length" (`max_new_tokens`).
      stats: what it cost.
    """

    text: tuple[str, ...] | None
    tokens: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    finish_reason: tuple[str, ...]
    stats: Stats


def bucket(length: int) -> int:
    """Return the padded length: the next of 64, 96, 128, 192, 256, 384, ..."""
    size = 64
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def generate(
    lm: LanguageModel,
    prompts: arguments.Prompts,
    *,
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
    prefill_implementation: prefill_kernels.Implementation | None = None,
    decode_implementation: decode_kernels.Implementation | None = None,
    scores_implementation: window_scores.Implementation | None = None,
) -> Completion:
    """Generate a continuation of each prompt.

    Args:
      lm: from `jaxkv.load`.
      prompts: texts, or lists or arrays of token ids; they may differ in length. Each
        gets exactly what it would get alone.
      max_new_tokens: longest output; changing it within a bucket compiles nothing.
      budget: tokens that each layer and head may keep: of the prompt, and of prompt
        and output together if `decode` evicts. None keeps everything. One number for
        all prompts or, if `decode` does not evict, one for each. The cache is padded
        to a bucket of the largest, so that similar budgets share a program. Where the
        prompts are one list several times over, with other budgets each time, each is
        read once.
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
      on_tokens: called with each row's new tokens about every `block` tokens.
      block: see `on_tokens`.
      prefill_implementation: see `jaxkv.kernels.prefill`.
      decode_implementation: see `jaxkv.kernels.decode`.
      scores_implementation: see `jaxkv.kernels.window_scores`.

    Returns:
      Text, tokens and what it cost.

    Raises:
      ValueError: bad prompts or options; the message says what to do.
      NotImplementedError: a named implementation cannot run here.
    """
    prefill = Full() if prefill is None else prefill
    decode = Full() if decode is None else decode
    sampler = Greedy() if sampler is None else sampler
    accept = Exact() if accept is None else accept
    kinds = dict(
        prefill=(prefill, "compress", "DapQ()"),
        decode=(decode, "attend", "LongFlow()"),
        sampler=(sampler, "pick", "Greedy()"),
        accept=(accept, "passes", "Exact()"),
    )
    if speculate is not None:
        kinds["speculate"] = (speculate, "draft", "Aligned()")
    arguments.methods(lm, **kinds)
    max_new_tokens = arguments.integer("max_new_tokens", max_new_tokens)
    block = arguments.integer("block", block)
    if on_tokens is not None and not callable(on_tokens):
        raise ValueError(
            "generate: on_tokens= takes a function of the rows' new tokens, got "
            f"{on_tokens!r}."
        )
    ids = arguments.encode(lm, prompts)
    options = Options(
        prefill=prefill,
        decode=decode,
        sampler=sampler,
        speculate=speculate,
        accept=accept,
        prefill_implementation=prefill_implementation,
        decode_implementation=decode_implementation,
        scores_implementation=scores_implementation,
    )
    budgets = arguments.row_budgets(
        budget, compression_ratio, ids, evicts=options.decode.evicts
    )
    arguments.check(lm, ids, max_new_tokens, options, budgets, block)
    spans = arguments.spans(pool, ids, options)
    lengths = np.array([len(row) for row in ids], np.int32)
    padded = bucket(int(lengths.max()))
    max_out = bucket(max_new_tokens)
    options, slots, keep = _plan(
        options, budgets, lengths, padded, max_out, lm.config.num_layers
    )
    distinct = _distinct(ids, options, keep)
    tokens = np.zeros((distinct, padded), np.int32)
    for row, prompt in zip(tokens, ids, strict=False):
        row[: len(prompt)] = prompt
    stops = (
        lm.stop_ids if stop_ids is None else arguments.integers("stop_ids", stop_ids)
    )
    stops = jnp.asarray(stops if len(stops) else [-1], int)

    with _compile_seconds() as compiled:
        begin = time.perf_counter()
        start = functools.partial(
            generation.start_jit
            if distinct == len(ids)
            else generation.start_copies_jit,
            lm.network,
            lm.params,
            jnp.asarray(tokens),
            jnp.asarray(lengths[:distinct]),
            arguments.row_keys(seed, len(ids)),
            stops,
            options=options,
            slots=slots,
            max_out=max_out,
        )
        if distinct == len(ids):
            state = start(keep=keep, pool=spans)
        else:
            state = start(keep=keep.reshape(-1, distinct))
        jax.block_until_ready(state.last)
        first = time.perf_counter()
        compile_prefill = sum(compiled)
        shown = np.zeros(len(ids), int)
        until = min(block, max_new_tokens) if on_tokens else max_new_tokens
        while True:
            state = generation.advance_jit(
                lm.network, lm.params, state, jnp.int32(until), stops, options=options
            )
            new_lengths = np.asarray(state.lengths)
            if on_tokens:
                out = np.asarray(state.tokens)
                on_tokens(
                    [
                        out[row, shown[row] : new_lengths[row]].tolist()
                        for row in range(len(ids))
                    ]
                )
                shown = new_lengths
            if until == max_new_tokens or np.asarray(state.done).all():
                break
            until = min(until + block, max_new_tokens)
        last = time.perf_counter()

    out, done = np.asarray(state.tokens), np.asarray(state.done)
    rows = tuple(
        tuple(out[row, : new_lengths[row]].tolist()) for row in range(len(ids))
    )
    decode_seconds = max(last - first - (sum(compiled) - compile_prefill), 0.0)
    decoded = int(new_lengths.sum()) - len(ids)
    backend = jax.default_backend()
    return Completion(
        text=None
        if lm.tokenizer is None
        else tuple(lm.tokenizer.decode(row, skip_special_tokens=True) for row in rows),
        tokens=rows,
        lengths=tuple(int(length) for length in new_lengths),
        finish_reason=tuple("stop" if d else "length" for d in done),
        stats=Stats(
            prompt_tokens=tuple(int(length) for length in lengths),
            cache_bytes=kv.num_bytes(state.cache),
            slots=max(slots),
            compile_seconds=sum(compiled),
            prefill_seconds=max(first - begin - compile_prefill, 0.0),
            decode_seconds=decode_seconds,
            tokens_per_second=decoded / decode_seconds if decode_seconds else 0.0,
            prefill_implementation=prefill_implementation
            or prefill_kernels.choose(
                backend, lm.dtype, length=padded, head_dim=lm.config.head_dim
            ),
            decode_implementation=decode_implementation
            or options.decode.default_implementation(backend),
            drafts=state.speculation
            and draft_stats(
                state.speculation.counts, new_lengths.tolist(), lengths.tolist()
            ),
        ),
    )


def _plan(
    options: Options,
    budgets: tuple[int, ...] | None,
    lengths: np.ndarray,
    padded: int,
    max_out: int,
    num_layers: int,
) -> tuple[Options, tuple[int, ...], jax.Array | None]:
    """Return options with their budget, the slots of each layer, and what rows keep."""
    if budgets is None or options.decode.evicts:
        budget = None if budgets is None else budgets[0]
        options = dataclasses.replace(options, budget=budget)
        return options, options.layer_slots(padded, max_out, num_layers), None
    # The largest that shares a program with these; rows keep what they were given.
    options = dataclasses.replace(options, budget=bucket(max(budgets)))
    keep = np.array(budgets, np.int32)
    keeps = options.prefill.layer_keeps(keep, lengths, num_layers)
    slots = tuple(min(bucket(int(kept.max())), padded) + max_out for kept in keeps)
    return options, slots, jnp.asarray(keep)


def _distinct(
    ids: Sequence[Sequence[int]], options: Options, keep: jax.Array | None
) -> int:
    """Return after how many rows the prompts repeat, so that these need reading only.

    It is all rows where they do not repeat as a whole, or where more than the eviction
    depends on the budget.
    """
    rows = len(ids)
    if keep is None or options.speculate is not None or options.prefill.drafts:
        return rows
    for count in range(1, rows // 2 + 1):
        if rows % count == 0 and all(
            np.array_equal(ids[row], ids[row % count]) for row in range(count, rows)
        ):
            return count
    return rows


_COMPILING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


@contextlib.contextmanager
def _compile_seconds() -> Iterator[list[float]]:
    """Collect the durations of tracing, lowering and compiling in the context."""
    seconds: list[float] = []
    thread = threading.get_ident()

    def listen(event: str, duration: float, **_: Any) -> None:
        # Another thread may compile for a call of its own.
        if event in _COMPILING and threading.get_ident() == thread:
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
