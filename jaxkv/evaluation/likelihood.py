"""The likelihood of given text under a budget: teacher forcing through a policy.

Axis letters: `B` texts, `T` tokens of each, `P` of them that are read as a prompt.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.contexts.candidates import chances
from jaxkv.evaluation.methods import Method
from jaxkv.forward import logits_at_end, read, read_behind
from jaxkv.given import feed, in_blocks
from jaxkv.language_model import LanguageModel
from jaxkv.models.decoder import Decoder
from jaxkv.options import Options
from jaxkv.runtime.programs import bounded_jit


def windows(lm: LanguageModel, texts: list[str], *, length: int) -> np.ndarray:
    """Return texts cut into windows of equal length that do not overlap.

    Args:
      lm: the model, whose tokenizer counts. No special token is added.
      texts: what is left behind the last whole window of each is not used.
      length: tokens `T` of a window.

    Returns:
      int32 `[B, T]`.

    Raises:
      ValueError: no text is as long, or the model has no tokenizer.
    """
    if lm.tokenizer is None:
        raise ValueError(
            f"{lm.name} has no tokenizer, which windows of a text need; add "
            "tokenizer.json to its folder."
        )
    rows = []
    for text in texts:
        ids = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        whole = len(ids) // length * length
        rows.append(np.array(ids[:whole], np.int32).reshape(-1, length))
    found = np.concatenate(rows) if rows else np.zeros((0, length), np.int32)
    if not len(found):
        raise ValueError(
            f"no text has {length} tokens; give a longer --text or shorter --length."
        )
    return found


def losses(
    lm: LanguageModel,
    tokens: np.ndarray,
    method: Method,
    budget: int | None,
    *,
    prompt: int,
    **implementations: Any,
) -> np.ndarray:
    """Return the negative log-likelihood of each token behind the prompt, in nats.

    The prompt is read, and the prefill policy evicts from it; the rest is fed token by
    token, and the decode policy evicts on the way. Where it keeps everything, the rest
    passes in blocks, and without a policy all tokens are read at once, which gives the
    same but for rounding.

    Args:
      lm: the model.
      tokens: int32 `[B, T]`.
      method: the two policies.
      budget: in tokens; None where the method keeps everything.
      prompt: `P`, how many tokens are read first.
      **implementations: of `Options`.

    Returns:
      float32 `[B, T - P]`.
    """
    options = Options(
        budget=budget, prefill=method.prefill, decode=method.decode, **implementations
    )
    options.check()
    given = jnp.asarray(tokens, jnp.int32)
    run = _fed if method.bounded else _read
    return np.asarray(run(lm.network, lm.params, given, prompt=prompt, options=options))


@bounded_jit(static_argnames=("network", "prompt", "options"), implied=("params",))
def _fed(
    network: Decoder, params: Any, tokens: jax.Array, *, prompt: int, options: Options
) -> jax.Array:
    batch, length = tokens.shape
    lengths = jnp.full(batch, prompt, jnp.int32)
    slots = options.layer_slots(prompt, length - prompt, network.config.windows)
    hidden, cache = read(
        *(network, params, tokens[:, :prompt], lengths),
        options=options,
        slots=slots,
        keep=None,
    )
    rest = tokens[:, prompt:]
    counts = jnp.full(batch, length - prompt, jnp.int32)
    if in_blocks(options.decode, cache):
        behind, _ = read_behind(
            *(network, params, rest, counts, lengths, cache),
            implementation=options.decode_implementation,
        )
        before = jnp.concatenate([hidden[:, prompt - 1 :], behind[:, :-1]], axis=1)
        return -chances(network, params, before, rest).logprobs
    fed = feed(
        *(network, params, rest, counts),
        *(lengths, logits_at_end(network, params, hidden, lengths), cache),
        options=options,
    )
    return -fed.log_probs


@bounded_jit(static_argnames=("network", "prompt", "options"), implied=("params",))
def _read(
    network: Decoder, params: Any, tokens: jax.Array, *, prompt: int, options: Options
) -> jax.Array:
    batch, length = tokens.shape
    hidden, _ = read(
        *(network, params, tokens, jnp.full(batch, length, jnp.int32)),
        options=options,
        slots=length,
        keep=None,
    )
    before = hidden[:, prompt - 1 : length - 1]
    return -chances(network, params, before, tokens[:, prompt:]).logprobs
