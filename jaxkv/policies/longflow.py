"""LongFlow: evict the token that contributes least to the attention's output.

Su et al., arXiv 2603.11504. Axis letters: `B` batch, `K` key/value heads, `S` slots.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from annotated_types import Ge

from jaxkv import state as kv
from jaxkv.kernels import decode, dispatch, longflow, longflow_tree
from jaxkv.kernels.cache import Nodes, Token
from jaxkv.kernels.scores import Score, value_norms
from jaxkv.kernels.weighing import PLAIN, scale_of
from jaxkv.policies.base import Speculable
from jaxkv.policies.eviction import attend_and_write, check_room, evict_in_bulk
from jaxkv.state import KVState
from jaxkv.trees import Pending


class LongFlowMemory(NamedTuple):
    """What LongFlow keeps beside the cache; it remembers nothing of earlier steps.

    Attributes:
      norms: float32 `[B, K, S]`, `scores.value_norms` of the values; None where
        several slots are freed at once, and computed then.
      prompt: int32 `[B]`, lengths of the prompts if they are protected, else None.
    """

    norms: jax.Array | None
    prompt: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongFlow(Speculable):
    """Evict the token that contributes least to the current attention output.

    Su et al., "LongFlow: Efficient KV Cache Compression for Reasoning Models" (arXiv
    2603.11504, section 3). With `alpha` the attention weight and `v` the value of a
    token, the paper's score is `||alpha * v||_1`, averaged over all query heads; one
    slot is given up per layer and sequence. The defaults are the paper's method as the
    authors' code has it, where even the token just written may be the victim.
    Deviations, none of which changes the mathematics: float32 throughout where the
    authors round to float16, and free slots named as such where they score 0.

    A prompt that exceeds the budget goes through whichever prefill policy is chosen;
    the authors use SnapKV with a window of 32, average pooling over 5, and one choice
    for all heads of a layer.

    Attributes:
      score: what is least: "l1" (the paper's), "l2", "attention" (`alpha` alone) or
        "deletion" (exactly how far the output moves without the token).
      n_sink: how many of the first positions are never evicted.
      n_recent: how many of the newest tokens are never evicted; 1 protects the current
        one, as the paper's equation 3 has it.
      protect_prompt: never evict what prefill kept of the prompt.
      shared: one victim for all heads of a layer, or one per key/value head.
      interval: evict every so many steps, that many tokens at once. Above 1 it costs a
        pass over the cache at these steps, and no step chooses in between.
    """

    score: Score = "l1"
    n_sink: Annotated[int, Ge(0)] = 0
    n_recent: Annotated[int, Ge(0)] = 0
    protect_prompt: bool = False
    shared: bool = True
    interval: Annotated[int, Ge(1)] = 1
    evicts = True

    @classmethod
    def paper(cls, **options) -> "LongFlow":
        """Return the paper's method: the defaults."""
        return cls(**options)

    @classmethod
    def recommended(cls, **options) -> "LongFlow":
        """Return what loses least where the prompt holds what the answer needs.

        The prompt and the newest 16 tokens stay. Attention to a rule or a fact of the
        prompt is rare, so the paper's score gives it up long before it is needed again.
        The README has the numbers. Not for prompts that fill most of the budget.
        """
        return cls(**dict(protect_prompt=True, n_recent=16) | options)

    @property
    def spare(self) -> int:
        """Slots that prefill leaves free: as many as are freed at once."""
        return self.interval

    @property
    def attends_trees(self) -> bool:
        """Whether one pass can tell what single steps would evict.

        Not in bulk, nor where a step's score needs the output of the one before.
        """
        return self.interval == 1 and self.score != "deletion"

    def check(self, budget: int) -> None:
        """Need room beside what is protected."""
        check_room(
            "LongFlow",
            budget,
            n_sink=self.n_sink,
            n_recent=self.n_recent,
            count=self.interval,
        )

    def default_implementation(self, platform: str) -> decode.Implementation:
        """Return the implementation that `None` stands for."""
        if self.interval > 1:
            return decode.choose(platform)
        return longflow.choose(platform, self.score)

    def begin(self, state: KVState, lengths: jax.Array) -> KVState:
        """Take the norms of the prompt's values, and its length if it is protected."""
        norms = prompt = None
        if self.interval == 1:
            norms = value_norms(state.values, self.score)
        if self.protect_prompt:
            # A copy, since one buffer cannot be donated in the states of all layers.
            prompt = jnp.array(lengths, copy=True)
        return dataclasses.replace(state, memory=LongFlowMemory(norms, prompt))

    def attend(
        self,
        query,
        key,
        value,
        state,
        position,
        *,
        implementation=None,
        weighing=PLAIN,
    ) -> tuple[jax.Array, KVState]:
        """Overwrite the least contribution; see `DecodePolicy.attend`."""
        oldest = self._oldest(state, position)
        newest = position - self.n_recent
        scale = scale_of(query)
        if self.interval == 1:
            out, slots = longflow.longflow_attention(
                query,
                Token(key, value, position),
                kv.to_slots(state, state.memory.norms),
                oldest,
                newest,
                scale=scale,
                score=self.score,
                shared=self.shared,
                implementation=implementation,
                **weighing.softmax,
            )
            memory = state.memory._replace(norms=slots.norms)
            return out, kv.from_slots(slots, state, memory)
        out, state = attend_and_write(
            *(query, key, value, state, position),
            implementation=implementation,
            weighing=weighing,
        )
        arrays = query, state.keys, state.values, state.positions

        def importance(rows):
            return longflow.token_importance(
                *(x[rows] for x in arrays),
                scale=scale,
                score=self.score,
                exact=implementation == "reference",
                **weighing.softmax,
            )

        return out, evict_in_bulk(
            state,
            importance,
            position,
            oldest,
            newest,
            count=self.interval,
            shared=self.shared,
        )

    def attend_tree(
        self,
        query,
        key,
        value,
        state,
        position,
        drafts,
        ancestors,
        *,
        depth,
        implementation=None,
        weighing=PLAIN,
    ) -> tuple[jax.Array, Pending]:
        """Give up along each path what plain decoding would; see `Speculable`."""
        del ancestors
        out, slots, targets = longflow_tree.longflow_tree(
            query,
            Nodes(key, value, position),
            kv.to_slots(state, state.memory.norms),
            self._oldest(state, position),
            drafts.parents,
            drafts.depths,
            n_recent=self.n_recent,
            depth=depth,
            scale=scale_of(query),
            score=self.score,
            shared=self.shared,
            implementation=dispatch.counterpart(
                implementation, longflow_tree.Implementation
            ),
            **weighing.softmax,
        )
        norms = value_norms(value, self.score).swapaxes(1, 2)
        memory = LongFlowMemory(norms, None)
        return out, Pending(key, value, slots[..., :1], targets, memory)

    def _oldest(self, state, position):
        """Return the least position that may be evicted, int32 `[B]`."""
        oldest = jnp.full_like(position, self.n_sink)
        prompt = state.memory.prompt
        return oldest if prompt is None else jnp.maximum(oldest, prompt)
