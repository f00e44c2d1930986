"""What a server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import generate_latest as _generate_latest

from jaxkv.serving.worker import Worker

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters of one server.

    Attributes:
      requests: by route and status.
      tokens: of prompts and of answers, by kind.
      first: seconds until a request's first token.
      between: seconds between two tokens of a request, on average.
      seconds: of whole requests.
    """

    def __init__(self, worker: Worker):
        """Begin at 0; how many requests run and wait is asked of the worker."""
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "jaxkv_requests",
            "Requests that were answered.",
            ["route", "status"],
            registry=registry,
        )
        self.tokens = Counter(
            "jaxkv_tokens", "Tokens read and written.", ["kind"], registry=registry
        )
        self.first = Histogram(
            "jaxkv_first_token_seconds",
            "Time to the first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.between = Histogram(
            "jaxkv_between_tokens_seconds",
            "Time between tokens, the mean of a request.",
            buckets=_BETWEEN,
            registry=registry,
        )
        self.seconds = Histogram(
            "jaxkv_request_seconds",
            "Time of whole requests.",
            buckets=_SECONDS,
            registry=registry,
        )
        engine = worker.engine
        gauges = {
            "jaxkv_rows": ("Rows.", lambda: engine.rows),
            "jaxkv_rows_running": ("Rows that are taken.", lambda: engine.running),
            "jaxkv_requests_waiting": (
                "Requests without a row.",
                lambda: engine.waiting,
            ),
        }
        for name, (said, value) in gauges.items():
            Gauge(name, said, registry=registry).set_function(value)

    def text(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        return _generate_latest(self._registry)
