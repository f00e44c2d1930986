"""The suite itself: quick to compile, and bounded in what it keeps."""

import mmap
import os
import signal
import threading
import time

import conftest
import pytest


def test_memory_maps_are_counted():
    before = conftest.memory_maps()
    if before is None:
        pytest.skip("no /proc here")
    # Neighbours with the same rights would be one map.
    held = [
        mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | (i % 2) * mmap.PROT_WRITE)
        for i in range(40)
    ]
    assert conftest.memory_maps() > before + 10
    with pytest.raises(RuntimeError, match="memory maps after a test, more than 10"):
        conftest.check_maps("a test", 11, most=10)
    conftest.check_maps("a test", before)
    del held


@pytest.mark.skipif(not conftest.ON_CPU, reason="the flags are those of the CPU")
def test_programs_are_compiled_quickly():
    flags = os.environ["XLA_FLAGS"].split()
    assert set(conftest.QUICK_TO_COMPILE) <= set(flags)


def test_what_does_not_end_is_ended():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(
        pytest.fail.Exception, match=r"a test has not ended within 0\.05 s"
    ):
        with conftest.ends_within(0.05, "a test"):
            threading.Event().wait()
    with conftest.ends_within(0.05, "a test"):
        pass
    time.sleep(0.06)
    assert signal.getsignal(signal.SIGALRM) is before


def test_every_test_is_ended():
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    assert 0 < left <= conftest.MOST_SECONDS["fast"]
