"""Drafts without a draft model: what followed the same words before.

Each drafter is a frozen dataclass; its `draft` runs inside the compiled loop.
`matching` finds where the words occurred before, `merging` makes one tree of what
followed them.

Axis letters: `B` batch, `M` occurrences, `R` tokens copied from each.
"""

import dataclasses
from typing import Annotated, Literal, Protocol

import jax
import jax.numpy as jnp
from annotated_types import Ge, Le

from jaxkv import trees
from jaxkv.speculation import matching
from jaxkv.speculation.matching import Context
from jaxkv.speculation.merging import Sequences, merge
from jaxkv.trees import ALIGNED, SAMPLED, UNALIGNED, UNCHECKED, DraftTree

# Compiling takes longer with more of them, and merging with the square of matches times
# depth.
MOST_NODES = 1023
Nodes = Annotated[int, Ge(1), Le(MOST_NODES)]
Depth = Annotated[int, Ge(1), Le(64)]
Ngram = Annotated[int, Ge(1), Le(128)]
Matches = Annotated[int, Ge(1), Le(256)]
BreakEven = Annotated[float, Ge(0)] | Literal["auto"]


class Drafter(Protocol):
    """Makes a tree of drafted tokens from the text so far."""

    @property
    def num_draft_tokens(self) -> int:
        """Nodes of a tree, the root not counted."""

    @property
    def depth(self) -> int:
        """Depth of the deepest node."""

    @property
    def likeliest(self) -> bool:
        """Whether prefill must keep the likeliest tokens of each position."""

    @property
    def break_even(self) -> float | Literal["auto"]:
        """Drafted tokens per step that must be accepted for a step with a tree to pay.

        Where fewer are, on average, plain steps are taken. "auto" is what is measured:
        `jaxkv.generate` times a few steps of a program's first generation. By how wide
        a tree is, the number differs; so "auto" also chooses among a few widths. With
        the exact rule the output does not depend on it, but for rounding; with a lossy
        one it does, and a number is what makes it repeatable.
        """

    def check(self) -> None:
        """Raise ValueError for options that mean nothing."""

    def draft(self, context: Context) -> DraftTree:
        """Return trees of `1 + num_draft_tokens` nodes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLookup(Drafter):
    """Copy what followed the longest match: one chain, no tree.

    The matching rule is that of transformers' `prompt_lookup_num_tokens` and of vLLM's
    "ngram": the longest n-gram within the bounds that has occurred before, the earliest
    occurrence of it, in prompt and output.

    Attributes:
      num_draft_tokens: length of the chain.
      ngram_max: longest n-gram that is looked up.
      ngram_min: shortest one.
      match: which occurrence is copied.
      include_output: whether the output may be copied from as well.
      break_even: see `Drafter`; 0 takes every draft there is.
    """

    num_draft_tokens: Nodes = 10
    ngram_max: Ngram = 3
    ngram_min: Ngram = 1
    match: Literal["earliest", "latest"] = "earliest"
    include_output: bool = True
    break_even: BreakEven = "auto"
    likeliest = False

    @property
    def depth(self) -> int:
        """Depth of the deepest node: a chain's length."""
        return self.num_draft_tokens

    def check(self) -> None:
        """Need a chain and an n-gram."""
        _check(self)

    def draft(self, context: Context) -> DraftTree:
        """Return chains; see `Drafter.draft`."""
        if self.include_output:
            context = matching.with_output(context)
        ends = matching.longest_matches(
            context,
            longest=self.ngram_max,
            shortest=self.ngram_min,
            most=1,
            order=self.match,
        )
        tokens, there, _ = matching.continuations(
            context, ends, length=self.num_draft_tokens
        )
        before = jnp.arange(self.num_draft_tokens, dtype=jnp.int32)
        return trees.below_root(
            _newest(context),
            tokens=tokens[:, 0],
            parents=jnp.broadcast_to(before, tokens[:, 0].shape),
            depths=jnp.broadcast_to(before + 1, tokens[:, 0].shape),
            valid=there[:, 0],
            kinds=jnp.full(tokens[:, 0].shape, UNCHECKED, jnp.int32),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree(Drafter):
    """Merge what followed all longest matches into one tree, the most frequent first.

    Attributes:
      num_draft_tokens: nodes; 15 and the root make 16.
      depth: tokens copied from each occurrence.
      ngram_max: longest n-gram that is looked up.
      ngram_min: shortest one.
      max_matches: occurrences that are merged, the latest first.
      include_output: whether the output may be copied from as well.
      break_even: see `Drafter`; 0 takes every draft there is.
    """

    num_draft_tokens: Nodes = 15
    depth: Depth = 10
    ngram_max: Ngram = 16
    ngram_min: Ngram = 1
    max_matches: Matches = 32
    include_output: bool = True
    break_even: BreakEven = "auto"
    likeliest = False

    def check(self) -> None:
        """Need a tree and an n-gram."""
        _check(self)

    def draft(self, context: Context) -> DraftTree:
        """Return trees; see `Drafter.draft`."""
        context, sequences, _ = self.copied(context)
        return merge(_newest(context), sequences, nodes=self.num_draft_tokens)

    def copied(self, context: Context) -> tuple[Context, Sequences, jax.Array]:
        """Return the context with its pool, what may be copied, and the indices."""
        if self.include_output:
            context = matching.with_output(context)
        ends = matching.longest_matches(
            context,
            longest=self.ngram_max,
            shortest=self.ngram_min,
            most=self.max_matches,
            order="latest",
        )
        tokens, there, index = matching.continuations(context, ends, length=self.depth)
        kinds = jnp.full(tokens.shape, UNCHECKED, jnp.int32)
        copied = jnp.ones(ends.shape, bool)
        return context, Sequences(tokens, there, kinds, copied), index


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aligned(Tree):
    """Add the network's own candidates where it had not expected the prompt's token.

    Alignment sampling of Wang et al. (arXiv 2505.13204): during prefill the likeliest
    tokens of every position are kept; where the prompt's token is not the likeliest,
    up to `num_alternatives` of them join the tree beside it. Only the paper's abstract
    was available to us; what it leaves open is our choice: candidates are the likeliest
    tokens other than the prompt's, and they are taken from the latest occurrences.

    Attributes:
      num_alternatives: candidates beside each unexpected token, 1 or 2.
      tail: whether the rest of the copied text follows a candidate too.
      sources: occurrences that candidates are taken from, the latest first.
      num_main: copied tokens that come before all candidates; None is two thirds of
        the nodes.
    """

    num_alternatives: Annotated[int, Ge(1), Le(2)] = 2
    tail: bool = False
    sources: Annotated[int, Ge(1)] = 2
    num_main: Annotated[int, Ge(1)] | None = None
    likeliest = True

    def check(self) -> None:
        """Need what `Tree` needs, and parts no larger than the whole."""
        super().check()
        if self.sources > self.max_matches:
            raise ValueError(
                f"Aligned: sources must be in [1, max_matches={self.max_matches}], "
                f"got {self.sources}."
            )
        if self.num_main is not None and self.num_main > self.num_draft_tokens:
            raise ValueError(
                "Aligned: num_main must be in [1, num_draft_tokens="
                f"{self.num_draft_tokens}], got {self.num_main}."
            )

    def draft(self, context: Context) -> DraftTree:
        """Return trees; see `Drafter.draft`."""
        context, sequences, index = self.copied(context)
        expected = _expected(context, index)  # [B, M, R, 3]
        known = sequences.there & (index > 0) & (index < context.prompt[:, None, None])
        aligned = expected[..., 0] == sequences.tokens
        kinds = jnp.where(aligned, jnp.int32(ALIGNED), UNALIGNED)
        sequences = sequences._replace(kinds=jnp.where(known, kinds, UNCHECKED))
        more = self._varied(sequences, expected)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), sequences, more)
        main = self.num_main
        if main is None:
            main = self.num_draft_tokens - self.num_draft_tokens // 3
        return merge(_newest(context), both, nodes=self.num_draft_tokens, main=main)

    def _varied(self, copied, expected):
        """Return copies of the latest sequences with one unexpected token replaced."""
        few = jax.tree.map(lambda x: x[:, : self.sources], copied)
        expected = expected[:, : self.sources]
        second = jnp.where(
            expected[..., 1] == few.tokens, expected[..., 2], expected[..., 1]
        )
        candidates = jnp.stack([expected[..., 0], second], axis=-1)
        candidates = candidates[..., : self.num_alternatives]
        batch, sources, length, alternatives = candidates.shape
        # Axes: row, source, which token is replaced, by which candidate, token.
        replaced = jnp.arange(length, dtype=jnp.int32)[None, None, :, None, None]
        order = jnp.arange(length, dtype=jnp.int32)[None, None, None, None]
        here = order == replaced
        unexpected = (few.kinds == UNALIGNED) & few.there
        shape = (batch, sources, length, alternatives, length)

        def spread(x):
            return jnp.broadcast_to(x[:, :, None, None], shape)

        there = spread(few.there) & ((order <= replaced) | self.tail)
        varied = Sequences(
            jnp.where(here, candidates[..., None], spread(few.tokens)),
            there & unexpected[..., None, None],
            jnp.where(here, SAMPLED, spread(few.kinds)),
            jnp.zeros(shape[:-1], bool),
        )
        flat = (batch, sources * length * alternatives)
        tokens, there, kinds = (x.reshape(*flat, length) for x in varied[:3])
        return Sequences(tokens, there, kinds, varied.copied.reshape(flat))


def _expected(context, index):
    """Return the likeliest tokens at each index, int32 `[..., 3]`."""
    rows = jnp.arange(index.shape[0], dtype=jnp.int32)[:, None, None]
    last = context.likeliest.shape[1] - 1
    return context.likeliest[rows, jnp.clip(index, 0, last)]


def _newest(context):
    return jnp.take_along_axis(context.text, context.position[:, None], axis=1)[:, 0]


def _check(drafter):
    name = type(drafter).__name__
    if drafter.ngram_max < drafter.ngram_min:
        raise ValueError(
            f"{name}: ngram_max={drafter.ngram_max} is less than "
            f"ngram_min={drafter.ngram_min}."
        )
