"""What a layer's attention does beside scaling its logits."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighing:
    """How a layer weighs tokens, beside the scale of its logits.

    Attributes:
      window: how many tokens each token attends to, itself the last; None is all.
    """

    window: int | None = None


PLAIN = Weighing()
