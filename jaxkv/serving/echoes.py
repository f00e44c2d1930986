"""How likely the network holds the tokens of a given text, and what instead of them.

Axis letters: `B` rows, `P` padded text, `A` alternatives.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import soundness
from jaxkv.attention import Network
from jaxkv.forward import read
from jaxkv.language_model import LanguageModel
from jaxkv.options import Options
from jaxkv.runtime.programs import bounded_jit
from jaxkv.sequences import LogProbs
from jaxkv.text.planning import bucket

_CHUNK = 64  # tokens whose logits exist at a time


def weigh_text(
    network: Network,
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    options: Options,
    alternatives: int,
) -> LogProbs:
    """Return how likely each token of texts is behind those before it.

    Args:
      network: static.
      params: its parameters.
      tokens: int32 `[B, P]`, right-padded.
      lengths: int32 `[B]`.
      options: static; without a budget.
      alternatives: `A`, static.

    Returns:
      Of the tokens from the second one on, `[B, P - 1]` and `[B, P - 1, A]`; what
      stands beyond a text means nothing.
    """
    rows, size = tokens.shape
    hidden, _ = read(
        network, params, tokens, lengths, options=options, slots=size, keep=None
    )
    chunk = min(_CHUNK, size)

    def parts(x: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2)
        cut = jnp.pad(x, padding).reshape(rows, -1, chunk, *x.shape[2:])
        return cut.swapaxes(0, 1)

    def of(part: tuple[jax.Array, jax.Array]) -> LogProbs:
        states, ids = part
        logits = network.apply({"params": params}, states, method="unembed")
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)
        values, best = jax.lax.top_k(logits, alternatives)
        return LogProbs((chosen - total)[..., 0], best, values - total)

    found = jax.lax.map(of, (parts(hidden[:, : size - 1]), parts(tokens[:, 1:])))
    return jax.tree.map(
        lambda x: x.swapaxes(0, 1).reshape(rows, -1, *x.shape[3:])[:, : size - 1], found
    )


_weigh_jit = bounded_jit(
    implied=("params",), static_argnames=("network", "options", "alternatives")
)(weigh_text)


def echo(
    lm: LanguageModel, ids: Sequence[int], alternatives: int
) -> tuple[list[float], list[dict[int, float]]]:
    """Return what the full cache gives of a text; texts of like lengths compile once.

    Args:
      lm: the model.
      ids: of a text, at least one.
      alternatives: to each token, at least one.

    Returns:
      The log-probabilities of all tokens but the first, and for each the likeliest
      ones and theirs.

    Raises:
      LogitsError: the network gives NaN or infinity.
    """
    tokens = np.zeros((1, bucket(len(ids))), np.int32)
    tokens[0, : len(ids)] = ids
    lengths = np.array([len(ids)], np.int32)
    with jax.transfer_guard("allow"):
        found = jax.device_get(
            _weigh_jit(
                *(lm.network, lm.params, tokens, lengths),
                options=Options(),
                alternatives=alternatives,
            )
        )
    chosen, best, values = (x[0, : len(ids) - 1] for x in found)
    if not np.isfinite(chosen).all():
        first = int(np.isfinite(chosen).argmin())
        raise soundness.LogitsError({0: first}, soundness.cause(lm.params))
    pairs = zip(best.tolist(), values.tolist(), strict=True)
    return chosen.tolist(), [dict(zip(*pair, strict=True)) for pair in pairs]


def warm_up(lm: LanguageModel, longest: int, alternatives: int) -> None:
    """Compile for texts of all lengths.

    Args:
      lm: the model.
      longest: tokens of the longest text.
      alternatives: see `echo`.
    """
    length = 1
    while length <= longest:
        length = bucket(length)
        echo(lm, [0] * min(length, longest), alternatives)
        length += 1
