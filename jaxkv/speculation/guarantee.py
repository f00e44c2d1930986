"""What the outputs of a setting have in common with plain decoding's.

In float32 the numbers of two ways to the same token differ by so little that no choice
does, but by chance. In 16 bits they choose differently every hundred tokens or so,
unless both ways do the same sums in the same order; `kernels/README.md` says where.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxkv.kernels import nodes_triton, pointwise, project_triton
from jaxkv.options import Options
from jaxkv.policies.full import Full
from jaxkv.policies.streaming_llm import StreamingLLM

Guarantee = Literal["bit-exact", "exact in float32", "lossy"]


def guarantee(
    config: Any,
    options: Options,
    *,
    rows: int,
    dtype: jax.typing.DTypeLike,
    devices: int = 1,
) -> Guarantee:
    """Return what is promised of an output with drafts.

    Args:
      config: of the network; one without the sizes of `models.decoder.Config` is
        promised no bits.
      options: with a drafter.
      rows: of the batch.
      dtype: of the weights.
      devices: over which a row lies. Over several no bits are promised, since what is
        left of a matrix may be a product of XLA's.

    Returns:
      "bit-exact": the logits and tokens are those of plain decoding of the same batch,
      in any dtype. "exact in float32": the tokens are, but for rounding, which in 16
      bits leads elsewhere sooner or later. "lossy": they are meant to differ.
    """
    if not options.accept.exact:
        return "lossy"
    assert options.speculate is not None
    nodes = 1 + options.speculate.num_draft_tokens
    decode = options.decode_implementation
    decode = decode or options.decode.default_implementation(jax.default_backend())
    same = (
        decode == "triton"
        and devices == 1
        and pointwise.choose(True) == "triton"
        and isinstance(options.decode, Full | StreamingLLM)
        and nodes_triton.takes(rows, nodes, dtype)
        and _same_products(config, rows * nodes, dtype)
    )
    return "bit-exact" if same else "exact in float32"


def _same_products(config, tokens, dtype) -> bool:
    """Return whether all products of so many tokens are those of each alone."""
    hidden = getattr(config, "hidden_size", None)
    inner = getattr(config, "intermediate_size", None)
    if hidden is None or inner is None:
        return False
    if getattr(config, "experts", None) is not None:
        return False  # the router's product is XLA's, which looks at their number
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
    matrices: list[tuple[int, int, dict[str, bool]]] = [
        (hidden, (heads + 2 * kv_heads) * size, {}),
        (heads * size, hidden, {}),
        (hidden, 2 * inner, dict(gated=True)),
        (inner, hidden, {}),
        (hidden, config.vocab_size, dict(vocabulary=True)),
    ]
    return not any(
        project_triton.unsupported(
            jax.ShapeDtypeStruct((tokens, 1, depth), jnp.dtype(dtype)),
            jax.ShapeDtypeStruct((depth, columns), jnp.dtype(dtype)),
            **kind,
        )
        for depth, columns, kind in matrices
    )
