"""What queries a network makes, and which prompt tokens they look at.

A recording `attend` sees every layer's rotated queries and keys, so no network has to
know of it. Queries before the rotary embedding are had back by rotating by the negative
position.

Axis letters: `L` layers, `T` padded tokens, `C` recorded tokens, `W` queries of a
window, `S` window sizes, `N` query heads, `K` key/value heads, `H` head size.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkv.kernels import prefill
from jaxkv.kernels.rotary import rotate
from jaxkv.kernels.weighing import scale_of
from jaxkv.models.decoder import Decoder, layer_frequencies
from jaxkv.runtime.programs import bounded_jit


class Recording(NamedTuple):
    """What one run over one sequence has shown.

    Attributes:
      queries: `[L, C, N, H]`, rotated, of the recorded tokens.
      means: float32 `[L, N, H]`, mean over the prompt of its queries before rotation.
      keys: `[L, K, T, H]`, rotated.
    """

    queries: jax.Array
    means: jax.Array
    keys: jax.Array


@bounded_jit(static_argnames=("network",), implied=("params",))
def record(
    network: Decoder,
    params: Any,
    tokens: jax.Array,
    positions: jax.Array,
    places: jax.Array,
    length: jax.Array,
) -> Recording:
    """Run one sequence; a token sees all tokens before it, whatever their positions.

    Args:
      network: static.
      params: its parameters.
      tokens: int32 `[T]`, padded at the end.
      positions: int32 `[T]`, where the tokens are said to stand.
      places: int32 `[C]`, indices in `tokens` of those whose queries are recorded.
      length: int32 scalar, tokens of the prompt, which come first.
    """
    is_prompt = (jnp.arange(tokens.shape[0], dtype=jnp.int32) < length)[:, None, None]

    def attend(q, k, v, frequencies, weighing):
        how = dict(scale=scale_of(q), window=weighing.window) | weighing.softmax
        out = prefill.causal_attention(q, k, v, **how)
        plain = rotate(q, -positions[None], frequencies)[0].astype(jnp.float32)
        mean = jnp.where(is_prompt, plain, 0).sum(0) / length.astype(jnp.float32)
        return out, (q[0, places], mean, k[0].swapaxes(0, 1))

    _, seen = network.apply(
        {"params": params},
        tokens[None],
        positions[None],
        layer_frequencies(network.config),
        attend,
    )
    return Recording(*(jnp.stack(arrays) for arrays in zip(*seen, strict=True)))


def turn(queries: jax.Array, positions: jax.Array, network: Decoder) -> jax.Array:
    """Rotate queries `[L, C, N, H]` by positions `[C]`; negative ones turn back."""
    layers = zip(queries, layer_frequencies(network.config), strict=True)
    turned = [rotate(q[None], positions[None], turn)[0] for q, turn in layers]
    return jnp.stack(turned)


class Cosines(NamedTuple):
    """Cosines of paired queries, float32 `[L]`, mean over tokens and heads.

    Attributes:
      before: of queries before the rotary embedding.
      after: of queries after it.
      before_centred: as `before`, with the prompt's mean query subtracted from both.
      after_centred: the same queries, rotated.
    """

    before: jax.Array
    after: jax.Array
    before_centred: jax.Array
    after_centred: jax.Array


@bounded_jit(static_argnames=("network",))
def compare(
    network: Decoder,
    ours: jax.Array,
    our_positions: jax.Array,
    true: jax.Array,
    true_positions: jax.Array,
    means: jax.Array,
) -> Cosines:
    """Compare the i-th query of a window with the i-th true one.

    Rotation keeps inner products of queries at one position, so where both windows
    stand at the same positions the cosines before and after it are the same.

    Args:
      network: static; its rotary frequencies are used.
      ours: `[L, C, N, H]`, rotated for `our_positions` `[C]`.
      our_positions: int32 `[C]`.
      true: `[L, C, N, H]`, rotated for `true_positions`.
      true_positions: int32 `[C]`.
      means: from `Recording.means`.
    """
    ours, true = ours.astype(jnp.float32), true.astype(jnp.float32)
    plain_ours = turn(ours, -our_positions, network)
    plain_true = turn(true, -true_positions, network)
    centred_ours = plain_ours - means[:, None]
    centred_true = plain_true - means[:, None]

    def mean(a, b):
        return cosine(a, b).mean((1, 2))

    return Cosines(
        mean(plain_ours, plain_true),
        mean(ours, true),
        mean(centred_ours, centred_true),
        mean(
            turn(centred_ours, our_positions, network),
            turn(centred_true, true_positions, network),
        ),
    )


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the cosine along the last axis; 0 where one of the two is zero."""
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / jnp.maximum(norms, 1e-30)


@bounded_jit(static_argnames=())
def window_scores(
    queries: jax.Array,
    keys: jax.Array,
    visible: jax.Array,
    members: jax.Array,
) -> jax.Array:
    """Sum the attention of a window's queries to each prompt token.

    `score_s(j) = sum_{i in window s} softmax_j(q_i k_j / sqrt(H))`, over the prompt's
    keys only, float32.

    Args:
      queries: `[L, W, N, H]`, rotated.
      keys: `[L, K, T, H]`, rotated.
      visible: int32 `[W]`, how many of the first keys a query sees.
      members: `[S, W]`, 1 for queries that belong to the window of a size.

    Returns:
      `[L, S, N, T]`; a window without a member scores 0.
    """
    heads, size = queries.shape[2:]
    group = heads // keys.shape[1]
    seen = jnp.arange(keys.shape[2], dtype=jnp.int32)[None] < visible[:, None]  # [W, T]

    def layer(arrays):
        q, k = (array.astype(jnp.float32) for array in arrays)
        k = jnp.repeat(k, group, axis=0)
        logits = jnp.einsum("wnh,nth->wnt", q, k) * size**-0.5
        weights = jax.nn.softmax(logits, where=seen[:, None], axis=-1)
        return jnp.einsum("sw,wnt->snt", members.astype(jnp.float32), weights)

    return jax.lax.map(layer, (queries, keys))


@bounded_jit(static_argnames=("budget",))
def recall(
    scores: jax.Array, truth: jax.Array, length: jax.Array, *, budget: int
) -> jax.Array:
    """Return the share of the `budget` truly best prompt tokens that scores choose.

    Args:
      scores: `[..., T]`.
      truth: `[..., T]`, broadcast against `scores`.
      length: int32 scalar, tokens of the prompt; it is at least `budget`.
      budget: tokens that are kept.

    Returns:
      Float32 `[...]`.
    """
    real = jnp.arange(scores.shape[-1], dtype=jnp.int32) < length

    def chosen(values):
        _, best = jax.lax.top_k(jnp.where(real, values, -jnp.inf), budget)
        empty = jnp.zeros(values.shape, bool)
        return jnp.put_along_axis(empty, best, True, axis=-1, inplace=False)

    both = chosen(scores) & chosen(truth)
    return both.sum(-1) / budget
