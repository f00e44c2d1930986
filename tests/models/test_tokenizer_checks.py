"""What a tokenizer is held against, and how its libraries' errors are told."""

import builtins
import concurrent.futures
import importlib
import logging
import sys
import threading
import time

import pytest
from hf_checkpoints import raises

from jaxkv.models.quiet import quiet_transformers
from jaxkv.models.tokenizer_checks import check, damage_named, one_line


class Wrong:
    """A transformers tokenizer with faults."""

    unk_token_id = None

    def __init__(self, ids=(1,), text="the"):
        self._ids, self._text = ids, text

    def __call__(self, text, add_special_tokens):
        return {"input_ids": self._ids}

    def decode(self, ids):
        return self._text

    def get_vocab(self):
        return {"a": 1}


@pytest.mark.parametrize(
    ("tokenizer", "truth", "words"),
    [
        (Wrong(), dict(encode=lambda text: [2]), ["makes [1] of 'the cat", "says [2]"]),
        (Wrong(), dict(decode=lambda ids: "x"), ["decodes 'x' as 'the'"]),
        (Wrong(), dict(vocabulary={"a": 2}), ["'a' the id 1, but the file 2"]),
        (Wrong(ids=[]), {}, ["reads 'the cat and", "right tokenizer_class"]),
        (Wrong(text="▁the▁cat"), {}, ["reads 'the cat and", "as '▁the▁cat'"]),
        (Wrong(text="thecatand12hats,thentheend."), {}, ["reads 'the cat and"]),
    ],
)
def test_check_refuses(tokenizer, truth, words):
    with raises("here: transformers (Wrong)", *words):
        check(tokenizer, "here", **truth)


def test_check_lets_the_unknown_through():
    tokenizer = Wrong(text="<unk>")
    tokenizer.unk_token_id = 1
    check(tokenizer, "here", vocabulary={"a": 1})


def test_an_interrupt_is_none(tmp_path):
    with pytest.raises(KeyboardInterrupt), damage_named(tmp_path):
        raise KeyboardInterrupt


def test_long_messages_are_cut():
    assert one_line(ValueError("a\n b")) == "a b"
    assert one_line(ValueError("a" * 300)).endswith("a ...")
    assert one_line(ValueError()) == "ValueError"


_REPLACED = """
import sys, time, types
from builtins import started
started.set()
time.sleep(0.2)
whole = types.ModuleType(__name__)
whole.__spec__, whole.is_whole = __spec__, True
sys.modules[__name__] = whole
"""


def test_an_import_of_another_thread_is_waited_for(tmp_path, monkeypatch):
    """While transformers is imported, it puts another module in its place."""
    (tmp_path / "transformers.py").write_text(
        f"from builtins import started{_REPLACED}"
    )
    monkeypatch.setattr(builtins, "started", threading.Event(), raising=False)
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    other = threading.Thread(target=importlib.import_module, args=["transformers"])
    other.start()
    builtins.started.wait()
    with quiet_transformers() as transformers:
        assert transformers.is_whole
    other.join()
    sys.modules.pop("transformers")  # what was there before comes back


def test_one_thread_at_a_time_uses_transformers():
    """They share a log level."""
    within: list[int] = []
    with quiet_transformers():
        pass
    before = logging.getLogger("transformers").level

    def use(_):
        with quiet_transformers() as transformers:
            assert transformers.PreTrainedTokenizerFast
            within.append(1)
            assert len(within) == 1
            time.sleep(0.01)
            within.pop()

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(use, range(8)))
    assert logging.getLogger("transformers").level == before
