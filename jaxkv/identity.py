"""What tells one model from another where arrays of theirs must not be mixed.

A path or a name says nothing about what lies there today.
"""

import dataclasses
import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """Of a model in memory.

    Attributes:
      name: what it was loaded as, for messages. It is not compared.
      network: digest of sizes and weights.
      tokenizer: digest of the tokenizer, None without one.
      dtype: of the parameters and of the cache.
    """

    name: str = dataclasses.field(compare=False)
    network: str
    tokenizer: str | None
    dtype: str

    def check(self, other: "Identity") -> None:
        """Raise ValueError unless a context of this model goes with another one."""
        if self == other:
            return
        read_by = f"the context was read by {self.name}"
        if self.dtype != other.dtype:
            raise ValueError(
                f"{read_by} in {self.dtype}, but {other.name} is in {other.dtype}; "
                f"load it with dtype={self.dtype!r}, or compress the documents again."
            )
        what = "weights are not those"
        if self.network == other.network:
            what = "tokenizer is not that"
        raise ValueError(
            f"{read_by}, whose {what} of {other.name} as it is now; use the model that "
            "it was made with, or compress the documents again."
        )


def of_network(config: Any, params: Any) -> str:
    """Return a digest of sizes and of all weights.

    They are added up where they lie, as whole numbers that wrap around, so that the
    result depends on no order, and on no device.
    """
    return digest(repr(dataclasses.asdict(config)), of_arrays(params))


def of_arrays(tree: Any) -> str:
    """Return a digest of arrays: their names, shapes, dtypes and sums of their bits."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = jax.device_get([_sums(leaf) for _, leaf in leaves])
    parts = [
        f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {total.tolist()}"
        for (path, leaf), total in zip(leaves, sums, strict=True)
    ]
    return digest(*parts)


@functools.partial(jax.jit, inline=True)
def _sums(array: jax.Array) -> jax.Array:
    """Return the sum of the bit patterns, and of their squares, uint32 `[2]`."""
    kind = {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(array, kind).astype(jnp.uint32)
    return jnp.stack([bits.sum(dtype=jnp.uint32), (bits * bits).sum(dtype=jnp.uint32)])


def of_tokenizer(tokenizer: Any) -> str | None:
    """Return the digest of how texts become token ids and token ids texts.

    Of a fast tokenizer that is its whole state; of another one its vocabulary.
    """
    if tokenizer is None:
        return None
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        state = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    else:
        state = json.loads(fast.to_str())
        # A call may set these, for itself.
        state = {k: v for k, v in state.items() if k not in ("padding", "truncation")}
    special = sorted(getattr(tokenizer, "all_special_ids", ()))
    spaces = getattr(tokenizer, "clean_up_tokenization_spaces", None)
    return digest(json.dumps([state, special, spaces], sort_keys=True))


def digest(*texts: str) -> str:
    """Return a digest of texts, 32 hexadecimal digits."""
    whole = hashlib.sha256()
    for text in texts:
        whole.update(text.encode("utf-8", "surrogatepass"))
    return whole.hexdigest()[:32]
