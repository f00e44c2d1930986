"""What a GPU's host waits for while it hands over a program.

XLA:GPU asks the device before each turn of a loop whose number of turns is not in the
program, and at each branch: the call returns when the last answer is there. Everything
else is queued, and the call returns at once.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

S = TypeVar("S")

_ASK = ("while", "cond")
_KERNELS = ("pallas_call",)  # run on the device as a whole


def asks_the_device(function: Callable[..., Any], *args: Any) -> bool:
    """Return whether a traced function has branches, or loops of unknown length.

    Args:
      function: of arrays alone.
      *args: its arguments, or `jax.ShapeDtypeStruct`s.
    """
    return any(name in _ASK for name in _primitives(jax.make_jaxpr(function)(*args)))


def loop(
    goes_on: Callable[[S], jax.Array],
    turn: Callable[[S], S],
    state: S,
    *,
    turns: jax.Array | int | None,
) -> S:
    """Loop as `jax.lax.while_loop` does, or where `turns` is an `int` as often as that.

    The latter's length is in the program, so that a GPU's host does not wait for it.
    """
    if isinstance(turns, int):
        return jax.lax.fori_loop(0, turns, lambda _, state: turn(state), state)
    return jax.lax.while_loop(goes_on, turn, state)


def _primitives(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[str]:
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    for equation in inner.eqns:
        yield equation.primitive.name
        if equation.primitive.name in _KERNELS:
            continue
        for leaf in jax.tree.leaves(equation.params):
            if isinstance(leaf, Jaxpr | ClosedJaxpr):
                yield from _primitives(leaf)
