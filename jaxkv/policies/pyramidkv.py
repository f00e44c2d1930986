"""PyramidKV: SnapKV with more budget for the lower layers.

Cai et al., arXiv 2406.02069.
"""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge

from jaxkv.policies.snapkv import SnapKV


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """SnapKV with more budget for the lower layers and less for the upper ones.

    Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information
    Funneling" (arXiv 2406.02069, section 4.2), with the integer steps of its code: for
    `c = budget - window_size`, the lowest layer keeps `2 c - c // beta` tokens beside
    the window, the highest about `c // beta`, those between fall in equal steps. Steps
    are rounded down, so that all layers together keep somewhat more than
    `budget x layers`. As in its code, a prompt of fewer than `2 c` tokens is cut to
    `budget` in each layer, and no layer is given more than the prompt has. A budget
    within the window leaves nothing to share out, so it is `budget` in each layer too.

    `budget` is hence the mean over the layers. Layers differ in slots, so a decode
    policy that evicts is refused.

    Attributes:
      window_size: see `SnapKV`.
      kernel_size: see `SnapKV`.
      pooling: see `SnapKV`.
      offset: see `SnapKV`.
      beta: how steep the pyramid is; 1 is flat.
      shares: "code" is what stands above. "kvpress" shares out the whole budget, the
        window with it, and rounds each layer's share to the nearest number: `2 c - c /
        beta` with `c = budget`, at most the prompt without its window; where that would
        leave the highest layer less than the window, each layer keeps `budget`.
    """

    beta: Annotated[int, Ge(1)] = 20
    shares: Literal["code", "kvpress"] = "code"
    same_budgets = False

    @classmethod
    def kvpress(cls, **options) -> "PyramidKV":
        """Return the default of the kvpress library: 64, average pooling by 5."""
        theirs = dict(window_size=64, kernel_size=5, pooling="avg", shares="kvpress")
        return cls(**dict[str, Any](theirs) | options)

    def layer_budgets(self, budget: int, num_layers: int) -> tuple[int, ...]:
        """Bound what `layer_keeps` gives for any prompt and any smaller budget.

        The upper layers need `budget` slots too, for prompts that are kept whole. A
        caller who knows the prompts needs fewer: the maximum of `layer_keeps`.
        """
        within = self.window_size if self.shares == "code" else 0
        free = max(budget - within, 0)
        highest = 2 * free - free // self.beta
        bounds = []
        for layer in range(num_layers):
            slope = max(0.0, 1 - 2 * layer / max(num_layers - 1, 1))
            # Rounding a step down can add `layer` tokens.
            most = free + int((highest - free) * slope) + layer + 1
            bounds.append(max(budget, most + within))
        return tuple(bounds)

    def layer_keeps(self, keep, lengths, num_layers) -> tuple[jax.Array, ...]:
        """Return each layer's budgets, see the class; NumPy in, NumPy out."""
        xp = np if isinstance(keep, np.ndarray) else jnp
        if self.shares == "kvpress":
            return self._nearest(xp, keep, lengths, num_layers)
        # Of a prompt that fits; twice a budget of any size would leave int32.
        most = xp.minimum(keep, lengths)
        free = xp.maximum(most - self.window_size, 0)
        highest = xp.minimum(2 * free - free // self.beta, lengths - self.window_size)
        step = (2 * highest - 2 * free) // max(num_layers - 1, 1)
        flat = (lengths <= keep) | (lengths < 2 * free) | (free == 0)
        return tuple(
            xp.where(flat, keep, highest - layer * step + self.window_size)
            for layer in range(num_layers)
        )

    def _nearest(self, xp, keep, lengths, num_layers):
        """Return each layer's budgets by `shares="kvpress"`."""
        budget, before = (
            x.astype(np.float32)
            for x in (xp.minimum(keep, lengths), lengths - self.window_size)
        )
        steepest = budget / self.beta
        capped = 2 * budget - steepest >= before
        highest = xp.where(capped, before, 2 * budget - steepest)
        lowest = xp.where(capped, 2 * budget - before, steepest)
        slopes = (highest >= lowest) & (lowest >= self.window_size)
        sloping = slopes & (lengths > keep)
        step = (highest - lowest) / max(num_layers - 1, 1)
        return tuple(
            xp.where(sloping, xp.round(highest - layer * step), keep).astype(np.int32)
            for layer in range(num_layers)
        )
