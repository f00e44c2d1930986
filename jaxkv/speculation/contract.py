"""What is asked of drafters and rules, compared with what they give.

`jaxkv.policies.contract` does so for policies, and says why.

Axis letters: `B` batch, `T` nodes of a tree.
"""

import jax
import jax.numpy as jnp

from jaxkv.policies.contract import called, fit_type
from jaxkv.policies.fitting import fit
from jaxkv.speculation.drafters import Drafter
from jaxkv.speculation.matching import Context
from jaxkv.speculation.rules import Rule, View
from jaxkv.trees import DraftTree


def draft(drafter: Drafter, context: Context) -> DraftTree:
    """Call `Drafter.draft`."""
    with called(drafter, "draft"):
        tree = drafter.draft(context)
        fit_type(tree, DraftTree)
        shape = (context.text.shape[0], 1 + drafter.num_draft_tokens)
        for name, array in tree._asdict().items():
            dtype = bool if name == "valid" else jnp.int32
            fit(name, array, "B 1+num_draft_tokens", shape, dtype)
    return tree


def passes(rule: Rule, view: View) -> jax.Array:
    """Call `Rule.passes`."""
    with called(rule, "passes"):
        passed = rule.passes(view)
        fit("the result", passed, "B T", view.chosen.shape, bool)
    return passed
