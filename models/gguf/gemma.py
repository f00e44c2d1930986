"""What GGUF files of Gemma 2 and 3 say, and what llama.cpp knows of them without keys.

Their tensors hold 1 + weight of each norm.
"""

import dataclasses
from typing import Any

from jaxkv.models.config import LayerKind
from jaxkv.models.gguf.keys import Keys
from jaxkv.models.rope import Rope

KEYS = frozenset(
    "attn_logit_softcapping final_logit_softcapping rope.freq_base_swa".split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma:
    """What one of the two is.

    Attributes:
      period: every so many layers one has no window.
      largest: layers of the largest network, whose queries are scaled by the hidden
        size's share of a head.
      caps: bounds of the attention's and the network's logits where no key says them.
      local: base of the rotation in layers with a window; None is that of the others.
    """

    period: int
    largest: int
    caps: tuple[float | None, float | None] = (None, None)
    local: float | None = None


GEMMA2 = Gemma(period=2, largest=46, caps=(50.0, 30.0))
GEMMA3 = Gemma(period=6, largest=62, local=10_000.0)


def switches(
    gemma: Gemma,
    keys: Keys,
    hidden_size: int,
    num_heads: int,
    head_dim: int,
    layers: int,
) -> dict[str, Any]:
    """Return the switches of `Config` that keys and sizes decide.

    Args:
      gemma: which one it is.
      keys: of its architecture.
      hidden_size: of the network.
      num_heads: of the network.
      head_dim: of the network.
      layers: of the network.

    Raises:
      CheckpointError: a value is damaged, or the network does not compute it.
    """
    names = "attn_logit_softcapping", "final_logit_softcapping"
    if gemma.caps[0] is None:
        keys.refuse(names[0], 0)
    caps = [
        usual if keys.raw.get(name) in (None, 0) else keys.number(name)
        for name, usual in zip(names, gemma.caps, strict=True)
    ]
    share = hidden_size // num_heads if layers == gemma.largest else head_dim
    return dict(
        embedding_scale=hidden_size**0.5,
        query_scale=share**-0.5,
        attention_cap=caps[0],
        logit_cap=caps[1],
    )


def kinds(
    gemma: Gemma, keys: Keys, rope: Rope, *, max_positions: int, layers: int
) -> tuple[LayerKind, ...]:
    """Return what each layer's attention does.

    Args:
      gemma: which one it is.
      keys: of its architecture.
      rope: of the layers without a window.
      max_positions: of the network, in tokens. A window that is not shorter is none.
      layers: of the network.
    """
    # llama.cpp has a default for Gemma 2 alone.
    usual = 4096 if gemma.local is None else None
    window: int | None = keys.integer("attention.sliding_window", usual)
    if window is not None and window >= max_positions:
        window = None
    local = rope
    if gemma.local is None:
        keys.refuse("rope.freq_base_swa", rope.theta)
    else:
        local = Rope(theta=keys.number("rope.freq_base_swa", gemma.local))
    sliding, whole = LayerKind(rope=local, window=window), LayerKind(rope=rope)
    return tuple(
        sliding if layer % gemma.period else whole for layer in range(1, layers + 1)
    )
