"""Which drafted tokens pass: the exact rule, and rules that let others through.

The exact rule changes nothing: a drafted token passes if it is the token that plain
decoding would have chosen there. The other rules are lossy on purpose: a token that is
likely enough passes although the network would have chosen another.

Axis letters: `B` batch, `T` nodes, `V` vocabulary.
"""

import dataclasses
import math
from typing import Annotated, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from annotated_types import Ge, Le, Lt

Probability = Annotated[float, Ge(0), Le(1)]


class View(NamedTuple):
    """What the network says of each drafted token; float32 `[B, T]` unless noted.

    The root's entries mean nothing.

    Attributes:
      chosen: bool, whether plain decoding chooses this token after the node's parent.
      probability: of the token, after its parent.
      highest: probability of the likeliest token there.
      entropy: of the distribution there, in nats.
      rank: int32, how many tokens are likelier.
      stop: probability of the likeliest stop id there.
      vocabulary: int scalar, `V`.
    """

    chosen: jax.Array
    probability: jax.Array
    highest: jax.Array
    entropy: jax.Array
    rank: jax.Array
    stop: jax.Array
    vocabulary: int


class Rule(Protocol):
    """Says which drafted tokens pass."""

    @property
    def exact(self) -> bool:
        """Whether the output is that of plain decoding.

        If so, `passes` is not asked, and the distributions are not looked at.
        """

    def check(self) -> None:
        """Raise ValueError for options that mean nothing."""

    def passes(self, view: View) -> jax.Array:
        """Return bool `[B, T]`, whether each token passes after its parent."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(Rule):
    """Take what plain decoding takes, greedy or drawn, and nothing else.

    Drafts are deterministic, so one rule serves both: let the sampler pick a token with
    the key of that position, and go on where a drafted token equals the pick.
    """

    exact = True

    def check(self) -> None:
        """There are no options."""

    def passes(self, view: View) -> jax.Array:
        """Return which tokens are the chosen ones."""
        return view.chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedThreshold(Rule):
    """Take a token whose probability reaches a constant.

    Attributes:
      threshold: least probability.
      eos_guard: also ask that no stop id is likelier.
    """

    threshold: Probability = 0.1
    eos_guard: bool = True
    exact = False

    def check(self) -> None:
        """Accept what the annotations accept."""

    def passes(self, view: View) -> jax.Array:
        """Return which tokens are likely enough."""
        return _reaches(view, jnp.full_like(view.entropy, self.threshold), self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditional(Rule):
    """Take a token whose probability reaches a threshold set by the entropy there.

    Wang et al., "Alignment-Augmented Speculative Decoding with Alignment Sampling and
    Conditional Verification" (arXiv 2505.13204). With entropy `h` in nats and the
    highest probability `m`, the threshold is, by `form`:

      * "F1": `min(beta - alpha * h, m)`, as a secondary source writes it;
      * "F2": `min(beta - alpha * h / log(V), m)`;
      * "F3": `min(beta + alpha * h, m)`;
      * "F4": F1 with a larger `beta`, so that the cap `m` can bind.

    The paper's own text was not available to us, so that none of the forms is claimed
    to be its formula. With F1 and its defaults every token passes once `h` >= 1.

    Attributes:
      form: see above.
      alpha: weight of the entropy.
      beta: threshold at certainty; None is 0.1, and 0.5 for F4.
      tau_min: the threshold is never lower.
      eos_guard: also ask that no stop id is likelier.
    """

    form: Literal["F1", "F2", "F3", "F4"] = "F2"
    alpha: Annotated[float, Ge(0), Lt(math.inf)] = 0.1
    beta: Probability | None = None
    tau_min: Probability = 0.0
    eos_guard: bool = True
    exact = False

    def check(self) -> None:
        """Accept what the annotations accept."""

    def passes(self, view: View) -> jax.Array:
        """Return which tokens reach the threshold."""
        return _reaches(view, self.threshold(view), self)

    def threshold(self, view: View) -> jax.Array:
        """Return the threshold at each node's parent, without the guard."""
        beta = self.beta
        if beta is None:
            beta = 0.5 if self.form == "F4" else 0.1
        entropy = view.entropy
        if self.form == "F2":
            entropy = entropy / jnp.log(jnp.float32(view.vocabulary))
        sign = 1 if self.form == "F3" else -1
        threshold = jnp.minimum(beta + sign * self.alpha * entropy, view.highest)
        return jnp.maximum(threshold, self.tau_min)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Rule):
    """Take a token that is among the `k` likeliest.

    Attributes:
      k: how many pass.
    """

    k: Annotated[int, Ge(1)] = 2
    exact = False

    def check(self) -> None:
        """Accept what the annotations accept."""

    def passes(self, view: View) -> jax.Array:
        """Return which tokens are among the likeliest."""
        return view.rank < self.k


@dataclasses.dataclass(frozen=True, kw_only=True)
class Typical(Rule):
    """Take a token likelier than `min(epsilon, delta * exp(-entropy))`.

    Cai et al., "Medusa" (arXiv 2401.10774, section 2.3.1). The likeliest token always
    passes, as there.

    Attributes:
      epsilon: highest threshold.
      delta: scale of the threshold that depends on the entropy.
    """

    epsilon: Probability = 0.09
    delta: Probability = 0.3
    exact = False

    def check(self) -> None:
        """Accept what the annotations accept."""

    def passes(self, view: View) -> jax.Array:
        """Return which tokens are typical."""
        threshold = jnp.minimum(self.epsilon, self.delta * jnp.exp(-view.entropy))
        return (view.probability > threshold) | view.chosen


def _reaches(view, threshold, rule):
    if rule.eos_guard:
        threshold = jnp.maximum(threshold, view.stop)
    return view.probability >= threshold
