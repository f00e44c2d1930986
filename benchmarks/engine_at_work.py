"""What `engine.py` needs: requests, a file of results, and an engine at work."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

import jaxkv
from jaxkv.provenance import write_json

_EVERY = 5.0  # seconds between two writings
_TOLD = ("seconds", "ended", "tokens_per_s", "steady", "host_share", "first_token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A request of the workload."""

    prompt: np.ndarray
    new: int


def workload(
    number: int, prompt: tuple[int, int], new: tuple[int, int], vocabulary: int
) -> list[Asked]:
    """Draw requests: lengths on a logarithmic scale, most outputs short, a few long."""
    rng = np.random.default_rng(0)

    def lengths(least: int, most: int, power: float) -> np.ndarray:
        share = rng.random(number) ** power
        return np.round(least * (most / least) ** share).astype(int)

    sizes = [n for n in 2 ** np.arange(16) if prompt[0] <= n <= prompt[1]]
    prompts, outputs = rng.choice(sizes, number), lengths(*new, 2.0)
    return [
        Asked(prompt=rng.integers(3, vocabulary, size).astype(np.int32), new=int(out))
        for size, out in zip(prompts, outputs, strict=True)
    ]


class Record:
    """What has been measured, on disk every few seconds.

    Attributes:
      content: of the file.
    """

    def __init__(self, path: Path | None, until: float, content: dict[str, Any]):
        """Write to a path, and be late from a second of the process's clock on."""
        self._path, self._until, self._written = path, until, 0.0
        self._begin = time.perf_counter()
        self.content = content
        self.measured: dict[str, Any] = content.setdefault("measured", {})

    @property
    def left(self) -> float:
        """Return how many seconds are left."""
        return self._until - time.perf_counter()

    @property
    def due(self) -> bool:
        """Return whether the file is due."""
        return time.perf_counter() - self._written > _EVERY

    def note(self, name: str, found: dict[str, Any]) -> None:
        """Write what has been found of something."""
        self.measured[name] = found
        self._written = time.perf_counter()
        told = {k: v for k, v in found.items() if k in _TOLD}
        print(f"{self._written - self._begin:.1f} s, {name}: {told}", flush=True)
        if self._path is not None:
            write_json(self._path, self.content)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile, in ms."""
    p50, p99 = np.percentile(seconds or [0.0], [50, 99])
    return {"p50_ms": 1e3 * float(p50), "p99_ms": 1e3 * float(p99)}


class Run:
    """An engine at work on requests that are due at given seconds."""

    def __init__(self, engine: jaxkv.Engine, asked: list[Asked], at: np.ndarray):
        self._engine, self._asked, self._at = engine, asked, at
        self._handles: list[Any] = []
        self._first: dict[Any, float] = {}
        self._last: dict[Any, float] = {}
        self._between: list[float] = []
        self._waits: list[float] = []
        self._tokens = 0
        self._begin, self._before = time.perf_counter(), engine.counts
        self._edges: list[tuple[float, int, Any]] = []

    def go(self, record: Record, name: str) -> dict[str, Any]:
        """Serve all requests, or as many as there is time for."""
        engine, asked, at = self._engine, self._asked, self._at
        while len(self._handles) < len(asked) or not engine.idle:
            now = time.perf_counter() - self._begin
            while len(self._handles) < len(asked) and at[len(self._handles)] <= now:
                one = asked[len(self._handles)]
                self._handles.append(
                    engine.submit(one.prompt, max_new_tokens=one.new, stop_ids=[])
                )
            if engine.idle:
                time.sleep(max(at[len(self._handles)] - now, 0))
            self._step()
            if record.due:
                record.note(name, self.found(finished=False))
            if record.left < 0:
                found = self.found(finished=False)
                for handle in self._handles:
                    engine.cancel(handle)
                list(engine.run())
                return found
        return self.found(finished=True)

    def _step(self) -> None:
        engine = self._engine
        for event in engine.step():
            now = time.perf_counter()
            count = len(event.tokens)
            self._tokens += count
            if count and event.handle in self._last:
                # They come in blocks; each is charged its share of the wait.
                wait = now - self._last[event.handle]
                self._waits.append(wait)
                self._between += [wait / count] * count
            elif count:
                due = self._begin + self._at[event.handle.number - self._number]
                self._first[event.handle] = now - due
            if count:
                self._last[event.handle] = now
        # The steady part: from the first blocks until no request waits.
        begun, over = engine.counts.blocks > self._before.blocks, engine.waiting == 0
        if not self._at.any() and [begun, over and begun].count(True) > len(
            self._edges
        ):
            self._edges.append((time.perf_counter(), self._tokens, engine.counts))

    @property
    def _number(self) -> int:
        return self._handles[0].number

    def found(self, *, finished: bool) -> dict[str, Any]:
        """Return what has come of the requests so far."""
        ends = [h.result for h in self._handles if h.result is not None]
        failed = [r.error for r in ends if r.finish_reason == "error"]
        if failed:
            raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
        begin = self._begin, 0, self._before
        now = time.perf_counter(), self._tokens, self._engine.counts
        steady = None
        if len(self._edges) == 2:
            steady = self._part(*self._edges)
        return {
            "finished": finished,
            "ended": len(ends),
            **self._part(begin, now),
            "requests_per_s": len(ends) / (now[0] - self._begin),
            "steady": steady,
            "first_token": percentiles(list(self._first.values())),
            "between_tokens": percentiles(self._between),
            "between_blocks": percentiles(self._waits),
        }

    def _part(self, begin: Any, end: Any) -> dict[str, Any]:
        seconds, rows = end[0] - begin[0], self._engine.rows
        after = dataclasses.asdict(end[2])
        done = {k: v - getattr(begin[2], k) for k, v in after.items()}
        return {
            "seconds": seconds,
            "tokens_per_s": (end[1] - begin[1]) / seconds,
            "rows_in_use": done["rows"] / max(done["blocks"] * rows, 1),
            "row_steps_used": done["tokens"] / max(done["steps"] * rows, 1),
            "host_share": done["gap"] / seconds,
            "late_share": done["late"] / max(done["blocks"], 1),
            "counts": done,
        }
