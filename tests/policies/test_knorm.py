"""KNorm, by hand."""

from prompts_by_hand import KEYS, ONES, kept, prompt_of

from jaxkv import KNorm


def test_knorm_keeps_small_keys():
    assert kept(KNorm(), prompt_of(ONES, KEYS)) == [[0, 2], [1, 3]]
