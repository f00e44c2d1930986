"""A server in a thread, and ways to talk with it."""

import contextlib
import http.client
import json
import signal
import socket
import threading
import time

from jaxkv import Engine

LIMITS = dict(max_prompt=128, max_new_tokens=32)


class Running:
    """A server at a free port of this machine."""

    def __init__(self, lm, *, grace=30.0, engine=None, **terms):
        # Where the extra `serve` is missing, tests of it are skipped.
        from jaxkv.server.app import Service, Terms
        from jaxkv.server.server import Server, listen

        self.engine = Engine(lm, rows=2, block=4, **LIMITS, **(engine or {}))
        self.service = Service(self.engine, Terms(name="tiny", **LIMITS, **terms))
        socket_ = listen("127.0.0.1", 0)
        self.port = socket_.getsockname()[1]
        seconds = terms.get("body_seconds", 10)
        self.server = Server(self.service, seconds=seconds, grace=grace)
        self.thread = threading.Thread(
            target=self.server.run, kwargs={"sockets": [socket_]}
        )
        self.thread.start()
        wait_until(lambda: self.server.started)

    def stop(self):
        self.server.handle_exit(signal.SIGTERM, None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()

    @contextlib.contextmanager
    def slowly(self, seconds=0.05):
        """Let each step of the engine take some time."""
        step = self.engine.step
        self.engine.step = lambda: time.sleep(seconds) or step()
        try:
            yield
        finally:
            del self.engine.step

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def ask(self, path, body=None, *, method=None, **headers):
        """Return status and body of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            if body is not None:
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                headers = {"Content-Type": "application/json"} | headers
            connection.request(
                method or ("GET" if body is None else "POST"), path, body, headers
            )
            response = connection.getresponse()
            return response.status, response.read()

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), 30)

    def send(self, data):
        """Send bytes, and return all that comes until the server closes."""
        with self.connect() as raw:
            with contextlib.suppress(OSError):
                raw.sendall(data)
            parts = []
            with contextlib.suppress(OSError):
                while part := raw.recv(65536):
                    parts.append(part)
            return b"".join(parts)


def wait_until(condition, seconds=60):
    """Return when this is so; a server does it in its own time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)
