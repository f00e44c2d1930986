"""A service on a socket: how it begins, how it ends, and how long it listens."""

import asyncio
import contextlib
import logging
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxkv.server.app import Service

_MORE_CONNECTIONS = 64  # than requests that may run or wait
_TICK = 0.05  # seconds between two looks at what still runs
_LAST = 2  # seconds that connections have to close


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
      host: a name, or an address of either kind.
      port: 0 takes one that is free.

    Raises:
      OSError: there is no such address, or it is taken.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(f"there is no address {host!r} ({error}).") from error
    return socket.create_server(address[:2], family=family, backlog=512)


class Server(uvicorn.Server):
    """Serves a service until a signal, and then until what runs has ended."""

    def __init__(self, service: Service, *, seconds: float, grace: float):
        """Listen to nothing yet; `run(sockets=)` does.

        Args:
          service: the service.
          seconds: that a connection may take to bring a request.
          grace: seconds that running requests have to end after a signal.
        """
        most = service.worker.most + _MORE_CONNECTIONS
        super().__init__(
            uvicorn.Config(
                service.app,
                http=_protocol(seconds),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=most,
                timeout_graceful_shutdown=_LAST,
            )
        )
        self._service, self._grace = service, grace
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Run the engine, and answer, until a signal."""
        # Of what a client sends that is no HTTP, and of errors with their traceback,
        # clients are told, and no log.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_named)
        self._service.worker.start()
        try:
            await super().serve(sockets)
        finally:
            await self._service.worker.stop()
            self._service.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Refuse new requests and end with the last of the others; then at once."""
        if self._loop is None or self._service.stopping:
            self.should_exit = True
            self.force_exit = sig == signal.SIGINT
            return
        self._service.stopping = True
        self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self._ending = asyncio.get_running_loop().create_task(self._drained())

    async def _drained(self) -> None:
        """Wait for what runs, cancel it after its grace, and stop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace):
                while self._service.worker.taken or self.server_state.tasks:
                    await asyncio.sleep(_TICK)
        await self._service.worker.stop()
        self.should_exit = True


def _named(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log the class of an error that nobody has caught, and no more of it."""
    name = type(context.get("exception")).__name__
    logging.getLogger(__name__).error(f"jaxkv: the event loop met {name}")


def _protocol(seconds: float) -> type[H11Protocol]:
    """Return uvicorn's protocol, which closes connections that bring no request."""

    class Bounded(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_request()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._timer.cancel()
            self._wait_for_request()

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def _wait_for_request(self) -> None:
            self._timer = self.loop.call_later(seconds, self._look)

        def _look(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()
            else:
                self._wait_for_request()

    return Bounded
