"""What a server refuses, as OpenAI's API says it."""

from typing import Any


class Refusal(Exception):
    """A request that gets an error instead of an answer.

    Attributes:
      status: of HTTP.
      message: for who has asked; it holds no path and nothing of the prompt.
      param: of the request that is wrong, if one is.
      code: what programs tell errors apart by, if there is one.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """Return what the API sends."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Return what HTTP says beside it."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status in (429, 503) else {}


_KINDS = {
    408: "timeout",
    429: "requests",
    500: "server_error",
    503: "server_error",
}


def fault() -> Refusal:
    """Return the error of what is no caller's fault; it says nothing of its cause."""
    return Refusal(500, "The server failed at this request.")


def stopping() -> Refusal:
    """Return the error of a server that ends, or whose engine has failed."""
    message = "The server is stopping, and takes no new requests."
    return Refusal(503, message, code="stopping")
