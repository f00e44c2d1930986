"""Answers by server-sent events."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxkv.server.gate import GoneError, as_refusal, departure, until
from jaxkv.server.replies import Reply
from jaxkv.serving.pieces import Piece

_LAST_WORDS = 1.0  # seconds that a client has to take the end of a stream


class Stream(Response):
    """An answer by server-sent events, while its client is there and time is left."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        seconds: float,
        *,
        at_end: Callable[[], None],
    ):
        """Send nothing yet.

        Args:
          events: in their order.
          seconds: that they may take.
          at_end: called when the last was sent, or none will be sent any more.
        """
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events, self._seconds, self._at_end = events, seconds, at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what there is as it comes; an error is the last event."""

        async def tell(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async def everything() -> None:
            async with contextlib.aclosing(self._events) as events:
                await send(start)
                async for event in events:
                    await tell(event)
                await tell(b"data: [DONE]\n\n", more=False)

        headers = self.raw_headers
        start = {"type": "http.response.start", "status": 200, "headers": headers}
        try:
            await until(everything(), departure(receive), seconds=self._seconds)
        except GoneError:
            raise
        except Exception as error:
            last = tell(_event(as_refusal(error).body()), more=False)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(last, _LAST_WORDS)
        finally:
            self._at_end()


async def events(
    said: AsyncGenerator[Piece, None], reply: Reply, answers: int, usage: bool
) -> AsyncGenerator[bytes, None]:
    """Yield an answer as server-sent events."""
    async with contextlib.aclosing(said):
        for chunk in reply.opening(answers):
            yield _event(chunk)
        async for piece in said:
            for chunk in reply.chunks(piece):
                yield _event(chunk)
        if usage:
            yield _event(reply.closing())


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
