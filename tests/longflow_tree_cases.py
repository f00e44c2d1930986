"""Trees under LongFlow that every kernel has to get right, and what is wrong if not.

A backend joins by running `faults` on those of `FAST` and `SLOW` that it takes.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.kernels import longflow_tree
from jaxkv.kernels.cache import Nodes, Slots
from jaxkv.kernels.scores import value_norms


class Case(NamedTuple):
    """A tree, a cache and options; and how GPU kernels are cut, for those alone.

    `listed` says how much their lists leave to chance.
    """

    nodes: int
    heads: int
    kv_heads: int
    slots: int
    head_dim: int
    dtype: str = "float32"
    score: str = "l1"
    shared: bool = True
    n_recent: int = 0
    splits: int = 2
    apart: bool = True
    listed: int = 8
    sink: bool = False
    cap: float | None = None


FAST = [
    # So few slots that paths overwrite all of them, and their own.
    Case(4, 2, 1, 3, 32, splits=1, apart=False, listed=2, sink=True, cap=2.0),
    Case(3, 2, 2, 37, 32, "bfloat16", "l2", shared=False, n_recent=1),
]
SLOW = [
    Case(
        *(nodes, kv_heads * group, kv_heads, slots, head_dim, dtype, score, shared),
        **dict(n_recent=recent, splits=splits, listed=listed, sink=sink, cap=cap),
    )
    for (kv_heads, group), slots, (head_dim, dtype, score), shared, rest in (
        itertools.product(
            [(2, 4)],
            [5, 130],
            [
                (64, "float32", "l1"),
                (96, "float16", "l2"),
                (128, "bfloat16", "l1"),
            ],
            [True, False],
            [(7, 0, 1, 4, False, None), (9, 2, 3, 8, True, 3.0)],
        )
    )
    for nodes, recent, splits, listed, sink, cap in [rest]
]
SLOW += [
    Case(5, 4, 2, 37, 32),
    # Lists of one, which say next to nothing.
    Case(4, 3, 1, 45, 48, score="attention", listed=1),
]
# As in test_decode_triton.
TOLERANCE = {"float32": 5e-6, "bfloat16": 2**-6, "float16": 2**-10}
DEPTH = 6  # of the deepest node, at most


def make_tree(rng, batch, nodes, depth):
    """Return parents and depths of one tree per row."""
    parents, depths = np.zeros((2, batch, nodes), np.int32)
    for row, node in itertools.product(range(batch), range(1, nodes)):
        above = np.flatnonzero(depths[row, :node] < depth)
        parent = above[-1] if rng.random() < 0.7 else rng.choice(above)
        parents[row, node], depths[row, node] = parent, depths[row, parent] + 1
    return parents, depths


def make_case(case, seed):
    """Return the arguments of the op by name; free slots hold NaN.

    The first row is full and protects some slots, the second has free ones or is empty,
    the third is finished.
    """
    rng = np.random.default_rng(seed)
    batch, kv_heads, slots = 3, case.kv_heads, case.slots

    def normal(*sizes):
        return rng.standard_normal((batch, *sizes, case.head_dim), dtype=np.float32)

    parents, depths = make_tree(rng, batch, case.nodes, DEPTH)
    free = rng.random((batch, 1 if case.shared else kv_heads, slots)) < 0.3
    free[0] = False
    free[1] |= seed % 4 == 3
    order = rng.permuted(np.broadcast_to(np.arange(slots), free.shape), axis=-1)
    held = np.broadcast_to(np.where(free, -1, order), (batch, kv_heads, slots))
    nan = np.where(held < 0, np.nan, 0)[..., None].astype(np.float32)
    values = normal(kv_heads, slots) + nan
    values *= np.exp(rng.standard_normal((*held.shape, 1)).astype(np.float32))
    target = rng.integers(0, slots, (batch, kv_heads))
    target[2] = rng.choice([-1, slots, 2**31 - 1])
    key, value = normal(case.nodes, kv_heads), normal(case.nodes, kv_heads)
    cache = normal(kv_heads, slots) + nan, values
    query, key, value, keys, values = (
        jnp.asarray(x, case.dtype)
        for x in (normal(case.nodes, case.heads), key, value, *cache)
    )
    position, oldest = [slots, slots, -1], [slots // 3, 0, 0]
    integers = held, target, position, oldest, parents, depths
    held, target, position, *rest = (jnp.asarray(x, jnp.int32) for x in integers)
    norms = value_norms(values, case.score)
    sink = jnp.linspace(-1, 3, case.heads).astype(case.dtype) if case.sink else None
    return dict(
        query=query,
        nodes=Nodes(key, value, position),
        slots=Slots(keys, values, held, target, norms),
        **dict(zip(("oldest", "parents", "depths"), rest, strict=True)),
        sink=sink,
    )


reference = jax.jit(
    longflow_tree._reference,
    static_argnames=("n_recent", "depth", "scale", "cap", "score", "shared", "axis"),
)


def options_of(case, depth=DEPTH):
    """Return the static options of the operation."""
    return dict(
        n_recent=case.n_recent,
        depth=depth,
        scale=2 * case.head_dim**-0.5,
        cap=case.cap,
        score=case.score,
        shared=case.shared,
    )


def faults(case, arrays, got) -> list[str]:
    """Return what is wrong with a kernel's output, slots and targets."""
    want = reference(**arrays, **options_of(case), axis=None)
    found = []
    alive = np.asarray(arrays["nodes"].position) >= 0
    for name, mine, theirs in zip(want._fields[1:], got[1:], want[1:], strict=True):
        differ = (np.asarray(mine) != np.asarray(theirs))[alive].sum()
        if differ:
            found.append(f"{case}: {differ} of {name} differ")
    out, wanted = (np.asarray(x[0].astype(jnp.float32)) for x in (got, want))
    error = np.abs(out - wanted)[alive].max() / max(1, np.abs(wanted[alive]).max())
    if not (error <= TOLERANCE[case.dtype] and np.isfinite(out).all()):
        found.append(f"{case}: out is off by {error:.3g}")
    return found


MUTATIONS = {
    "values": lambda x: x | dict(slots=roll(x["slots"], "values")),
    "norms": lambda x: x | dict(slots=roll(x["slots"], "norms")),
    "parents": lambda x: x | dict(parents=0 * x["parents"]),
    "oldest": lambda x: x | dict(oldest=x["oldest"] + 9),
    "values of nodes": lambda x: (
        x | dict(nodes=x["nodes"]._replace(value=jnp.roll(x["nodes"].value, 1, 1)))
    ),
}


def roll(slots, name):
    return slots._replace(**{name: jnp.roll(getattr(slots, name), 1, 2)})
