"""Statistics of a network's queries over text, for `TriAttention`.

Axis letters: `B` batch, `T` tokens, `N` query heads, `L` layers, `H` head size.
"""

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.expected import brief
from jaxkv.kernels import prefill
from jaxkv.kernels.rotary import rotate
from jaxkv.kernels.weighing import scale_of
from jaxkv.language_model import LanguageModel
from jaxkv.policies.triattention import Statistics, lengths_of_pairs
from jaxkv.provenance import write_whole
from jaxkv.runtime.meshes import under_mesh_of


@functools.partial(jax.jit, static_argnames="network")
def sums(network, params, tokens, lengths):
    """Return sums over the tokens of all rows, layer by layer.

    Args:
      network: static.
      params: of the network.
      tokens: int32 `[B, T]`, right-padded.
      lengths: int32 `[B]`.

    Returns:
      Of each layer's queries before their rotation, float32 `[L, N, H]`, and of the
      lengths of the pairs that are turned together, `[L, N, H / 2]`.
    """
    frequencies = network.apply({"params": params}, method="frequencies")
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    index = jnp.broadcast_to(index, tokens.shape)
    real = (index < lengths[:, None])[..., None, None]

    def attend(q, k, v, turn, weighing):
        how = dict(scale=scale_of(q), window=weighing.window) | weighing.softmax
        out = prefill.causal_attention(q, k, v, **how)
        plain = rotate(q.astype(jnp.float32), -index, turn)
        both = plain, lengths_of_pairs(plain)
        return out, tuple(jnp.where(real, x, 0.0).sum((0, 1)) for x in both)

    _, found = network.apply({"params": params}, tokens, index, frequencies, attend)
    return tuple(jnp.stack(parts) for parts in zip(*found, strict=True))


def calibrate(
    lm: LanguageModel, texts: Sequence[str], *, length: int = 1024, batch_size: int = 4
) -> Statistics:
    """Count the queries of a network over texts.

    Args:
      lm: with a tokenizer.
      texts: are read in windows of their own.
      length: the longest window, in tokens.
      batch_size: windows that are read together.

    Raises:
      ValueError: there is no tokenizer, no list of texts, or no token in them.
    """
    if lm.tokenizer is None:
        raise ValueError(f"calibrate: {lm.name} has no tokenizer to read texts with.")
    if isinstance(texts, str):
        raise ValueError(
            f"calibrate: texts= takes a list of texts, got the text {brief(texts)}."
        )
    windows = []
    for text in filter(str.strip, texts):  # special tokens alone say nothing
        ids = lm.tokenizer(text)["input_ids"]
        windows += [ids[i : i + length] for i in range(0, len(ids), length)]
    if not windows:
        raise ValueError("calibrate: the texts hold no token; give others.")
    total: list[np.ndarray] = []
    for first in range(0, len(windows), batch_size):
        some = windows[first : first + batch_size]
        some += [[]] * (batch_size - len(some))
        tokens = np.zeros((batch_size, min(length, max(map(len, windows)))), np.int32)
        for row, window in zip(tokens, some, strict=True):
            row[: len(window)] = window
        lengths = np.array([len(window) for window in some], np.int32)
        with under_mesh_of(lm.params):
            found = sums(
                lm.network, lm.params, jnp.asarray(tokens), jnp.asarray(lengths)
            )
        parts = [np.asarray(x, np.float64) for x in found]
        total = (
            parts if not total else [a + b for a, b in zip(total, parts, strict=True)]
        )
    count = sum(map(len, windows))
    return Statistics(*((x / count).astype(np.float32) for x in total))


def save(statistics: Statistics, path: Path, **about: str) -> None:
    """Write statistics, and what they are of, into one file.

    Args:
      statistics: of `calibrate`.
      path: of the file, which is written whole or not at all.
      **about: texts that are written beside them.
    """
    buffer = io.BytesIO()
    named = {name: np.array(text) for name, text in about.items()}
    arrays: dict[str, Any] = statistics._asdict() | named
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getvalue())
