"""What becomes of the drafts: counted inside the loop, summed up behind it.

Axis letters: `B` batch, `T` nodes of a tree, `D` its depth.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.shown import brief
from jaxkv.speculation.guarantee import Guarantee
from jaxkv.trees import KINDS, DraftTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What happened to the drafts of each row, int32.

    Attributes:
      steps: `[B]`, decode steps, with a draft or without.
      tree_steps: `[B]`, steps with a draft.
      drafted: `[B, D]`, drafted tokens by depth, the first column being depth 1.
      accepted: `[B, D]`, those that became output.
      drafted_kinds: `[B, 4]`, by kind, see `trees.KINDS`.
      accepted_kinds: `[B, 4]`.
      unexpected: `[B]`, tokens of the prompt, the first left out, that the network had
        not held likeliest; -1 if nobody asked.
    """

    steps: jax.Array
    tree_steps: jax.Array
    drafted: jax.Array
    accepted: jax.Array
    drafted_kinds: jax.Array
    accepted_kinds: jax.Array
    unexpected: jax.Array


def none_yet(unexpected: jax.Array, *, depth: int) -> Counts:
    """Return the counts before the first step.

    Args:
      unexpected: int32 `[B]`, see `Counts`.
      depth: `D`.
    """
    row = jnp.zeros_like(unexpected)
    by_depth = jnp.zeros((*row.shape, depth), jnp.int32)
    by_kind = jnp.zeros((*row.shape, len(KINDS)), jnp.int32)
    return Counts(
        steps=row,
        tree_steps=row,
        drafted=by_depth,
        accepted=by_depth,
        drafted_kinds=by_kind,
        accepted_kinds=by_kind,
        unexpected=unexpected,
    )


def count_plain(counts: Counts, steps: jax.Array) -> Counts:
    """Count steps without drafts, int32 `[B]` of them."""
    return dataclasses.replace(counts, steps=counts.steps + steps)


def count_tree(
    counts: Counts,
    tree: DraftTree,
    path: jax.Array,
    accepted: jax.Array,
    *,
    running: jax.Array,
    brings: jax.Array,
) -> Counts:
    """Count a step with trees.

    Args:
      counts: so far.
      tree: the drafts.
      path: int32 `[B, D + 1]`, the nodes that passed, from the root on; shorter if the
        tree is narrow.
      accepted: int32 `[B]`, how many of them became output, the root not counted.
      running: bool `[B]`, rows that took the step.
      brings: bool `[B]`, those of them that brought a draft.
    """
    deepest = counts.drafted.shape[1]
    path = jnp.pad(path, ((0, 0), (0, 1 + deepest - path.shape[1])))
    depth = jnp.arange(1, 1 + deepest, dtype=jnp.int32)
    nodes = tree.valid & (tree.depths > 0) & brings[:, None]
    on_path = brings[:, None] & (depth[None] <= accepted[:, None])  # [B, D]
    path_kinds = jnp.take_along_axis(tree.kinds, path[:, 1:], axis=1)

    def total(mask, of, values):
        """Count where `mask` is true, apart for each value that `of` may have."""
        found = mask[..., None] & (of[..., None] == values[None, None])
        return found.sum(1, dtype=jnp.int32)

    kinds = jnp.arange(len(KINDS), dtype=jnp.int32)
    return dataclasses.replace(
        counts,
        steps=counts.steps + running.astype(jnp.int32),
        tree_steps=counts.tree_steps + brings.astype(jnp.int32),
        drafted=counts.drafted + total(nodes, tree.depths, depth),
        accepted=counts.accepted + on_path.astype(jnp.int32),
        drafted_kinds=counts.drafted_kinds + total(nodes, tree.kinds, kinds),
        accepted_kinds=counts.accepted_kinds + total(on_path, path_kinds, kinds),
    )


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
      guarantee: what the output has in common with plain decoding's; see
        `guarantee.guarantee`.
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
    guarantee: Guarantee

    __repr__ = brief


def draft_stats(
    counts: Counts,
    lengths: Sequence[int],
    prompts: Sequence[int],
    *,
    guarantee: Guarantee,
) -> DraftStats:
    """Sum up what the loop has counted.

    Args:
      counts: from a finished generation.
      lengths: tokens of the outputs.
      prompts: tokens of the prompts.
      guarantee: of the setting.
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
        guarantee=guarantee,
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
