"""TriAttention: keep the keys that queries like those of before will look at.

Mao et al., arXiv 2604.04921. Axis letters: `B` batch, `K` key/value heads, `G` query
heads of each, `S` slots, `H` head size, `L` layers, `N` query heads.
"""

import dataclasses
import functools
import hashlib
import os
import zipfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge

from jaxkv.kernels.rotary import rotate, turn
from jaxkv.kernels.weighing import PLAIN
from jaxkv.policies.base import PlainAttention
from jaxkv.policies.eviction import attend_and_write, check_room, evict_in_bulk
from jaxkv.state import KVState

OFFSETS = tuple(2**i for i in range(17))  # positions ahead, 1 to 65,536


class Statistics(NamedTuple):
    """Of a network's queries before their rotation, as `jaxkv calibrate` counts them.

    Attributes:
      mean: float32 `[L, N, H]`.
      size: float32 `[L, N, H / 2]`, mean length of each pair that is turned together.
    """

    mean: np.ndarray
    size: np.ndarray


class Seen(NamedTuple):
    """What is remembered of queries.

    Attributes:
      mean: float32 `[B, K, G, H]`, their sum.
      size: float32 `[B, K, G, H / 2]`, the sum of lengths.
      number: float32 `[B]`, how many they are; 1 where both are means.
      frequencies: float32 `[B, H / 2]`, of the rotation.
      prompt: int32 `[B]`, tokens of the prompt.
    """

    mean: jax.Array
    size: jax.Array
    number: jax.Array
    frequencies: jax.Array
    prompt: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class TriAttention(PlainAttention):
    """Evict what a mean query pays least to, averaged over the coming positions.

    Mao et al., "TriAttention: Efficient Long Reasoning with Trigonometric KV
    Compression" (arXiv 2604.04921), with the details of its code. Before the rotation,
    queries of a head lie close to their mean. So a key is worth

        S(j) = mean_d (R(t + d) E[q])^T k_j + sum_f (E|q_f| - |E[q_f]|) |k_jf|

    at position `t`, over distances `d` of 1, 2, 4, ... 65,536, where `f` are the pairs
    that RoPE turns and `R` turns them. Keys are stored turned, so that this is a
    product with a mean query that is turned ahead, and nothing is turned back. Scores
    of a query head are standardised over the tokens, and the largest of a group counts.
    Every `interval` steps as many tokens are evicted.

    `E` comes from the file `stats`, which `jaxkv calibrate` writes. Without one it is
    the mean over the queries that were decoded so far, which the paper does not do.
    Deviations: the budget includes the tokens of the interval, since it bounds slots;
    each head of each layer chooses for itself, one of three modes of the code.

    Attributes:
      stats: a file, or nothing.
      interval: tokens that are evicted at once.
      protect_prompt: never evict what prefill kept, as the paper does.
      n_recent: newest tokens that are never evicted.
      standardise: see above.
      digest: of the file, so that another content is another policy.
    """

    stats: str = ""
    interval: Annotated[int, Ge(1)] = 128
    protect_prompt: bool = False
    n_recent: Annotated[int, Ge(0)] = 0
    standardise: bool = True
    digest: str = dataclasses.field(default="", init=False)
    evicts = True

    def __post_init__(self) -> None:
        """Look at what the file holds today."""
        if isinstance(self.stats, os.PathLike):
            object.__setattr__(self, "stats", os.fspath(self.stats))
        named = isinstance(self.stats, str) and self.stats != ""
        object.__setattr__(self, "digest", _digest(self.stats) if named else "")

    @classmethod
    def paper(cls, **options) -> "TriAttention":
        """Return the paper's method: the prompt stays. It needs `stats` as well."""
        return cls(**dict[str, Any](protect_prompt=True) | options)

    @property
    def spare(self) -> int:
        """Slots that prefill leaves free: as many as are freed at once."""
        return self.interval

    def check(self, budget: int) -> None:
        """Need room beside what is protected, and a file that can be read."""
        check_room("TriAttention", budget, n_recent=self.n_recent, count=self.interval)
        if self.stats:
            read_statistics(self.stats, self.digest)

    def begin(self, state: KVState, lengths: jax.Array) -> KVState:
        """Remember no query; take keys as not turned, and a group's heads as one."""
        frequencies = jnp.zeros(state.keys.shape[-1] // 2, jnp.float32)
        return self._begun(state, lengths, frequencies, None)

    def begin_at(self, state: KVState, lengths: jax.Array, place: Any) -> KVState:
        """Take the statistics of a layer; see `contract.Place`.

        Raises:
          ValueError: the file is of another network.
        """
        if not self.stats:
            return self._begun(state, lengths, place.frequencies, place)
        mean, _ = read_statistics(self.stats, self.digest)
        heads, size = place.heads, state.keys.shape[-1]
        if mean.shape != (place.layers, heads, size):
            raise ValueError(
                f"TriAttention: {self.stats} has {mean.shape[0]} layers, "
                f"{mean.shape[1]} heads of size {mean.shape[2]}, but this network "
                f"{place.layers}, {heads} of {size}; calibrate it."
            )
        return self._begun(state, lengths, place.frequencies, place)

    def _begun(self, state, lengths, frequencies, place):
        batch, kv_heads, _, head_dim = state.keys.shape
        groups = 1 if place is None else place.heads // kv_heads
        shape = batch, kv_heads, groups
        mean = jnp.zeros((*shape, head_dim), jnp.float32)
        size = jnp.zeros((*shape, head_dim // 2), jnp.float32)
        count = jnp.zeros(batch, jnp.float32)
        if self.stats and place is not None:
            means, sizes = read_statistics(self.stats, self.digest)
            mean = mean + means[place.layer].reshape(1, *shape[1:], head_dim)
            size = size + sizes[place.layer].reshape(1, *shape[1:], head_dim // 2)
            count = count + 1.0
        memory = Seen(
            mean=mean,
            size=size,
            number=count,
            frequencies=jnp.zeros((batch, 1), jnp.float32) + frequencies[None],
            prompt=jnp.array(lengths, copy=True),
        )
        return dataclasses.replace(state, memory=memory)

    def attend(
        self,
        query,
        key,
        value,
        state,
        position,
        *,
        implementation=None,
        weighing=PLAIN,
    ) -> tuple[jax.Array, KVState]:
        """Overwrite what earlier bulk evictions freed; see `DecodePolicy.attend`."""
        out, state = attend_and_write(
            *(query, key, value, state, position),
            implementation=implementation,
            weighing=weighing,
        )
        seen = state.memory
        if not self.stats:
            seen = _with_query(seen, query, position)
            state = dataclasses.replace(state, memory=seen)
        oldest = seen.prompt if self.protect_prompt else jnp.zeros_like(position)

        def importance(rows):
            return expected_logits(
                jax.tree.map(lambda x: x[rows], seen),
                *(state.keys[rows], state.positions[rows], position[rows]),
                standardise=self.standardise,
            )

        return out, evict_in_bulk(
            *(state, importance, position, oldest, position - self.n_recent),
            count=self.interval,
            shared=False,
        )


def _with_query(seen: Seen, query: jax.Array, position: jax.Array) -> Seen:
    """Add a step's queries `[B, N, H]`, turned back; rows that have finished stay."""
    running = position >= 0

    def back(query, position, frequencies):
        return rotate(query[None, None], -position[None, None], frequencies)[0, 0]

    plain = jax.vmap(back)(query.astype(jnp.float32), position, seen.frequencies)
    batch, kv_heads, groups, head_dim = seen.mean.shape
    plain = plain.reshape(batch, kv_heads, -1, head_dim)
    if groups == 1:  # see `TriAttention.begin`
        plain = plain.mean(2, keepdims=True)
    here = running[:, None, None, None]
    return seen._replace(
        mean=seen.mean + jnp.where(here, plain, 0.0),
        size=seen.size + jnp.where(here, lengths_of_pairs(plain), 0.0),
        number=seen.number + running.astype(jnp.float32),
    )


def lengths_of_pairs(x: jax.Array) -> jax.Array:
    """Return the lengths of the pairs `(i, i + H / 2)` of the last axis."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.sqrt(first**2 + second**2)


def expected_logits(
    seen: Seen,
    keys: jax.Array,
    positions: jax.Array,
    position: jax.Array,
    *,
    standardise: bool,
) -> jax.Array:
    """Return what coming queries are expected to pay to each key, float32 `[B, K, S]`.

    Args:
      seen: of earlier queries.
      keys: `[B, K, S, H]`.
      positions: int32 `[B, K, S]`.
      position: int32 `[B]`, of the newest token.
      standardise: see `TriAttention`.
    """
    count = jnp.maximum(seen.number, 1.0)[:, None, None, None]
    mean, size = seen.mean / count, seen.size / count
    ahead = position[:, None] + jnp.asarray(OFFSETS, jnp.int32)[None]
    angles = ahead[..., None].astype(jnp.float32) * seen.frequencies[:, None]
    cos, sin = (f(angles).mean(1)[:, None, None] for f in (jnp.cos, jnp.sin))
    keys = keys.astype(jnp.float32)
    logits = jnp.einsum("bkgh,bksh->bkgs", turn(mean, cos, sin), keys)
    spread = size - lengths_of_pairs(mean)
    logits += jnp.einsum("bkgf,bksf->bkgs", spread, lengths_of_pairs(keys))
    held = (positions >= 0)[:, :, None]
    if standardise:
        number = jnp.maximum(held.sum(-1, keepdims=True), 1).astype(jnp.float32)
        middle = jnp.where(held, logits, 0.0).sum(-1, keepdims=True) / number
        apart = jnp.where(held, logits - middle, 0.0)
        width = jnp.sqrt((apart**2).sum(-1, keepdims=True) / number)
        logits = apart / jnp.maximum(width, 1e-6)
    return logits.max(2)


def _digest(path: str) -> str:
    """Return a digest of a file, or nothing where it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32]
    except OSError:
        return ""


@functools.lru_cache(maxsize=8)
def read_statistics(path: str, digest: str) -> Statistics:
    """Read a file that `jaxkv calibrate` has written.

    Args:
      path: of the file.
      digest: of its content, which is read once.

    Raises:
      ValueError: there is none, or it is none of these.
    """
    del digest
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, size = file["mean"], file["size"]
        whole = mean.dtype == size.dtype == np.float32 and mean.ndim == size.ndim == 3
        if not whole or mean.shape != (*size.shape[:2], 2 * size.shape[2]):
            raise ValueError("its arrays are none of queries")
        if not (np.isfinite(mean).all() and np.isfinite(size).all()):
            raise ValueError("it holds NaN or infinity")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"TriAttention: stats={path} is no file of jaxkv calibrate: {reason}."
        ) from error
    return Statistics(mean, size)
