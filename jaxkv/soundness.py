"""What is said where logits or scores are NaN or infinite."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import state as kv
from jaxkv.options import Options
from jaxkv.sampling import Categorical, Greedy
from jaxkv.sequences import Generation
from jaxkv.state import KVState

_USUAL = Options()


class LogitsError(ValueError):
    """A network's logits are NaN or infinite, so that no token can be chosen.

    Attributes:
      tokens: how many tokens of its output each broken row has, by its index.
      cause: what they come from, and what would help.
      row: the function that was called, and what a row is to it.
    """

    def __init__(
        self,
        tokens: Mapping[int, int],
        cause: str,
        *,
        row: str = "generate: prompt",
    ):
        self.tokens = dict(tokens)
        self.cause, self.row = cause, row
        call, _, what = row.partition(": ")
        rows = [f"{what} {number}" for number in self.tokens]
        few = ", ".join(rows[:3]) + (f" and {len(rows) - 3} more" * (len(rows) > 3))
        first = min(self.tokens.values())
        where = f" and {first} tokens of its output" if first else ""
        super().__init__(
            f"{call}: the logits behind {few}{where} are NaN or infinite, so that no "
            f"token can be chosen; {cause}"
        )

    def of_prompts(self, numbers: Sequence[int]) -> "LogitsError":
        """Return the error of a batch whose rows are the prompts of these numbers."""
        tokens = {numbers[row]: count for row, count in self.tokens.items()}
        return LogitsError(tokens, self.cause, row=self.row)


def check(generation: Generation[Any], params: Any, options: Options) -> None:
    """Raise unless all rows go on: one look at `generation.finite`.

    Args:
      generation: the sequences; what else they hold is looked at where a row is broken.
      params: of the network; likewise.
      options: the policy of the prompts and the sampler, for the message.

    Raises:
      LogitsError: logits are NaN or infinite.
      ValueError: logits are NaN because the scores of a prompt were.
    """
    rows = np.flatnonzero(~jax.device_get(generation.finite)).tolist()
    if not rows:
        return
    counts = jax.device_get(generation.lengths).tolist()
    for layer, state in enumerate(generation.cache):
        prompts = generation.position - generation.lengths + 1
        spoilt = jax.device_get(spoilt_prompts(state, prompts))
        for row in rows:
            # The first token does not depend on scores; without it the network is bad.
            if counts[row]:
                is_nan, exceeds = (each[row] for each in spoilt)
                check_prompt(is_nan, exceeds, options.prefill, row, layer)
    raise LogitsError({row: counts[row] for row in rows}, cause(params, options))


def check_prompt(
    is_nan: bool, exceeds: bool, prefill: Any, row: int, layer: int
) -> None:
    """Raise ValueError where `spoilt_prompts` says so of a row of a layer."""
    name = type(prefill).__name__
    if is_nan:
        raise ValueError(
            f"generate: {name} scores tokens of prompt {row} as NaN in layer "
            f"{layer}, or not all of them; look for a division by 0 in compress or "
            "scores, and at how many scores it returns."
        )
    if exceeds:
        raise ValueError(
            f"generate: {name} keeps more tokens of prompt {row} in layer "
            f"{layer} than its budget; compress may keep prompt.keep of each."
        )


def spoilt_prompts(state: KVState, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return where a layer holds NaN for a token of the prompt, bool `[B]` twice.

    First where a value is NaN as a whole, then where it begins with NaN: the policy
    kept too many tokens (see `policies.contract`).

    Args:
      state: of the layer.
      lengths: int32 `[B]`, tokens of the prompts.
    """
    held = kv.occupied(state) & (state.positions < lengths[:, None, None])
    wrong = jnp.isnan(state.values)
    whole = wrong.all(-1) & held
    first = wrong[..., 0] & held & ~whole
    return whole.any((1, 2)), first.any((1, 2))


def cause(params: Any, options: Options = _USUAL) -> str:
    """Return what makes logits NaN or infinite, and what would help.

    Args:
      params: of the network.
      options: a sampler of one's own may be what is wrong.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    dtype = leaves[0][1].dtype
    half = dtype == jnp.float16
    for path, leaf in leaves:
        # NaN cannot come from a cast; infinity can, to float16.
        bad = leaf != leaf if half else ~jnp.isfinite(leaf)
        if count := int(bad.sum()):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return (
                f"{count} of {leaf.size} values of the weight {name} are NaN or "
                "infinite: the checkpoint is damaged; fetch its files again."
            )
    if half:
        return (
            "float16 holds no number beyond 65,504; load the model with dtype bfloat16 "
            "or float32, which do."
        )
    if not isinstance(options.sampler, Greedy | Categorical):
        return (
            "all weights are numbers, so that either what the network computes exceeds "
            f"{dtype}, or {type(options.sampler).__name__}.pick returns tokens that "
            "are not in the vocabulary."
        )
    return (
        f"all weights are numbers, but what the network computes exceeds {dtype}; "
        "compare the checkpoint's files with their source."
    )
