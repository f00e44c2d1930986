"""What `jaxkv.generate` returns: outputs as Python's own values, and what they cost."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import numpy as np

from jaxkv import sharding
from jaxkv import state as kv
from jaxkv.contexts.context import Context
from jaxkv.generation import Running
from jaxkv.kernels import prefill as prefill_kernels
from jaxkv.kernels import shared_slots
from jaxkv.language_model import LanguageModel
from jaxkv.runtime.meshes import mesh_of
from jaxkv.sequences import alternatives
from jaxkv.shown import brief
from jaxkv.speculation.counts import DraftStats, draft_stats
from jaxkv.speculation.guarantee import guarantee
from jaxkv.text.planning import Plan
from jaxkv.text.stopwatch import Lap


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """What a call of `generate` cost.

    Attributes:
      prompt_tokens: of each row.
      cache_bytes: of the whole cache, bookkeeping included.
      window_bytes: those of layers that hold a window, which no budget cuts.
      slots: of the layer with the largest state, those that rows share not counted.
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
    window_bytes: int = 0
    drafts: DraftStats | None = None

    __repr__ = brief


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """What `generate` returns; every field but `stats` has one entry per prompt.

    Attributes:
      decoded: `text`, or None where the model has no tokenizer.
      tokens: the outputs' token ids, a stop id included.
      lengths: how many they are.
      finish_reason: "stop" (a stop id) or "length" (`max_new_tokens`).
      stats: what it cost.
      logprobs: the logarithm of the probability that the network gave to each token, in
        nats, before the sampler changed it; None unless asked for.
      top_logprobs: for each token, the likeliest ones in its place and theirs, the
        likeliest first; None unless asked for.
      context: prompts and outputs, to be gone on with; None unless asked for.
    """

    decoded: tuple[str, ...] | None
    tokens: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    finish_reason: tuple[str, ...]
    stats: Stats
    logprobs: tuple[tuple[float, ...], ...] | None = None
    top_logprobs: tuple[tuple[dict[int, float], ...], ...] | None = None
    context: Context | None = None

    __repr__ = brief

    @property
    def text(self) -> tuple[str, ...]:
        """The outputs, special tokens left out.

        Raises:
          ValueError: the model has no tokenizer.
        """
        if self.decoded is None:
            raise ValueError(
                "text: the model has no tokenizer, so its outputs are token ids; read "
                "tokens, or put the checkpoint's tokenizer.json into its folder."
            )
        return self.decoded

    def with_alternatives(self, number: int | None) -> "Completion":
        """Return it with so many alternatives to each token, None for no logprobs."""
        if self.logprobs is None or number is None:
            return dataclasses.replace(self, logprobs=None, top_logprobs=None)
        tops = self.top_logprobs if number else None
        fewer = tops and tuple(
            tuple(dict(itertools.islice(top.items(), number)) for top in row)
            for row in tops
        )
        return dataclasses.replace(self, top_logprobs=fewer)


def completion(
    lm: LanguageModel,
    plan: Plan,
    ids: Sequence[Sequence[int]],
    state: Running,
    reading: Lap,
    decoding: Lap,
) -> Completion:
    """Return the outputs as Python's own values, and what they cost."""
    lengths = np.asarray(state.lengths).tolist()
    out = np.asarray(state.tokens)
    tokens = tuple(
        tuple(row[:length].tolist()) for row, length in zip(out, lengths, strict=True)
    )
    texts = None
    if lm.tokenizer is not None:
        texts = tuple(lm.tokenizer.decode(t, skip_special_tokens=True) for t in tokens)
    options, prompts = plan.options, [len(row) for row in ids]
    backend, mesh = jax.default_backend(), mesh_of(lm.params)
    prefill = options.prefill_implementation or prefill_kernels.choose(
        backend, lm.dtype, length=plan.prompt, head_dim=lm.config.head_dim
    )
    noted = state.logprobs and jax.tree.map(np.asarray, state.logprobs)
    decoded, seconds = sum(lengths) - len(ids), decoding.computing
    return Completion(
        decoded=texts,
        tokens=tokens,
        lengths=tuple(lengths),
        finish_reason=tuple("stop" if d else "length" for d in np.asarray(state.done)),
        stats=Stats(
            prompt_tokens=tuple(prompts),
            cache_bytes=kv.num_bytes(state.cache),
            window_bytes=kv.num_bytes(kv.sliding_layers(state.cache)),
            slots=max(plan.slots),
            compile_seconds=reading.compiling + decoding.compiling,
            prefill_seconds=reading.computing,
            decode_seconds=seconds,
            tokens_per_second=decoded / seconds if seconds else 0.0,
            prefill_implementation=prefill,
            decode_implementation=options.decode_implementation
            or (
                shared_slots.choose(backend)
                if any(layer.shared for layer in state.cache)
                else options.decode.default_implementation(backend)
            ),
            drafts=None
            if state.speculation is None
            else draft_stats(
                *(state.speculation.counts, lengths, prompts),
                guarantee=guarantee(
                    *(lm.config, options),
                    rows=len(ids),
                    dtype=lm.dtype,
                    devices=1 if mesh is None else sharding.devices_of_a_row(mesh),
                ),
            ),
        ),
        logprobs=noted
        and tuple(
            tuple(row[:length].tolist())
            for row, length in zip(noted.chosen, lengths, strict=True)
        ),
        top_logprobs=noted and alternatives(noted, lengths),
    )
