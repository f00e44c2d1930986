"""What every request passes: who asks, what has failed, what is counted."""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
from collections.abc import Awaitable, Collection, Coroutine
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxkv.server.metrics import Metrics
from jaxkv.server.refusals import Refusal, fault

R = TypeVar("R")


class GoneError(Exception):
    """The client has closed its connection."""


class Gate:
    """Checks hosts and keys, and turns what is raised into errors of the API.

    What is not ours to tell stays here: a log holds the name of an error's class, and
    neither its text nor where it was raised.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        key: str | None,
        hosts: Collection[str] | None,
        routes: Collection[str],
        metrics: Metrics,
    ):
        """Stand before an application.

        Args:
          app: the application.
          key: that requests must bring, except for `/health`; None for none.
          hosts: names that requests may call the server by, in lower case; None for
            all. A page of a browser that has made its own name ours is kept out.
          routes: that are counted by name.
          metrics: that counts.
        """
        self._app, self._hosts, self._routes = app, hosts, routes
        self._key = None if key is None else _digest(key.encode("utf-8"))
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._check(scope)
                await self._app(scope, receive, noted)
            except (GoneError, ClientDisconnect):
                status = status or 499  # for the counter; nobody reads an answer
            except Exception as error:
                refusal = as_refusal(error)
                if not status:
                    await answer(refusal)(scope, receive, noted)
        finally:
            path = scope["path"]
            route = path if path in self._routes else "other"
            self._metrics.requests.labels(route, str(status)).inc()

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if (
            self._hosts is not None
            and _host(headers.get("host", "")) not in self._hosts
        ):
            message = "This server is not known by the name in the header Host."
            raise Refusal(400, message)
        if self._key is None or scope["path"] == "/health":
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        matches = hmac.compare_digest(
            _digest(given.strip().encode("latin-1")), self._key
        )
        if scheme.lower() != "bearer" or not matches:
            message = "Incorrect API key provided."
            raise Refusal(401, message, code="invalid_api_key")


def as_refusal(error: Exception) -> Refusal:
    """Return what is told of an error; one of ours is logged by its name."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):
        return Refusal(error.status_code, f"{error.detail}.")
    name = type(error).__name__
    logging.getLogger(__name__).error(f"jaxkv: a request failed: {name}")
    return fault()


def answer(refusal: Refusal) -> JSONResponse:
    """Return a refusal as a response."""
    return JSONResponse(
        refusal.body(), status_code=refusal.status, headers=refusal.headers()
    )


async def body_of(request: Request, *, most: int, seconds: float) -> bytes:
    """Return the body of a request.

    Args:
      request: that brings it.
      most: bytes that it may have.
      seconds: that it may take.

    Raises:
      Refusal: it is longer, slower, or no JSON by its header.
      ClientDisconnect: the client has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Pages of other sites may send other kinds without asking a browser.
        raise Refusal(415, "Send JSON, with the header Content-Type: application/json.")
    too_long = Refusal(
        413, f"The body has more than {most} bytes.", code="request_too_large"
    )
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said[:20]) > most:
        raise too_long
    parts, length = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                parts.append(part)
                length += len(part)
                if length > most:
                    raise too_long
    except TimeoutError:
        message = f"The body took longer than {seconds:g} seconds."
        raise Refusal(408, message, code="timeout") from None
    return b"".join(parts)


async def until(
    work: Coroutine[Any, Any, R], gone: Awaitable[Any], *, seconds: float
) -> R:
    """Return what work returns, which ends when its time or its client does.

    Args:
      work: whatever is to be done.
      gone: ends when the client has gone.
      seconds: that it may take.

    Raises:
      Refusal: it took longer.
      GoneError: the client has gone.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(gone)
    try:
        done, _ = await asyncio.wait(
            {working, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        if working in done:
            return working.result()
        if leaving in done:
            raise GoneError
        message = "The request took longer than this server allows."
        raise Refusal(408, message, code="timeout")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def departure(receive: Receive) -> None:
    """Return when the client has gone; its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def is_loopback(host: str) -> bool:
    """Return whether an address is this machine's own, by name or number."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def own_names(host: str) -> frozenset[str]:
    """Return the names by which a server may be called that listens at a loopback."""
    return frozenset({"localhost", "127.0.0.1", "::1", host.lower()})


def _host(header: str) -> str:
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()  # of one length, whatever was sent
