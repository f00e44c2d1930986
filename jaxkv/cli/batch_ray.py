"""`jaxkv batch --ray`: the lines of a file, shared out over a cluster by Ray Data.

Each worker has an engine of its own, and takes a chunk of lines at a time, which it
reads from the file: that lies where all of them find it. A worker that dies is started
again, and its chunk with it; the journal takes each answer once.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxkv.cli.batch_job import Answerer, Job
from jaxkv.serving.lines import Chunk, Numbers, chunks, read_lines

_LINES = 32  # of a chunk, for each row of an engine: at its end rows run empty


class Worker:
    """An engine of the cluster."""

    def __init__(self, job: Job, source: str, ordered: bool):
        self._answerer, self._source = Answerer(job), Path(source)
        self._ordered = ordered

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        """Answer the lines of chunks that are left, one by one as they end."""
        for chunk, left in zip(batch["chunk"], batch["left"], strict=True):
            wanted = json.loads(left)
            lines = read_lines(self._source, Chunk(*json.loads(chunk)))
            if wanted is not None:
                lines = (line for line in lines if line.number in wanted)
            for number, answer in self._answerer.answers(lines, ordered=self._ordered):
                yield {"line": [number], "answer": [json.dumps(answer)]}


def answers(
    job: Job,
    source: Path,
    done: Numbers,
    *,
    address: str,
    workers: int | None,
    ordered: bool,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each line's number and what is written of it.

    Args:
      job: what is done with the lines.
      source: their file.
      done: numbers of those that have been answered.
      address: of `ray.init`.
      workers: how many; None is one a GPU, or one.
      ordered: whether to yield answers in the order of the lines.

    Raises:
      ValueError: ray is not installed.
      ConnectionError: there is no such cluster.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError('--ray needs ray; pip install "jaxkv[ray]".') from None
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = ordered
        gpus = int(ray.cluster_resources().get("GPU", 0))
        parts = list(_parts(source, job.rows * _LINES, done))
        number = min(workers or gpus or 1, len(parts))
        found = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
            Worker,
            fn_constructor_args=(job, str(source.resolve()), ordered),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=number),
            num_gpus=1 if gpus else 0,
        )
        for row in found.iter_rows():
            yield int(row["line"]), json.loads(row["answer"])
    finally:
        ray.shutdown()


def _parts(source: Path, size: int, done: Numbers) -> Iterator[dict[str, str]]:
    """Yield the chunks of a file that have something left, ready for Ray."""
    for chunk in chunks(source, size):
        lines = range(chunk.first, chunk.first + chunk.lines)
        left: list[int] | None = [number for number in lines if number not in done]
        if left:
            left = None if len(left) == len(lines) else left  # most have all of them
            yield {"chunk": json.dumps(chunk), "left": json.dumps(left)}
