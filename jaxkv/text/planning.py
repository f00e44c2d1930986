"""What decides the shapes of a generation: padded lengths, slots, and what rows keep.

A *budget* is what somebody asked for, a row of a batch at a time. A *bound* is what a
program is compiled for: no budget of the batch exceeds it, and it is rounded up, so
that similar budgets share the program.

Axis letters: `B` batch, `P` padded prompt, `O` output buffer.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxkv import state as kv
from jaxkv.options import Options
from jaxkv.policies import contract
from jaxkv.text.arguments import integer, integers, is_collection


def bucket(length: int) -> int:
    """Return the padded length: the next of 64, 96, 128, 192, 256, 384, ..."""
    size = 64
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The shapes of one call of `generate`, and what its rows keep.

    Attributes:
      options: what the program is compiled for; `options.budget` is `bound`.
      bound: at least every budget. It is a bucket or, if the decode policy evicts, the
        one budget of all rows. None keeps everything.
      keep: int32 `[B]`, the budgets, or None where the bound says it all.
      slots: of each layer's state.
      prompt: the padded length `P`.
      max_out: the size `O`.
      distinct: how many prompts are read. The others repeat them in turn, with budgets
        of their own.
    """

    options: Options
    bound: int | None
    keep: np.ndarray | None
    slots: tuple[int, ...]
    prompt: int
    max_out: int
    distinct: int

    def padded(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the prompts that are read, int32 `[distinct, P]`, right-padded."""
        tokens = np.zeros((self.distinct, self.prompt), np.int32)
        for row, prompt in zip(tokens, ids, strict=False):
            row[: len(prompt)] = prompt
        return tokens


def plan(
    ids: Sequence[Sequence[int]],
    options: Options,
    budgets: Sequence[int] | None,
    *,
    max_new_tokens: int,
    windows: Sequence[int | None],
) -> Plan:
    """Decide all shapes of a batch.

    Args:
      ids: the prompts.
      options: without a budget.
      budgets: from `row_budgets`.
      max_new_tokens: the longest output; 0 where there is none.
      windows: of each layer of the network; None is all tokens.
    """
    lengths = np.array([len(row) for row in ids], np.int32)
    prompt = bucket(int(lengths.max()))
    max_out = bucket(max_new_tokens) if max_new_tokens else 0
    if budgets is None or options.decode.evicts:
        bound, keep = None if budgets is None else budgets[0], None
        options = dataclasses.replace(options, budget=bound)
        slots = options.layer_slots(prompt, max_out, windows)
    else:
        bound, keep = bucket(max(budgets)), np.array(budgets, np.int32)
        options = dataclasses.replace(options, budget=bound)
        # Of these prompts a layer may keep less than of any at this bound.
        share = getattr(options.prefill, "head_share", 1.0)
        layers = windows.count(None)
        kept = contract.layer_keeps(options.prefill, keep, lengths, layers)
        sizes = (
            options.num_slots(prompt, max_out, kept=bucket(int(share * layer.max())))
            for layer in kept
        )
        most = prompt + max_out
        slots = kv.by_window(windows, sizes, lambda window: min(window, most))
    return Plan(
        options=options,
        bound=bound,
        keep=keep,
        slots=slots,
        prompt=prompt,
        max_out=max_out,
        distinct=_distinct(ids, options, keep),
    )


def _distinct(
    ids: Sequence[Sequence[int]], options: Options, keep: np.ndarray | None
) -> int:
    """Return after how many rows the prompts repeat, so that these need reading only.

    It is all rows where they do not repeat as a whole, or something is drafted from
    each.
    """
    rows = len(ids)
    if keep is None or options.speculate is not None:
        return rows
    for count in range(1, rows // 2 + 1):
        if rows % count == 0 and all(
            np.array_equal(ids[row], ids[row % count]) for row in range(count, rows)
        ):
            return count
    return rows


def row_budgets(
    budget: int | Sequence[int] | None,
    compression_ratio: float | None,
    ids: Sequence[Sequence[int]],
    *,
    evicts: bool,
) -> tuple[int, ...] | None:
    """Return the budget of each prompt, or None if everything is kept.

    Args:
      budget: see `generate`.
      compression_ratio: see `generate`.
      ids: the prompts.
      evicts: whether the decode policy does.

    Raises:
      ValueError: both are given, or one that does not fit the prompts or the policy.
    """
    if compression_ratio is not None:
        if budget is not None:
            raise ValueError("generate: pass budget= or compression_ratio=, not both.")
        return _budgets_of_ratio(compression_ratio, ids, evicts=evicts)
    if budget is None:
        return None
    if isinstance(budget, str) or not is_collection(budget):
        return (integer("budget", budget),) * len(ids)
    budgets = tuple(integers("budget", budget))
    if len(budgets) != len(ids):
        raise ValueError(
            f"generate: got {len(budgets)} budgets for {len(ids)} prompts; pass one or "
            f"{len(ids)}."
        )
    if evicts and len(set(budgets)) > 1:
        raise ValueError(
            "generate: the decode policy evicts and needs the same budget for all "
            f"rows, got {sorted(set(budgets))}; pass one number, or decode=Full()."
        )
    return budgets


def _budgets_of_ratio(
    compression_ratio: float, ids: Sequence[Sequence[int]], *, evicts: bool
) -> tuple[int, ...]:
    """Return what is left of each prompt after this fraction has gone."""
    if not isinstance(compression_ratio, int | float | np.number):
        raise ValueError(
            f"generate: compression_ratio must be a number, got {compression_ratio!r}."
        )
    if not 0 <= compression_ratio < 1:
        raise ValueError(
            "generate: compression_ratio is the fraction removed, in [0, 1); "
            f"got {compression_ratio}."
        )
    if evicts:
        raise ValueError(
            "generate: compression_ratio is a fraction of each prompt, but the decode "
            "policy evicts and needs one budget for prompt and output of all rows; "
            "pass budget= (tokens) instead."
        )
    return tuple(max(1, round(len(row) * (1 - compression_ratio))) for row in ids)
