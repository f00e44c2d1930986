"""What a run's drafts came to, as numbers to print."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxkv.speculation.loop import Counts
from jaxkv.trees import KINDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftStats:
    """Drafts of a batch, all rows together.

    Attributes:
      steps: decode steps of the rows, with a draft or without.
      steps_with_draft: those with one.
      drafted: tokens drafted.
      accepted: drafted tokens that became output.
      mal_with_bonus: mean acceptance length, the token that every step gives anyway
        included: output tokens per decode step.
      mal_without_bonus: accepted tokens per decode step.
      accepted_per_draft: accepted tokens per step with a draft.
      drafted_by_depth: tokens drafted, the first entry being depth 1.
      accepted_by_depth: those that became output.
      drafted_by_kind: tokens drafted, by `trees.KINDS`.
      accepted_by_kind: those that became output.
      unexpected: share of the prompts' tokens that the network had not held likeliest;
        None if nobody asked.
    """

    steps: int
    steps_with_draft: int
    drafted: int
    accepted: int
    mal_with_bonus: float
    mal_without_bonus: float
    accepted_per_draft: float
    drafted_by_depth: tuple[int, ...]
    accepted_by_depth: tuple[int, ...]
    drafted_by_kind: dict[str, int]
    accepted_by_kind: dict[str, int]
    unexpected: float | None


def draft_stats(
    counts: Counts, lengths: Sequence[int], prompts: Sequence[int]
) -> DraftStats:
    """Sum up what the loop has counted.

    Args:
      counts: from a finished generation.
      lengths: tokens of the outputs.
      prompts: tokens of the prompts.
    """
    c = {
        f.name: np.asarray(getattr(counts, f.name)) for f in dataclasses.fields(counts)
    }
    steps, with_draft = int(c["steps"].sum()), int(c["tree_steps"].sum())
    drafted, accepted = int(c["drafted"].sum()), int(c["accepted"].sum())
    decoded = sum(lengths) - len(lengths)  # the first token came with the prompt
    asked = sum(prompts) - len(prompts)
    known = (c["unexpected"] >= 0).all() and asked > 0
    return DraftStats(
        steps=steps,
        steps_with_draft=with_draft,
        drafted=drafted,
        accepted=accepted,
        mal_with_bonus=decoded / max(steps, 1),
        mal_without_bonus=accepted / max(steps, 1),
        accepted_per_draft=accepted / max(with_draft, 1),
        drafted_by_depth=tuple(c["drafted"].sum(0).tolist()),
        accepted_by_depth=tuple(c["accepted"].sum(0).tolist()),
        drafted_by_kind=_by_kind(c["drafted_kinds"]),
        accepted_by_kind=_by_kind(c["accepted_kinds"]),
        unexpected=float(c["unexpected"].sum() / asked) if known else None,
    )


def together(stats: Sequence[DraftStats]) -> str:
    """Return what one line says of several batches."""
    steps = max(sum(s.steps for s in stats), 1)
    drafted, accepted = sum(s.drafted for s in stats), sum(s.accepted for s in stats)
    tokens = sum(s.mal_with_bonus * s.steps for s in stats)
    return (
        f"{accepted} of {drafted} drafted tokens accepted, {tokens / steps:.2f} tokens "
        f"per step (MAL with the bonus token; {accepted / steps:.2f} without)"
    )


def _by_kind(counts):
    return dict(zip(KINDS, counts.sum(0).tolist(), strict=True))
