"""What a decode step with a tree costs, and what its parts cost.

Trees are forced: they are always full and wrong, so that a step's price does not depend
on a text.
"""

import dataclasses
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.attention import Network
from jaxkv.bench import clock, decode_step, throughput
from jaxkv.bench.matcher import time_matcher
from jaxkv.options import Options
from jaxkv.runtime.meshes import everywhere, mesh_of
from jaxkv.speculation import loop as speculation
from jaxkv.speculation.drafters import Aligned, Drafter, PromptLookup, Tree
from jaxkv.speculation.matching import Context
from jaxkv.speculation.rules import Exact
from jaxkv.trees import DraftTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullTree:
    """A drafter whose trees are always full, and wrong: the price of a step.

    Attributes:
      num_draft_tokens: nodes, the root not counted.
      depth: of the deepest node.
    """

    num_draft_tokens: int
    depth: int = 10
    break_even = 0.0
    likeliest = False

    def check(self) -> None:
        """Accept what the command has checked."""

    def draft(self, context: Context) -> DraftTree:
        """Return chains of `depth` nodes, side by side below the root."""
        node = np.arange(1 + self.num_draft_tokens)
        depths = np.where(node == 0, 0, (node - 1) % self.depth + 1)
        parents = np.where(depths <= 1, 0, node - 1)
        shape = (context.position.shape[0], len(node))

        def rows(x):
            return jnp.broadcast_to(jnp.asarray(x, jnp.int32), shape)

        newest = jnp.take_along_axis(context.text, context.position[:, None], axis=1)
        return DraftTree(
            # Whatever the network says, a chance hit costs one step in thousands.
            tokens=jnp.where(node == 0, newest, rows(node % 7)),
            parents=rows(parents),
            depths=rows(depths),
            valid=jnp.ones(shape, bool),
            kinds=rows(0 * node),
        )


def full_tree(nodes: int) -> FullTree:
    """Return a drafter of trees with so many nodes, their root included."""
    return FullTree(num_draft_tokens=nodes - 1, depth=min(10, nodes - 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeWork:
    """What is timed of each batch size.

    Attributes:
      nodes: of the trees, roots included.
      context: tokens so far, the new ones included.
      prompt: tokens that are matched in.
      steps: of one timed call.
      repeats: timed calls.
    """

    nodes: tuple[int, ...]
    context: int
    prompt: int
    steps: int
    repeats: int


def time_batch(
    network: Network, params: Any, work: TreeWork, *, batch: int, options: Options
) -> dict[str, Any]:
    """Return the times of one batch size, ready for JSON.

    Args:
      network: static.
      params: its parameters.
      work: what is timed.
      batch: rows.
      options: of the plain step.
    """
    where: dict[str, Any] = dict(batch=batch, options=options)
    plain = time_steps(network, params, work, None, **where)
    found = []
    for nodes in work.nodes:
        step = time_steps(network, params, work, full_tree(nodes), **where)
        ratio = step / plain
        found.append(
            {"nodes": nodes, "step_ms": step, "ratio": ratio, "break_even": ratio - 1}
        )
    idle = time_steps(network, params, work, Tree(break_even=math.inf), **where)
    matchers = {}
    for drafter in (PromptLookup(), Tree(), Aligned()):
        ms = time_matcher(
            drafter, batch=batch, width=work.prompt + 64, repeats=work.repeats
        )
        name = type(drafter).__name__
        matchers[name] = {"draft_ms": ms, "share_of_plain_step": ms / plain}
    return {
        "batch": batch,
        "plain_step_ms": plain,
        "trees": found,
        # Of `Tree`, whose drafts are given up before they cost a step.
        "no_draft": {"step_ms": idle, "ratio": idle / plain},
        "matchers": matchers,
    }


def time_steps(
    network: Network,
    params: Any,
    work: TreeWork,
    drafter: Drafter | None,
    *,
    batch: int,
    options: Options,
) -> float:
    """Return the median milliseconds of a decode step of `generation.advance`.

    Args:
      network: static.
      params: its parameters.
      work: what is timed.
      drafter: static; None times plain steps.
      batch: rows.
      options: of the plain step.
    """
    context, steps = work.context, work.steps
    cache = decode_step.full_cache(
        network.config,
        batch=batch,
        slots=options.num_slots(context - steps, steps),
        dtype=params["embedding"].dtype,
        key=jax.random.key(1),
        mesh=mesh_of(params),
    )
    options = dataclasses.replace(options, speculate=drafter)

    def rewound(cache):
        state = decode_step.rewind(
            cache, steps=steps, context=context, policy=options.decode
        )
        if drafter is None:
            return state
        tokens = jnp.zeros((batch, context), jnp.int32)
        lengths = jnp.full(batch, context, jnp.int32)
        begun = speculation.begin(
            *(drafter, tokens, lengths, state.last), rule=Exact(), max_out=steps
        )
        # One buffer in two places cannot be donated.
        begun = jax.tree.map(lambda x: jnp.array(x, copy=True), begun)
        begun = everywhere(begun, mesh_of(params))
        return dataclasses.replace(state, speculation=begun)

    def steps_of(state):
        if drafter is None:
            return steps
        # Fewer, where a draft was right by chance.
        return int(state.speculation.counts.steps.max())

    state = jax.block_until_ready(rewound(cache))
    program, _ = decode_step.compile_steps(network, params, state, options=options)
    ends = jax.block_until_ready(decode_step.loop_ends(state))
    calls, _ = clock.timed(
        lambda state: program(params, state, *ends),
        state,
        work.repeats,
        prepare=lambda state: rewound(state.cache),
        units=steps_of,
    )
    return 1e3 * statistics.median(calls)


def time_prefill(
    network: Network, params: Any, *, prompt: int, repeats: int
) -> dict[str, Any]:
    """Return the times of a prefill, without and with the likeliest tokens kept.

    Args:
      network: static.
      params: its parameters.
      prompt: tokens of the one prompt.
      repeats: timed calls.
    """
    work = throughput.Work(prompt=prompt, new=64, repeats=repeats)
    found = {}
    for name, drafter in (("plain_ms", Tree()), ("likeliest_ms", Aligned())):
        seconds = throughput.time_prefill(
            network, params, rows=1, work=work, options=Options(speculate=drafter)
        )
        found[name] = 1e3 * seconds
    return found | {"ratio": found["likeliest_ms"] / found["plain_ms"]}
