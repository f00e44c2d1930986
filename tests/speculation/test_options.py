"""What speculation goes with, and what it says where it does not."""

import pytest

from jaxkv import (
    Categorical,
    Full,
    Greedy,
    LongFlow,
    Options,
    StreamingLLM,
    TOVADecode,
)
from jaxkv.speculation.drafters import Aligned, Tree
from jaxkv.speculation.rules import Conditional, TopK


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(accept=Conditional()), "does nothing without drafts"),
        (Options(speculate=Tree(depth=0)), "depth must be at least 1"),
        (Options(speculate=Tree(), accept=TopK(k=0)), "k must be at least 1"),
        (
            Options(speculate=Tree(), budget=20, decode=TOVADecode()),
            r"TOVADecode\(.*\) cannot verify drafts",
        ),
        (
            Options(speculate=Tree(), budget=20, decode=LongFlow(interval=4)),
            "interval 1",
        ),
        (
            Options(speculate=Tree(), budget=20, decode=LongFlow(score="deletion")),
            "any score but deletion",
        ),
        (
            Options(speculate=Tree(), accept=TopK(), sampler=Categorical()),
            "TopK is lossy, and defined for greedy",
        ),
        (
            Options(
                speculate=Tree(), accept=TopK(), sampler=Greedy(repetition_penalty=1.1)
            ),
            "without a repetition penalty",
        ),
        (
            Options(speculate=Tree(), budget=10, decode=StreamingLLM()),
            "a path of 11 tokens does not fit into the 10 slots",
        ),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        options.check()


def test_options_that_go_together():
    Options(speculate=Tree(), sampler=Categorical(repetition_penalty=1.2)).check()
    Options(speculate=Tree(), budget=11, decode=StreamingLLM()).check()
    Options(speculate=Tree(), budget=5, decode=Full(), prefill=StreamingLLM()).check()
    Options(speculate=Aligned(), accept=Conditional()).check()
