"""Rows that fill a batch up, where several devices share its rows out.

Each device then has as many rows as any other. What fills up repeats the last prompt,
so that it takes no step more, and nobody sees it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxkv.language_model import LanguageModel
from jaxkv.runtime.meshes import mesh_of
from jaxkv.text.arguments import is_collection

Listener = Callable[[list[list[int]]], None]

_PER_ROW = "decoded", "tokens", "lengths", "finish_reason", "logprobs", "top_logprobs"


def missing(lm: LanguageModel, rows: int) -> int:
    """Return how many rows a batch lacks for the devices that share rows out."""
    mesh = mesh_of(lm.params)
    return 0 if mesh is None else -rows % mesh.shape["data"]


def filled_up(values: Any, more: int) -> Any:
    """Return a list of one value per row with its last repeated; others as they are."""
    if isinstance(values, str) or not is_collection(values):
        return values
    return [*values, *[values[-1]] * more]


def listener(on_tokens: Listener | None, rows: int) -> Listener | None:
    """Return what tells `on_tokens` of the first rows alone."""
    if on_tokens is None:
        return None
    return lambda new: on_tokens(new[:rows])


def first(completion: Any, rows: int) -> Any:
    """Return what was generated for the first rows of a batch.

    Args:
      completion: of all rows, a `Completion`.
      rows: of the caller. What they cost is said of the whole batch, but for tokens
        per second.
    """
    stats, lengths = completion.stats, completion.lengths
    new, all_new = (sum(some) - len(some) for some in (lengths[:rows], lengths))
    stats = dataclasses.replace(
        stats,
        prompt_tokens=stats.prompt_tokens[:rows],
        tokens_per_second=stats.tokens_per_second * new / max(1, all_new),
    )
    each = {name: getattr(completion, name) for name in _PER_ROW}
    cut = {name: value and value[:rows] for name, value in each.items()}
    return dataclasses.replace(completion, stats=stats, **cut)
