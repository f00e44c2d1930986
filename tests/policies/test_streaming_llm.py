"""StreamingLLM, by hand."""

import numpy as np
from prompts_by_hand import KEYS, ONES, kept, prompt_of
from tiny import prompts

from jaxkv import Options, StreamingLLM
from jaxkv.laws.programs import NEW, PROMPT, generate


def test_streaming_llm_by_hand():
    assert kept(StreamingLLM(n_sink=1), prompt_of(ONES, KEYS, keep=3)) == [
        [0, 3, 4],
        [0, 3, 4],
    ]


def test_streaming_llm_keeps_sinks_and_recent_ones():
    options = Options(budget=12, prefill=StreamingLLM(), decode=StreamingLLM())
    tokens, lengths = prompts(0, [PROMPT, 9, 3], PROMPT)
    cache = generate(options, tokens, lengths).cache
    for row, length in enumerate([PROMPT, 9, 3]):
        end = length + NEW - 1
        wanted = sorted({*range(4), *range(end - 8, end)})
        for state in cache:
            for head in np.asarray(state.positions)[row]:
                assert sorted(head.tolist()) == wanted
