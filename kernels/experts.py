"""The feed-forward of a mixture of experts, of which each token uses a few.

A long prompt's tokens are sorted by expert, and those of one expert multiplied at a
time. A decode step waits for weights to be read, so with few tokens only the experts
that they chose are read, on a GPU by a kernel that reads each once, and where that
would be most of them anyway, all experts are. No expert has a capacity: nothing that
one token does changes another's result.

Under a mesh every device has whole experts, computes what they add to the tokens, and
the devices of a row add that up.

Axis letters: `B` batch, `T` tokens, `A` experts of a token, `E` experts, `D` hidden,
`I` inner columns, `G` gate beside up, which is `2 I`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from jaxkv.kernels import dispatch
from jaxkv.kernels.experts_triton import MOST_TOKENS, experts_triton, unsupported
from jaxkv.kernels.per_shard import add_up, along, current_mesh, first_of_shard
from jaxkv.kernels.shapes import checked

Implementation = Literal["gather", "dense", "sorted", "blocks", "ragged", "triton"]

_DENSE_TOKENS = 8  # of a prompt, for each expert; beyond that they are sorted
_LEAST_BLOCK, _MOST_BLOCK = 16, 256  # sorted tokens that are multiplied at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """The gated activation `g * sigmoid(alpha * g) * (u + shift)`; silu as it stands.

    Attributes:
      alpha: how steep the sigmoid is.
      limit: `g` is at most this, and `u` between this and its negative; None: neither.
      shift: added to `u`.
    """

    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0

    def __call__(self, gate_up: jax.Array) -> jax.Array:
        """Return `[..., I]` of `[..., G]`, in float32."""
        gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
        if self.limit is not None:
            gate = jnp.minimum(gate, self.limit)
            up = jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + self.shift)


SILU = Gate()


class Weights(NamedTuple):
    """Of all experts. The biases are both there or both None."""

    gate_up: Float[Array, "E D G"]
    down: Float[Array, "E I D"]
    gate_up_bias: Float[Array, "E G"] | None = None
    down_bias: Float[Array, "E D"] | None = None


def route(
    logits: Float32[Array, "B T E"], *, per_token: int, normalize: bool
) -> tuple[Int[Array, "B T A"], Float32[Array, "B T A"]]:
    """Choose each token's experts, and what share each has in the sum.

    Args:
      logits: of the router.
      per_token: experts of a token.
      normalize: whether the shares of the chosen experts add up to one; else they are
        their probabilities among all experts.

    Returns:
      The experts, the likeliest first, the lower index among equals; and the shares.
    """
    chosen, experts = jax.lax.top_k(logits, per_token)
    if normalize:
        return experts, jax.nn.softmax(chosen, axis=-1)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return experts, jnp.exp(chosen - total)


@checked
def feed_forward(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T A"],
    shares: Float32[Array, "B T A"],
    weights: Weights,
    *,
    gate: Gate,
    implementation: Implementation | None = None,
) -> Float[Array, "B T D"]:
    """Return the sum over each token's experts of what they make of it.

    Args:
      x: tokens.
      experts: of each token, all different.
      shares: of each expert in the sum.
      weights: of all experts.
      gate: the activation between the two products.
      implementation: "gather" (reads each choice of an expert), "dense" (reads all
        experts), "sorted" (tokens by expert, block by block), "blocks" (all of these at
        once), "ragged" (by `jax.lax.ragged_dot`), "triton" (NVIDIA, up to 64 tokens of
        a device in 16 bits, reads each expert once), or None for the best one.

    Returns:
      The sums in the dtype of `x`. Products are summed in float32, and rounded to the
      dtype of `x` between the two.

    Raises:
      ValueError: shapes disagree, or the implementation is unknown.
      NotImplementedError: a named implementation cannot run here.
    """
    where = "feed_forward"
    if weights.gate_up.shape[2] != 2 * weights.down.shape[1]:
        raise ValueError(
            f"{where}: gate_up holds gate beside up of {weights.down.shape[1]} "
            f"columns, but has {weights.gate_up.shape[2]}."
        )
    run: Callable = functools.partial(_of_tokens, where, implementation, gate)
    if current_mesh() is not None:
        run = _over_devices(run)
    return run(x, experts, shares, weights)


def choose(
    tokens: int, per_token: int, count: int, *, triton: bool = False
) -> Implementation:
    """Return what reads the fewest weights at a number of tokens.

    On a CPU sorting is best where experts are large enough to matter. On a GPU a loop
    waits for each of its steps to be launched, so copies of experts cost less; and
    while an expert has few tokens, multiplying all tokens by all experts costs less yet
    (measured at 4 and 16 times as many tokens as experts). XLA has a kernel of
    `ragged_dot` for TPUs, and none elsewhere.

    Args:
      tokens: of one device.
      per_token: experts of each.
      count: experts of one device.
      triton: whether "triton" takes these arrays and can run.
    """
    backend = jax.default_backend()
    if backend == "cpu":
        return "sorted"
    if tokens > MOST_TOKENS:
        if backend == "tpu":
            return "ragged"
        return "dense" if tokens <= _DENSE_TOKENS * count else "blocks"
    if triton:
        return "triton"
    return "gather" if tokens * per_token < count else "dense"


def _over_devices(run: Callable) -> Callable:
    """Return `run` where each device has whole experts, and whole rows of the batch."""

    def on_one(x, experts, shares, *leaves):
        weights = Weights(*leaves)
        count = len(weights.down)
        here = experts - first_of_shard(count)
        here = jnp.where((here >= 0) & (here < count), here, count)
        return add_up(run(x, here, shares, weights))

    def spread(x, experts, shares, weights):
        leaves = [leaf for leaf in weights if leaf is not None]
        letters = ("E D G", "E I D", "E G", "E D")[: len(leaves)]
        one = along(on_one, ("B T D", "B T A", "B T A", *letters), "B T D")
        return one(x, experts, shares, *leaves)

    return spread


def _of_tokens(where, implementation, gate, x, experts, shares, weights):
    """Run on what this device has, tokens as `[M, D]`; no expert has the index `E`."""
    rows, experts, shares = (
        leaf.reshape(-1, leaf.shape[-1]) for leaf in (x, experts, shares)
    )
    reason = unsupported(rows, weights)
    if implementation is None:
        able = not reason and not dispatch.triton_unavailable()
        tokens, per_token = experts.shape
        implementation = choose(tokens, per_token, len(weights.down), triton=able)
    run = dispatch.resolve(where, implementation, _RUNS, unable={"triton": reason})
    out = run(rows, experts, shares, weights, gate=gate)
    return out.reshape(x.shape).astype(x.dtype)


def _reference(x, experts, shares, weights, *, gate):
    """Run every expert on every token, one after the other, in float32."""
    x = x.astype(jnp.float32)
    times = functools.partial(jnp.matmul, precision="highest")
    out = jnp.zeros_like(x)
    for e in range(len(weights.down)):
        one = jax.tree.map(lambda leaf, e=e: leaf[e].astype(jnp.float32), weights)
        inner = times(x, one.gate_up)
        if one.gate_up_bias is not None:
            inner = inner + one.gate_up_bias[None]
        y = times(gate(inner), one.down)
        if one.down_bias is not None:
            y = y + one.down_bias[None]
        share = jnp.sum(jnp.where(experts == e, shares, 0.0), axis=1)
        out = out + share[:, None] * y
    return out


def _gather(x, experts, shares, weights, *, gate):
    """Read the experts of each token; the sums are multiplied and added in place.

    A product of matrices would make a copy of the experts first.
    """
    count, per_token = len(weights.down), experts.shape[1]
    index = jnp.minimum(experts, count - 1).ravel()
    one = jax.tree.map(lambda leaf: leaf[index], weights)

    def times(rows, matrices):
        wide = rows.astype(jnp.float32)[:, :, None] * matrices.astype(jnp.float32)
        return jnp.sum(wide, axis=1)

    y = _both(times, jnp.repeat(x, per_token, axis=0), one, gate, axis=0)
    shares = jnp.where(experts < count, shares, 0.0)
    return jnp.sum(y.reshape(*experts.shape, -1) * shares[..., None], axis=1)


def _dense(x, experts, shares, weights, *, gate):
    """Run every expert on every token; those that were not chosen have no share."""
    count = len(weights.down)
    every = jnp.broadcast_to(x[None], (count, *x.shape))
    y = _both(_matmul, every, weights, gate, axis=1)
    index = jnp.arange(count, dtype=experts.dtype)
    mine = experts[None] == index[:, None, None]  # [E, M, A]
    share = jnp.sum(jnp.where(mine, shares[None], 0.0), axis=2)
    return jnp.sum(jnp.where(share[..., None] > 0, y * share[..., None], 0.0), axis=0)


def _sorted(x, experts, shares, weights, *, gate):
    """Multiply blocks of tokens that share an expert, one after the other."""
    blocks = _cut(x, experts, len(weights.down), most=_MOST_BLOCK)

    def step(i, out):
        e, tokens, rows = blocks.find(i)
        one = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, e, keepdims=False), weights
        )
        y = _both(_matmul, x[tokens], one, gate)
        return out.at[rows].set(y.astype(out.dtype), mode="drop")

    out = jnp.zeros((experts.size, x.shape[1]), x.dtype)
    return _add(jax.lax.fori_loop(0, blocks.number, step, out), experts, shares)


def _blocks(x, experts, shares, weights, *, gate):
    """Multiply the same blocks all at once, each with a copy of its expert.

    Blocks are so large that there are at most twice as many as experts.
    """
    blocks = _cut(x, experts, len(weights.down), most=len(x))
    most = experts.size // blocks.size + min(len(weights.down), experts.size)
    e, tokens, rows = blocks.find(jnp.arange(most, dtype=jnp.int32))
    own = jax.tree.map(lambda leaf: leaf[e], weights)
    y = _both(_matmul, x[tokens], own, gate, axis=1)
    out = jnp.zeros((experts.size, x.shape[1]), x.dtype)
    out = out.at[rows].set(y.astype(out.dtype), mode="drop")
    return _add(out, experts, shares)


class _Blocks(NamedTuple):
    """Choices of experts, sorted and cut into blocks that share an expert.

    Attributes:
      number: of blocks, int32.
      size: choices of a block.
      find: returns of a block, or of several, the expert, the tokens `[..., size]`, and
        to which choices they belong; behind the last where a block is not full.
    """

    number: jax.Array
    size: int
    find: Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


def _cut(x, experts, count: int, *, most: int) -> _Blocks:
    """Return blocks of as many choices as an expert has on average, up to `most`."""
    order, sizes = _sort(experts, count)
    total, per_token = len(order), experts.shape[1]
    average = max(1, total // count)
    size = min(most, max(_LEAST_BLOCK, 1 << (average - 1).bit_length()))
    size = min(size, len(x))  # the experts of a token are all different
    first = jnp.cumsum(sizes) - sizes
    blocks = (sizes + size - 1) // size
    ends = jnp.cumsum(blocks)

    def find(block):
        e = jnp.minimum(jnp.searchsorted(ends, block, side="right"), count - 1)
        start = first[e] + (block - (ends[e] - blocks[e])) * size
        within = jnp.arange(size, dtype=jnp.int32)
        places = start[..., None] + within.reshape((1,) * start.ndim + (-1,))
        inside = places < (first[e] + sizes[e])[..., None]
        choices = order[jnp.minimum(places, total - 1)]
        return e, choices // per_token, jnp.where(inside, choices, total)

    return _Blocks(ends[-1], size, find)


def _ragged(x, experts, shares, weights, *, gate):
    """Multiply all tokens, sorted by expert, in one product of each kind."""
    count, per_token = len(weights.down), experts.shape[1]
    order, sizes = _sort(experts, count)
    own = jnp.minimum(experts.ravel()[order], count - 1)
    biases = Weights(
        weights.gate_up,
        weights.down,
        *(None if leaf is None else leaf[own] for leaf in weights[2:]),
    )

    def times(rows, matrices):
        return jax.lax.ragged_dot(
            rows, matrices, sizes, preferred_element_type=jnp.float32
        )

    y = _both(times, x[order // per_token], biases, gate, axis=0)
    y = jnp.where(
        (jnp.arange(len(order), dtype=jnp.int32) < jnp.sum(sizes))[:, None], y, 0.0
    )
    out = jnp.zeros((len(order), x.shape[1]), x.dtype)
    return _add(out.at[order].set(y.astype(x.dtype)), experts, shares)


def _both(times, x, weights, gate, *, axis=None):
    """Apply gate and up, the activation, and down, by whatever multiplies.

    Biases get an axis for the tokens at `axis`, 0 where they have one already.
    """

    def add(y, bias):
        if bias is None:
            return y
        bias = bias.astype(jnp.float32)
        if axis != 0:
            bias = jnp.expand_dims(bias, 0 if axis is None else axis)
        return y + bias

    inner = gate(add(times(x, weights.gate_up), weights.gate_up_bias))
    return add(times(inner.astype(x.dtype), weights.down), weights.down_bias)


def _matmul(x, matrices):
    return jnp.matmul(x, matrices, preferred_element_type=jnp.float32)


def _sort(experts, count):
    """Return the choices in the order of their experts, and how many each has."""
    flat = experts.ravel()
    sizes = jnp.zeros(count + 1, jnp.int32).at[flat].add(1)[:count]
    return jnp.argsort(flat, stable=True).astype(jnp.int32), sizes


def _add(rows, experts, shares):
    """Add up the rows `[M A, D]` of each token, in the order of its experts."""
    rows = rows.reshape(*experts.shape, -1).astype(jnp.float32)
    return jnp.sum(rows * shares[..., None], axis=1)


_RUNS = {
    "gather": _gather,
    "dense": _dense,
    "sorted": _sorted,
    "blocks": _blocks,
    "ragged": _ragged,
    "triton": experts_triton,
}
