"""KeyDiff, by hand."""

import jax.numpy as jnp
import numpy as np
from prompts_by_hand import ONES, kept, prompt_of

from jaxkv import KeyDiff


def test_keydiff_keeps_the_odd_directions():
    """Of one head: to the right, however long; up; between; and padding to the left.

    The anchor of the first five points right of the diagonal, so that the one that
    points up is the least like it. The padding counts not, until it is of the prompt.
    """
    arrows = jnp.asarray([[1.0, 0], [5, 0], [0, 2], [1, 1], [9, 0], [-1, 0]])
    prompt = prompt_of(np.ones((6, 1)), np.ones((6, 1)), lengths=5)
    prompt = prompt._replace(keys=arrows[None, :, None])
    got = KeyDiff().scores(prompt)[0, 0]
    anchor = np.array([3 + np.sqrt(0.5), 1 + np.sqrt(0.5)])
    anchor /= np.linalg.norm(anchor)
    want = [-anchor[0], -anchor[0], -anchor[1], -anchor.sum() * np.sqrt(0.5)]
    np.testing.assert_allclose(got[:4], want, rtol=1e-6)
    assert kept(KeyDiff(), prompt) == [[0, 2]]  # equal ones: the first
    whole = prompt._replace(lengths=jnp.asarray([6], jnp.int32))
    assert kept(KeyDiff(), whole) == [[2, 5]]


def test_a_key_of_zeros_has_a_score():
    prompt = prompt_of(ONES, np.zeros((5, 2)))
    assert np.isfinite(KeyDiff().scores(prompt)).all()
