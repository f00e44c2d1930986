"""Annotations that are checked: what passes, what does not, and in which words."""

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float, Int32

from jaxkv.kernels.cache import Token
from jaxkv.kernels.shapes import checked

Queries, Row = Float[Array, "B N H"], Int32[Array, " B"]
Path, Places = Int32[Array, "B L"], Int32[Array, "B L+1"]


@checked
def operation(
    query: Queries,
    token: Token,
    path: Path,
    places: Places,
    *,
    count: Row | None = None,
    scale: float = 1.0,
) -> Queries:
    return scale * query


def arguments(**changes):
    key = jnp.ones((3, 2, 4))
    return (
        dict(
            query=jnp.ones((3, 6, 4), jnp.bfloat16),
            token=Token(key, key, jnp.zeros(3, jnp.int32)),
            path=jnp.zeros((3, 5), jnp.int32),
            places=jnp.zeros((3, 6), jnp.int32),
        )
        | changes
    )


def test_what_fits_passes_and_comes_back():
    assert operation(**arguments()).dtype == jnp.bfloat16
    assert operation(**arguments(count=jnp.zeros(3, jnp.int32), scale=2.0)).all()
    # Inside of a vmap, sizes are those of one member.
    one = jax.vmap(lambda q: operation(**arguments(query=q)))
    assert one(jnp.ones((7, 3, 6, 4))).shape == (7, 3, 6, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(query=jnp.ones((3, 6))),
            r"query must be Float\[B N H\], got float32\[3 6\]",
        ),
        (
            dict(query=jnp.ones((3, 6, 4), jnp.int32)),
            r"query must be Float\[B N H\], got int32\[3 6 4\]",
        ),
        (
            dict(token=Token(*[jnp.ones((3, 2, 5))] * 2, jnp.zeros(3, jnp.int32))),
            r"token\.key must be Float\[B K H\] with B=3, H=4, got float32\[3 2 5\]",
        ),
        (
            dict(token=Token(jnp.ones((3, 2, 4)), None, jnp.zeros(3, jnp.int32))),
            r"token\.value must be Float\[B K H\] with B=3, K=2, H=4, got NoneType",
        ),
        (dict(token=(1, 2, 3)), "token must be Token, got tuple"),
        (
            dict(places=jnp.zeros((3, 5), jnp.int32)),
            r"places must be Int32\[B L\+1\] with B=3, L=5, got int32\[3 5\]",
        ),
        (
            dict(count=jnp.zeros(2, jnp.int32)),
            r"count must be Int32\[B\] with B=3, got int32\[2\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError, match=f"^operation: {message}\\.$"):
        operation(**arguments(**changes))


def test_a_compiled_call_checks_nothing_again(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "jaxkv.kernels.shapes.is_bearable", lambda *_: seen.append(1) or True
    )
    run = jax.jit(lambda query: operation(**arguments(query=query)))
    run(jnp.ones((3, 6, 4)))
    checks = len(seen)
    run(jnp.zeros((3, 6, 4)))
    assert checks == len(seen) == 6
