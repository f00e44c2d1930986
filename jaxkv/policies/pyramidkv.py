"""PyramidKV: SnapKV with more budget for the lower layers.

Cai et al., arXiv 2406.02069.
"""

import dataclasses
from typing import Annotated

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
    """

    beta: Annotated[int, Ge(1)] = 20
    same_budgets = False

    def layer_budgets(self, budget: int, num_layers: int) -> tuple[int, ...]:
        """Bound what `layer_keeps` gives for any prompt and any smaller budget.

        The upper layers need `budget` slots too, for prompts that are kept whole. A
        caller who knows the prompts needs fewer: the maximum of `layer_keeps`.
        """
        free = max(budget - self.window_size, 0)
        highest = 2 * free - free // self.beta
        bounds = []
        for layer in range(num_layers):
            slope = max(0.0, 1 - 2 * layer / max(num_layers - 1, 1))
            # Rounding a step down can add `layer` tokens.
            most = free + int((highest - free) * slope) + layer + 1
            bounds.append(max(budget, most + self.window_size))
        return tuple(bounds)

    def layer_keeps(self, keep, lengths, num_layers) -> tuple[jax.Array, ...]:
        """Return each layer's budgets, see the class; NumPy in, NumPy out."""
        xp = np if isinstance(keep, np.ndarray) else jnp
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
