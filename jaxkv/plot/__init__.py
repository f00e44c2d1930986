"""Pictures of caches, scores, results and drafts; each function returns a figure.

They need matplotlib (extra `plot`), which is imported at the call. A figure is shown by
a notebook as the last value of a cell, and written by its `savefig`.
"""

from jaxkv.plot.curves import Curve, Panel, against_budget, against_position
from jaxkv.plot.drafts import accepted_nodes, draft_tree
from jaxkv.plot.heat import heat_maps
from jaxkv.plot.survival import kept, survival
from jaxkv.plot.words import coloured_text, shaded_text

__all__ = [
    "Curve",
    "Panel",
    "accepted_nodes",
    "against_budget",
    "against_position",
    "coloured_text",
    "draft_tree",
    "heat_maps",
    "kept",
    "shaded_text",
    "survival",
]
