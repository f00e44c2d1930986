"""What is asked of policies, compared with what they give.

Anybody may write one. Each is called through this module, which looks at shapes and
dtypes while a program is traced: what a compiled program runs is the same. A mistake is
named by class and method, with what was wanted and what came.

Axis letters: `B` batch, `K` heads of the state, `N` query heads, `S` slots, `H` head
size, `T` nodes of a tree, `D` its depth.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import state as kv
from jaxkv.kernels.weighing import PLAIN, Weighing
from jaxkv.policies.base import (
    DecodePolicy,
    PrefillPolicy,
    Prompt,
    Sketch,
    Speculable,
    WholePrompt,
)
from jaxkv.policies.fitting import Misfit, fit
from jaxkv.state import KVState
from jaxkv.trees import DraftTree, Pending

_FIELDS = dict(keys="B K S H", values="B K S H", positions="B K S", target="B K")


def missing(value: Any, protocol: type) -> list[str]:
    """Return the methods and attributes of a protocol that a value lacks."""
    declared = {n: x for n, x in vars(protocol).items() if not n.startswith("_")}
    lacks = [
        name
        for name, stub in declared.items()
        if not _has(value, name) or getattr(type(value), name, None) is stub
    ]
    if isinstance(value, WholePrompt) and not value.chooses:
        lacks += ["compress"] * (type(value).compress is WholePrompt.compress)
    return lacks


def _has(value: Any, name: str) -> bool:
    """Return whether there is such an attribute, whatever becomes of asking for it."""
    try:
        return hasattr(value, name)
    except Exception:  # a property of options that `check_types` has not seen yet
        return True


def compress(
    policy: PrefillPolicy, prompt: Prompt, state: KVState, *, budget: int
) -> KVState:
    """Call `PrefillPolicy.compress`."""
    with called(policy, "compress"):
        filled = policy.compress(prompt, state, budget=budget)
        _fit_state(filled, state)
    if type(policy).__module__.partition(".")[0] == "jaxkv":
        return filled  # laws hold ours
    return _mark_excess(policy, prompt, _without_question(prompt, filled))


def _without_question(prompt: Prompt, state: KVState) -> KVState:
    """Return a state without the tokens that are not to be kept."""
    if prompt.held is None:
        return state
    held = state.positions < prompt.held[:, None, None]
    positions = jnp.where(held, state.positions, kv.FREE)
    return kv.pack(dataclasses.replace(state, positions=positions))


def _mark_excess(policy: PrefillPolicy, prompt: Prompt, state: KVState) -> KVState:
    """Spoil the first number of a head's first value where it holds too many tokens.

    `jaxkv.soundness` reads it: where scores were NaN, all of the value is.
    """
    most = jnp.floor(
        prompt.keep.astype(jnp.float32) * getattr(policy, "head_share", 1.0)
    )
    excess = kv.occupancy(state).astype(jnp.float32) > most[:, None]
    first = state.values[:, :, 0, 0]
    marked = jnp.where(excess, jnp.nan, first)
    return dataclasses.replace(state, values=state.values.at[:, :, 0, 0].set(marked))


def pseudo_tokens(
    policy: PrefillPolicy,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    vocab_size: int,
    sketch: Sketch,
) -> jax.Array:
    """Call `PrefillPolicy.pseudo_tokens`."""
    with called(policy, "pseudo_tokens"):
        pseudo = policy.pseudo_tokens(
            tokens, lengths, vocab_size=vocab_size, sketch=sketch
        )
        repeated = tokens.shape[1] if getattr(policy, "repeats", False) else 0
        shape = (tokens.shape[0], policy.num_pseudo + repeated)
        fit("the result", pseudo, "B num_pseudo", shape, jnp.int32)
    return pseudo


def layer_keeps(
    policy: PrefillPolicy,
    keep: jax.Array | np.ndarray,
    lengths: jax.Array | np.ndarray,
    num_layers: int,
) -> tuple[jax.Array, ...]:
    """Call `PrefillPolicy.layer_keeps`."""
    with called(policy, "layer_keeps"):
        keeps = policy.layer_keeps(keep, lengths, num_layers)
        _fit_number(keeps, num_layers)
        for layer, kept in enumerate(keeps):
            fit(f"entry {layer}", kept, "B", lengths.shape, jnp.int32)
    return keeps


def layer_budgets(
    policy: PrefillPolicy, budget: int, num_layers: int
) -> tuple[int, ...]:
    """Call `PrefillPolicy.layer_budgets`."""
    with called(policy, "layer_budgets"):
        budgets = policy.layer_budgets(budget, num_layers)
        _fit_number(budgets, num_layers)
    return budgets


class Place(NamedTuple):
    """Where a state is, for policies that have a `begin_at`.

    Attributes:
      layer: of the network, static.
      layers: how many it has, static.
      heads: query heads, static.
      frequencies: float32 `[H / 2]`, of the rotation.
    """

    layer: int
    layers: int
    heads: int
    frequencies: jax.Array


def begin(
    policy: DecodePolicy, state: KVState, lengths: jax.Array, place: Place | None = None
) -> KVState:
    """Call `DecodePolicy.begin`, or a method `begin_at` that is told the layer."""
    begin_at = None if place is None else getattr(policy, "begin_at", None)
    with called(policy, "begin" if begin_at is None else "begin_at"):
        if begin_at is None:
            begun = policy.begin(state, lengths)
        else:
            begun = begin_at(state, lengths, place)
        _fit_state(begun, state)
    return begun


def attend(
    policy: DecodePolicy,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    state: KVState,
    position: jax.Array,
    weighing: Weighing = PLAIN,
    **how: Any,
) -> tuple[jax.Array, KVState]:
    """Call `DecodePolicy.attend`."""
    how |= _softmax(policy.attend, weighing)
    with called(policy, "attend"):
        result = policy.attend(query, key, value, state, position, **how)
        out, after = _pair(result, "the output and the new state")
        fit("the output", out, "B N H", query.shape, query.dtype)
        _fit_state(after, state)
        _fit_memory(after.memory, state.memory)
    return out, after


def attend_tree(
    policy: Speculable,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    state: KVState,
    position: jax.Array,
    drafts: DraftTree,
    ancestors: jax.Array,
    *,
    depth: int,
    weighing: Weighing = PLAIN,
    **how: Any,
) -> tuple[jax.Array, Pending]:
    """Call `Speculable.attend_tree`."""
    how |= _softmax(policy.attend_tree, weighing)
    with called(policy, "attend_tree"):
        result = policy.attend_tree(
            *(query, key, value, state, position, drafts, ancestors),
            depth=depth,
            **how,
        )
        out, pending = _pair(result, "the output and what is pending")
        fit("the output", out, "B T N H", query.shape, query.dtype)
        fit_type(pending, Pending)
        heads = state.target.shape
        shape = (*heads, depth + 2 if pending.targets is None else 1)
        fit("slots", pending.slots, "B K D+2", shape, jnp.int32)
        if pending.targets is not None:
            shape = (*heads, query.shape[1])
            fit("targets", pending.targets, "B K T", shape, jnp.int32)
    return out, pending


def _softmax(method: Any, weighing: Weighing) -> dict[str, Weighing]:
    """Return what a method of a policy is told of a softmax that is not usual.

    Raises:
      ValueError: it takes nothing of the kind, and would attend wrongly.
    """
    if not weighing.softmax:
        return {}
    parameters = inspect.signature(method).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    if "weighing" not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise ValueError(
            f"{method.__qualname__} takes no weighing=, but this network has "
            f"{' and '.join(weighing.softmax)} in its attention; take it, and hand "
            "**weighing.softmax to the operations that attend."
        )
    return {"weighing": weighing}


@contextlib.contextmanager
def called(who: Any, method: str) -> Iterator[None]:
    """Name the method in what is said of arrays that do not fit, in it or after it."""
    try:
        yield
    except Misfit as misfit:
        name = f"{type(who).__name__}.{method}"
        raise ValueError(f"{name}: {misfit}") from misfit


def _pair(result: Any, what: str) -> tuple[Any, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise Misfit(f"must return a tuple of {what}, got {_came(result)}.")
    return result


def fit_type(value: Any, wanted: type) -> None:
    """Raise Misfit unless a value is of this type."""
    if not isinstance(value, wanted):
        raise Misfit(f"must return a {wanted.__name__}, got {_came(value)}.")


def _fit_number(values: Any, num_layers: int) -> None:
    if not isinstance(values, tuple) or len(values) != num_layers:
        came = f"{len(values)}" if isinstance(values, tuple) else _came(values)
        raise Misfit(f"must return a tuple of {num_layers}, one a layer; got {came}.")


def _fit_state(state: Any, like: KVState) -> None:
    fit_type(state, KVState)
    for name, axes in _FIELDS.items():
        wanted = getattr(like, name)
        fit(name, getattr(state, name), axes, wanted.shape, wanted.dtype)


def _fit_memory(memory: Any, like: Any) -> None:
    """Raise where memory is not what `begin` made: a loop's carry never changes."""
    arrays, structure = jax.tree.flatten(memory)
    begun, wanted_structure = jax.tree.flatten(like)
    if str(structure) != str(wanted_structure):
        raise Misfit(
            "memory must keep the structure that begin gave it, "
            f"{wanted_structure}, got {structure}."
        )
    for array, wanted in zip(arrays, begun, strict=True):
        fit("memory", array, "as begin made it", wanted.shape, wanted.dtype)


def _came(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
