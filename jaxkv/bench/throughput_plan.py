"""Which methods and batch sizes are timed, in which order, and the timing of them."""

import collections
import dataclasses
import gc
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxkv.attention import Network
from jaxkv.bench import clock, decode_step, throughput
from jaxkv.bench import throughput_report as report
from jaxkv.bench.throughput import Work
from jaxkv.models.config import Config
from jaxkv.options import Options
from jaxkv.runtime.meshes import mesh_of


def plan_cells(
    config: Config,
    params: Any,
    work: Work,
    options: Mapping[str, Options],
    wanted: Sequence[int] | None,
) -> list[tuple[str, int, str | None]]:
    """Return methods and batches in order, and why one does not fit.

    The largest come first, method by method in turn, so that a run which is cut short
    has them.

    Args:
      config: of the network.
      params: its parameters.
      work: what is generated.
      options: of each method.
      wanted: batch sizes; None, where the device tells its memory, for those of
        `throughput.automatic_batches`.
    """
    limit = clock.device_memory("bytes_limit")
    dtype = params["embedding"].dtype
    mesh = mesh_of(params)
    share = decode_step.shares_of(mesh)[1]
    weights = sum(map(_bytes_of_a_device, jax.tree.leaves(params)))
    columns = []
    for method, option in options.items():
        largest = None
        if limit is not None:
            room = share * (int(throughput.USABLE * limit) - weights)
            largest = throughput.largest_batch(config, work, option, dtype, room=room)
        batches = (
            throughput.automatic_batches(largest or 0) if wanted is None else wanted
        )
        column = []
        for batch in sorted(set(batches), reverse=True):
            why = None
            if largest is not None and not 0 < batch <= largest:
                why = f"by its shapes at most {largest} rows fit {limit} bytes"
            column.append((method, batch, why))
        columns.append(column)
    turns = itertools.zip_longest(*columns)
    return [cell for turn in turns for cell in turn if cell is not None]


def _bytes_of_a_device(leaf: jax.Array) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


class Timer:
    """Times one method and batch after another, on one set of weights."""

    def __init__(self, network: Network, params: Any, work: Work, bandwidth: float):
        """Take what all have in common; see `throughput.time_generation`."""
        self._network, self._params = network, params
        self._work, self._bandwidth = work, bandwidth
        self._prefill: dict[tuple[str, int], float] = {}

    def time(
        self, method: str, options: Options, batch: int, why: str | None
    ) -> dict[str, Any]:
        """Return a record, ready for JSON.

        Args:
          method: name of the options.
          options: static.
          batch: rows.
          why: a reason not to try; see `plan_cells`.
        """
        row = {"method": method, "batch": batch}
        if why is not None:
            return row | {"fits": False, "why": why}
        try:
            found = throughput.time_generation(
                self._network,
                self._params,
                batch=batch,
                work=self._work,
                options=options,
                bandwidth=self._bandwidth,
                prefill_seconds=self._prefill_seconds(method, options, batch),
            )
            return row | {"fits": True} | dataclasses.asdict(found)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return row | {"fits": False, "why": str(error).splitlines()[0][:200]}
        finally:
            gc.collect()  # a cache that is not freed leaves no room for the next

    def _prefill_seconds(self, method: str, options: Options, batch: int) -> float:
        rows = min(batch, self._work.prefill_rows)
        if (method, rows) not in self._prefill:
            self._prefill[method, rows] = throughput.time_prefill(
                self._network, self._params, rows=rows, work=self._work, options=options
            )
        return self._prefill[method, rows] * batch / rows


def run_cells(
    timer: Timer,
    cells: Sequence[tuple[str, int, str | None]],
    options: Mapping[str, Options],
    result: dict[str, Any],
    *,
    save: Callable[[dict[str, Any]], None],
    until: float | None,
    retry: bool,
) -> None:
    """Time one cell after another, and save what there is after each.

    Args:
      timer: that times them.
      cells: of `plan_cells`.
      options: of each method.
      result: gets records and what follows from them.
      save: is handed the result after each cell.
      until: `time.perf_counter()` from which on nothing is started.
      retry: try 15/16 of a batch for which memory did not suffice.
    """
    left = collections.deque(cells)
    while left:
        method, batch, why = left.popleft()
        if until is not None and time.perf_counter() > until:
            result["not_started"].append({"method": method, "batch": batch})
            continue
        row = timer.time(method, options[method], batch, why)
        if retry and why is None and not row["fits"] and batch > 8:
            left.appendleft((method, batch * 15 // 16, None))
        result["rows"].append(row)
        result["ratios"] = report.ratios(result["rows"])
        save(result)  # a crash must not lose what was timed before it
