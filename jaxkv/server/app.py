"""The routes of a server that speaks OpenAI's API, over one engine."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxkv.fields import MOST_SEED
from jaxkv.language_model import LanguageModel
from jaxkv.server import refusals
from jaxkv.server.bodies import Chat, Common, Completion, parse
from jaxkv.server.gate import (
    Gate,
    answer,
    as_refusal,
    body_of,
    departure,
    until,
)
from jaxkv.server.metrics import Metrics
from jaxkv.server.refusals import Refusal
from jaxkv.server.replies import ChatReply, CompletionReply, Reply
from jaxkv.server.stream import Stream, events
from jaxkv.serving.echoes import echo, warm_up
from jaxkv.serving.engine import Engine
from jaxkv.serving.pieces import Piece, pieces
from jaxkv.serving.worker import FullError, Group, StoppedError, Worker
from jaxkv.text.chat import encode_chat
from jaxkv.text.prompts import encode

R = TypeVar("R")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """What a server grants.

    Attributes:
      name: of the model, for clients.
      max_prompt: tokens of a prompt, as the engine's.
      max_new_tokens: of an answer, as the engine's.
      top_logprobs: alternatives to each token, as the engine's; None notes nothing.
      repetition_penalties: whether requests may have them, as the engine's.
      evicts: whether the engine has a budget.
      queue: requests that may wait for a row.
      max_body: bytes of a request.
      body_seconds: that these may take to arrive.
      seconds: that a request may take in all.
      key: that requests must bring, or None.
      hosts: names that the server may be called by, or None.
    """

    name: str
    max_prompt: int
    max_new_tokens: int
    top_logprobs: int | None = None
    repetition_penalties: bool = False
    evicts: bool = False
    queue: int = 64
    max_body: int = 2**20
    body_seconds: float = 10.0
    seconds: float = 600.0
    key: str | None = None
    hosts: frozenset[str] | None = None


class Service:
    """Answers requests with an engine.

    Attributes:
      app: for a server of ASGI.
      worker: runs the engine; who serves the app starts and stops it.
      stopping: whether new requests are refused.
    """

    def __init__(self, engine: Engine, terms: Terms):
        """Make the routes.

        Args:
          engine: nobody else may call its `step`.
          terms: what is granted.
        """
        self.worker = Worker(engine, queue=terms.queue)
        self.stopping = False
        # Messages of the library name the model, which may be called by its path.
        self._lm: LanguageModel = dataclasses.replace(engine.lm, name=terms.name)
        self._terms, self._metrics = terms, Metrics(self.worker)
        # One thread: a tokenizer is not made for several.
        self._reader = concurrent.futures.ThreadPoolExecutor(1, "jaxkv-tokenizer")
        routes = [
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{model}", self._model),
            Route("/health", self._health),
            Route("/metrics", self._numbers),
        ]
        gate = Middleware(
            Gate,
            key=terms.key,
            hosts=terms.hosts,
            routes=frozenset(route.path for route in routes),
            metrics=self._metrics,
        )

        def refused(_: Request, error: Exception) -> Response:
            return answer(as_refusal(error))

        self.app = Starlette(
            routes=routes,
            middleware=[gate],
            exception_handlers={HTTPException: refused},
        )

    def warm_up(self) -> None:
        """Compile all that requests need, before the worker starts."""
        self.worker.engine.warm_up()
        if self._terms.top_logprobs is not None and not self._terms.evicts:
            warm_up(self._lm, self._terms.max_prompt, self._alternatives)

    @property
    def _alternatives(self) -> int:
        """How many are noted of a token of a prompt; one program has them all."""
        return max(1, self._terms.top_logprobs or 0)

    def close(self) -> None:
        """Let go of the thread that reads prompts."""
        self._reader.shutdown(cancel_futures=True)

    async def _health(self, _: Request) -> Response:
        if self.stopping or self.worker.failed:
            raise refusals.stopping()
        return JSONResponse({"status": "ok"})

    async def _numbers(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["model"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        terms = self._terms
        most = terms.max_prompt + terms.max_new_tokens
        card = {"id": terms.name, "object": "model", "created": 0, "owned_by": "jaxkv"}
        return card | {"max_model_len": most}

    async def _completions(self, request: Request) -> Response:
        begun = time.monotonic()
        asked = await self._asked(Completion, request)
        if asked.max_tokens == 0 and not asked.echo:
            raise Refusal(400, "max_tokens: 0 goes with echo.", param="max_tokens")
        if asked.echo and asked.alternatives is not None and self._terms.evicts:
            message = (
                "echo with logprobs tells what the whole prompt gives, and this server "
                "has a budget; ask one without."
            )
            raise Refusal(400, message, param="echo")
        prompts: Any = asked.prompts
        if not 0 < len(prompts) * asked.n <= self.worker.most:
            message = f"prompts times n must be between 1 and {self.worker.most}."
            raise Refusal(400, message, param="prompt")
        ids = await self._read(lambda: encode(self._lm, prompts), "prompt")
        reply = CompletionReply(*self._words(asked, ids))
        return await self._answered(
            request, asked, ids, reply, asked.max_tokens, begun, echoes=asked.echo
        )

    async def _chat(self, request: Request) -> Response:
        begun = time.monotonic()
        asked = await self._asked(Chat, request)
        if asked.n > self.worker.most:
            message = f"n must be between 1 and {self.worker.most}."
            raise Refusal(400, message, param="n")
        if not self._lm.tokenizer.chat_template:
            message = "This model has no chat template; ask /v1/completions."
            raise Refusal(400, message, param="messages")
        spoken = [message.spoken() for message in asked.messages]
        tokens = await self._read(lambda: [encode_chat(self._lm, spoken)], "messages")
        reply = ChatReply(*self._words(asked, tokens))
        most = asked.max_completion_tokens or asked.max_tokens
        most = self._terms.max_new_tokens if most is None else most
        return await self._answered(request, asked, tokens, reply, most, begun)

    async def _asked(self, kind: Any, request: Request) -> Any:
        """Return the body of a request, checked against what is granted."""
        terms = self._terms
        if self.stopping or self.worker.failed:
            raise refusals.stopping()
        body = await body_of(request, most=terms.max_body, seconds=terms.body_seconds)
        asked: Completion | Chat = parse(kind, body)
        self._check_model(asked.model)
        wanted, granted = asked.alternatives, terms.top_logprobs
        if wanted is not None and (granted is None or wanted > granted):
            message = f"This server notes {granted or 0} alternatives to a token."
            if granted is None:
                message = "This server notes no logprobs; it needs --top-logprobs."
            raise Refusal(400, message, param="logprobs")
        if asked.budget is not None and not terms.evicts:
            message = "This server has no budget, below which a request's could be."
            raise Refusal(400, message, param="budget")
        if asked.repetition_penalty != 1 and not terms.repetition_penalties:
            message = "This server has no penalties; it needs --repetition-penalties."
            raise Refusal(400, message, param="repetition_penalty")
        return asked

    def _check_model(self, name: str) -> None:
        if name != self._terms.name:
            message = "There is no model of this name here; see /v1/models."
            raise Refusal(404, message, param="model", code="model_not_found")

    async def _read(self, encoded: Callable[[], list[Any]], param: str) -> list[Any]:
        """Return the token ids of prompts, read in a thread."""
        loop = asyncio.get_running_loop()
        try:
            ids = await loop.run_in_executor(self._reader, encoded)
        except ValueError as error:
            raise _bad(error, param) from None
        longest, most = max(map(len, ids)), self._terms.max_prompt
        if longest > most:
            message = f"A prompt may have {most} tokens here; this one has {longest}."
            code = "context_length_exceeded"
            raise Refusal(400, message, param=param, code=code)
        return [np.asarray(row, np.int32) for row in ids]

    def _words(self, asked: Common, ids: Sequence[Any]) -> tuple[Any, ...]:
        """Return what a reply begins with."""
        tokens = sum(map(len, ids))
        return self._lm.tokenizer, self._terms.name, tokens, asked.alternatives

    async def _answered(
        self,
        request: Request,
        asked: Completion | Chat,
        ids: Sequence[np.ndarray],
        reply: Reply,
        most: int,
        begun: float,
        *,
        echoes: bool = False,
    ) -> Response:
        """Let the engine answer, and return it whole or as a stream."""
        group = self._submit(asked, ids, most) if most else None
        texts = self._echoes(asked, ids, last=group is None) if echoes else None
        said = self._said(group, texts, asked.stops, begun)
        self._metrics.tokens.labels("prompt").inc(sum(map(len, ids)))
        left = self._terms.seconds - (time.monotonic() - begun)
        if asked.stream:
            usage = asked.stream_options.include_usage
            answers = len(ids) * asked.n
            said_so = events(said, reply, answers, usage)
            return Stream(said_so, left, at_end=functools.partial(self._leave, group))

        async def collected() -> list[Piece]:
            async with contextlib.aclosing(said):
                return [piece async for piece in said]

        try:
            found = await until(collected(), departure(request.receive), seconds=left)
        finally:
            self._leave(group)
        return JSONResponse(reply.whole(found))

    def _leave(self, group: Group | None) -> None:
        """Free the rows of a group that nobody reads any more."""
        if group is not None:
            self.worker.cancel(group)

    def _submit(self, asked: Common, ids: Sequence[np.ndarray], most: int) -> Group:
        if most > self._terms.max_new_tokens:
            message = f"max_tokens is at most {self._terms.max_new_tokens} here."
            raise Refusal(400, message, param="max_tokens")
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        wanted = [
            {
                "prompt": row,
                "sampler": asked.sampler,
                "max_new_tokens": most,
                "seed": (seed + number) % (MOST_SEED + 1),
                "budget": asked.budget,
            }
            for row in ids
            for number in range(asked.n)
        ]
        try:
            return self.worker.submit(wanted)
        except ValueError as error:
            raise _bad(error, None) from None
        except FullError:
            raise _full() from None
        except StoppedError:
            raise refusals.stopping() from None

    async def _echoes(
        self, asked: Completion | Chat, ids: Sequence[np.ndarray], *, last: bool
    ) -> AsyncIterator[Piece]:
        """Yield prompts as the beginnings of their answers."""
        for place, row in enumerate(ids):
            tokens = row.tolist()
            text = self._lm.tokenizer.decode(tokens, skip_special_tokens=True)
            chosen: Any = None
            top: Any = None
            if asked.alternatives is not None:
                job = functools.partial(echo, self._lm, tokens, self._alternatives)
                found = await self.worker.run(job)
                chosen, top = ([None, *column] for column in found)
            for number in range(asked.n):
                yield Piece(
                    index=place * asked.n + number,
                    text=text,
                    tokens=tuple(tokens),
                    logprobs=chosen,
                    top_logprobs=top,
                    reason="length" if last else None,
                    given=True,
                )

    async def _said(
        self,
        group: Group | None,
        echoes: AsyncIterator[Piece] | None,
        stops: Sequence[str],
        begun: float,
    ) -> AsyncGenerator[Piece, None]:
        """Yield all pieces of all answers."""
        try:
            if echoes is not None:
                async for piece in echoes:
                    yield piece
            if group is not None:
                async for piece in pieces(
                    self.worker, group, self._lm.tokenizer, stops
                ):
                    self._metrics.tokens.labels("answer").inc(len(piece.tokens))
                    yield piece
            self._note(group, time.monotonic() - begun)
        except FullError:
            raise _full() from None
        except StoppedError:
            raise refusals.stopping() from None

    def _note(self, group: Group | None, seconds: float) -> None:
        """Count how long requests took that have ended."""
        self._metrics.seconds.observe(seconds)
        for handle in () if group is None else group.handles:
            result = handle.result
            if result is None or result.first_token is None:
                continue
            self._metrics.first.observe(result.first_token)
            if len(result.tokens) > 1:
                rest = result.seconds - result.first_token
                self._metrics.between.observe(rest / (len(result.tokens) - 1))


def _full() -> Refusal:
    message = "The server is full; try again later."
    return Refusal(429, message, code="rate_limit_exceeded")


def _bad(error: ValueError, param: str | None) -> Refusal:
    """Return what the library says of a request, without the name of a function."""
    return Refusal(400, re.sub(r"^\w+: ", "", str(error)), param=param)
