"""Conversations that keep their cache: a turn costs its own tokens only.

A `Chat` is a value. `say` reads what the user's turn adds to the transcript, answers,
and returns the chat after it; the old one can be gone on with in another way.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np

from jaxkv import soundness
from jaxkv import state as kv
from jaxkv.contexts.context import Context, check_context
from jaxkv.expected import check_text
from jaxkv.generation import Running, follow_jit
from jaxkv.language_model import LanguageModel, check_model
from jaxkv.options import Options
from jaxkv.policies.base import DecodePolicy, PrefillPolicy
from jaxkv.policies.longflow import LongFlow
from jaxkv.policies.snapkv import SnapKV
from jaxkv.sampling import Sampler
from jaxkv.text import arguments, inference, planning
from jaxkv.text.chat import (
    check_template,
    encode_addition,
    encode_chat,
    encode_question,
)
from jaxkv.text.completion import Completion, completion
from jaxkv.text.documents import speaking_of
from jaxkv.text.planning import Plan, bucket
from jaxkv.text.questions import questions
from jaxkv.text.stopwatch import stopwatch

# Slots for what follows the first turn, where nothing evicts it. With more the cache
# grows seldom, and each time all programs compile anew.
_ROOM = 1024


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Read:
    """What is in the cache.

    Attributes:
      plan: of the first turn.
      running: the loop after the newest answer, whose last token is not cached.
      room: slots that are free for what follows, if the decode policy keeps everything.
      answer: the newest answer as text.
    """

    plan: Plan
    running: Running
    room: int
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Chat:
    """A conversation with a model, and the cache of what has been said.

    Attributes:
      lm: from `jaxkv.load`, with a chat template.
      options: policies, sampler and budget; see `begin`.
      seed: of the draws.
      messages: what was said, each with "role" and "content".
      tokens: the transcript as the model has read and written it.
      context: of one document that the first message begins with, or None.
    """

    lm: LanguageModel
    options: Options
    seed: int = 0
    messages: tuple[dict[str, str], ...] = ()
    tokens: tuple[int, ...] = ()
    context: Context | None = None
    _read: _Read | None = None  # None where the next turn reads everything

    @classmethod
    def begin(
        cls,
        lm: LanguageModel,
        *,
        system: str | None = None,
        context: Context | None = None,
        budget: int | None = None,
        prefill: PrefillPolicy | None = None,
        decode: DecodePolicy | None = None,
        sampler: Sampler | None = None,
        seed: int = 0,
    ) -> Self:
        """Return a conversation in which nobody has spoken.

        Args:
          lm: from `jaxkv.load`, with a chat template.
          system: the system's message; that of a context is in it.
          context: from `compress(chat=True)`, of one document, which the user's first
            message begins with. No turn reads it again.
          budget: tokens that each layer and head may keep: of the whole conversation,
            or of the first turn if `decode` does not evict. None keeps everything; what
            a context keeps is its own affair.
          prefill: eviction of what is read at once, as the first turn is; None is
            `SnapKV()` where there is a budget and no context.
          decode: eviction of all that follows; None is `LongFlow()` where there is a
            budget.
          sampler: None is `Greedy()`.
          seed: of the draws.

        Raises:
          ValueError: options at odds with each other, or a model without a template.
        """
        check_model("Chat.begin", lm)
        check_template(lm)
        if context is not None:
            _check_context(lm, context, system)
        if system is not None:
            check_text("Chat.begin", system=system)
        with speaking_of("Chat.begin", "message"):
            arguments.seeds(seed, 1)
            if budget is not None:
                budget = arguments.integer("budget", budget)
        if budget is not None:
            if context is None:
                prefill = prefill or SnapKV()
            decode = decode or LongFlow()
        options = arguments.static_options(
            "Chat.begin", prefill=prefill, decode=decode, sampler=sampler
        )
        options = dataclasses.replace(options, budget=budget)
        options.check()
        said = () if system is None else ({"role": "system", "content": system},)
        return cls(lm=lm, options=options, seed=seed, messages=said, context=context)

    def with_budget(self, budget: int | None) -> Self:
        """Return the conversation under another budget; the next turn reads it anew."""
        policies: dict[str, Any] = {}
        if budget is not None and self.options.budget is not None:
            policies = {"prefill": self.options.prefill, "decode": self.options.decode}
        begun = self.begin(
            self.lm,
            context=self.context,
            budget=budget,
            **policies,
            sampler=self.options.sampler,
            seed=self.seed,
        )
        return dataclasses.replace(begun, messages=self.messages)

    def say(
        self,
        text: str,
        *,
        max_new_tokens: int = 256,
        on_tokens: Callable[[list[list[int]]], None] | None = None,
        block: int = 32,
    ) -> tuple[Self, Completion]:
        """Say something, and return the chat after the answer, and the answer.

        Args:
          text: the user's message.
          max_new_tokens: longest answer.
          on_tokens: called with the first token, and then about every `block` tokens.
          block: see `on_tokens`.

        Raises:
          ValueError: the template cannot write this, or the model has no positions
            left; the message says what to do.
        """
        check_text("Chat.say", text=text)
        with speaking_of("Chat.say", "message"):
            max_new_tokens, block = arguments.limits(max_new_tokens, block, on_tokens)
        said = (*self.messages, {"role": "user", "content": text})
        lm, tokens = self.lm, self._transcript(said)
        begun = None if tokens is None else self._read
        asked = None
        context = self.context
        if tokens is None and context is not None:
            asked = self._asked(context, said, max_new_tokens)
            tokens = tuple(asked.rows[0])
        elif tokens is None:
            tokens = tuple(encode_chat(lm, said))
        budgets = None
        if begun is None and asked is None and self.options.budget is not None:
            budgets = (self.options.budget,)
        with speaking_of("Chat.say", "conversation"):
            arguments.check_fit(lm, [tokens], max_new_tokens, self.options, budgets)
        stops = arguments.stop_ids(lm, None)
        with stopwatch() as lap, jax.transfer_guard("allow"):
            if asked is not None:
                plan = asked.plan
                state = asked.start(lm, seed=self.seed, stops=stops, spans=None)
                room = plan.max_out
            elif begun is None:
                plan, state, room = self._begin(tokens, max_new_tokens, stops)
            else:
                plan = begun.plan
                state, room = self._follow(begun, tokens, max_new_tokens, stops)
            reading = lap()
            state = inference.advance(
                *(lm, plan, state, stops, max_new_tokens),
                block=block,
                on_tokens=on_tokens,
            )
            decoding = lap()
            out = completion(lm, plan, [tokens], state, reading, decoding)
        (answer,) = out.text
        after = dataclasses.replace(
            self,
            messages=(*said, {"role": "assistant", "content": answer}),
            tokens=(*tokens, *out.tokens[0]),
            _read=_Read(
                plan=plan,
                running=state,
                room=room - (out.lengths[0] - 1),
                answer=answer,
            ),
        )
        return after, out

    @property
    def kept(self) -> int:
        """Tokens that the layer and head with the most of them holds.

        Of layers without a window, if there are any.
        """
        if self._read is None:
            return 0
        cache = kv.global_layers(self._read.running.cache)
        return max(int(kv.occupancy(layer).max()) for layer in cache)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache, bookkeeping included."""
        return 0 if self._read is None else kv.num_bytes(self._read.running.cache)

    def __repr__(self) -> str:
        return (
            f"Chat({self.lm.name}, {len(self.messages)} messages, "
            f"{len(self.tokens)} tokens, budget={self.options.budget})"
        )

    def _transcript(self, said: Sequence[dict[str, str]]) -> tuple[int, ...] | None:
        """Return all tokens if the cache may stay, else None."""
        if self._read is None:
            return None
        added = encode_addition(
            self.lm, self.messages[:-1], self._read.answer, said[len(self.messages) :]
        )
        if added is None:
            return None
        # The template writes the end of the answer itself.
        ended = bool(np.asarray(self._read.running.done)[0])
        return (*(self.tokens[:-1] if ended else self.tokens), *added)

    def _asked(self, context, said, max_new_tokens):
        """Return everything that was said, as a question about the context."""
        turns = [message["content"] for message in said]
        ids = encode_question(self.lm, *turns)
        position = int(context.lengths[0]) + len(ids)
        room = self._room(position, max_new_tokens)
        options = dataclasses.replace(self.options, budget=None)
        with speaking_of("Chat.say", "message"):
            return questions(
                *(self.lm, context, [ids], None, options),
                budget=self.options.budget,
                compression_ratio=None,
                max_new_tokens=max_new_tokens,
                room=room,
            )

    def _room(self, position, max_new_tokens):
        """Return how many slots to have for what follows a position."""
        left = self.lm.config.max_positions - position
        return max(bucket(max_new_tokens), min(_ROOM, bucket(left)))

    def _begin(self, tokens, max_new_tokens, stops):
        """Read everything that was said."""
        options = self.options
        evicts, budget = options.decode.evicts, options.budget
        room = self._room(len(tokens), max_new_tokens)
        plan = planning.plan(
            [tokens],
            dataclasses.replace(options, budget=None),
            None if budget is None else (budget,),
            max_new_tokens=room,
            windows=self.lm.config.windows,
        )
        if evicts:  # all of them, however short the first turn is
            size = options.num_slots(len(tokens), budget or 0)
            slots = kv.all_slots(self.lm.config.windows, size)
            plan = dataclasses.replace(plan, slots=slots)
        state = inference.start(self.lm, plan, [tokens], self.seed, stops, None)
        return plan, state, plan.max_out

    def _follow(self, begun, tokens, max_new_tokens, stops):
        """Read what is new, behind what the cache holds."""
        state, room = begun.running, begun.room
        new = tokens[len(self.tokens) - 1 :]
        need = len(new) + max_new_tokens
        if not self.options.decode.evicts and need > room:
            more = bucket(max(need - room, max(begun.plan.slots) // 2))
            grown = tuple(kv.grow(layer, more) for layer in state.cache)
            state, room = dataclasses.replace(state, cache=grown), room + more
        padded = np.zeros((1, bucket(len(new))), np.int32)
        padded[0, : len(new)] = new
        state = follow_jit(
            *(self.lm.network, self.lm.params, state, padded),
            *(np.array([len(new)], np.int32), stops),
            options=begun.plan.options,
            max_out=max(begun.plan.max_out, bucket(max_new_tokens)),
        )
        soundness.check(state, self.lm.params, self.options)
        return state, room - len(new)


def _check_context(lm: LanguageModel, context: Context, system: str | None) -> None:
    """Raise ValueError for a context that a conversation cannot begin with."""
    check_context("Chat.begin", "context", context)
    context.identity.check(lm.identity)
    if len(context) != 1:
        raise ValueError(
            f"a conversation begins with one document, but the context has "
            f"{len(context)}; choose one by context.take([0])."
        )
    if not context.chat:
        raise ValueError(
            "the context was read without a chat template; compress the document again "
            "with chat=True (on the command line, --chat)."
        )
    if system is not None:
        raise ValueError(
            "system= comes before the document, which has been read; pass it to "
            "jaxkv.compress."
        )
