"""How safetensors are read: each tensor once, one at a time, after all headers."""

import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
from hf_checkpoints import EMBEDDING, MODEL, raises, write_checkpoint
from safetensors.numpy import save_file

from jaxkv.models.hf import weights as hf_weights
from jaxkv.models.hf.weights import read_weights


def test_a_failing_read_names_the_tensor(tmp_path, monkeypatch):
    config, _ = write_checkpoint(tmp_path)
    spy(monkeypatch, lambda name: (_ for _ in ()).throw(OSError("disk")))
    with raises(MODEL, EMBEDDING, "cannot be read (disk)"):
        read_weights(tmp_path, config, dtype=None)


def spy(monkeypatch, before_read, after_read=lambda array: array):
    """Call the hooks around every read of a tensor."""
    real = hf_weights.safe_open

    class Spy:
        def __init__(self, *args, **options):
            self._real = real(*args, **options)

        def __enter__(self):
            self._file = self._real.__enter__()
            return self

        def __exit__(self, *args):
            return self._real.__exit__(*args)

        def get_tensor(self, name):
            before_read(name)
            return after_read(self._file.get_tensor(name))

        def __getattr__(self, name):
            return getattr(self._file, name)

    monkeypatch.setattr(hf_weights, "safe_open", Spy)


def test_tensors_are_read_once_and_one_at_a_time(tmp_path, monkeypatch):
    """No host copy of a tensor is alive when the next one is read."""
    config, tensors = write_checkpoint(tmp_path, "bfloat16")
    read, alive = [], weakref.WeakSet()

    class Watched(np.ndarray):
        __hash__ = object.__hash__

    def watch(array):
        array = array.view(Watched)
        alive.add(array)
        return array

    def check(name):
        read.append(name)
        assert not alive

    spy(monkeypatch, check, watch)
    read_weights(tmp_path, config, dtype="float32")
    assert sorted(read) == sorted(tensors)


PEAK = """
import sys
from jaxkv.models.hf import weights as hf_weights
from jaxkv.models.config import Config
from jaxkv.models.rope import Rope

def used():  # memory that is not a mapped file, in bytes
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])

def join(parts, *more):
    samples.append(used())
    array = real(parts, *more)
    samples.append(used())
    return array

real, hf_weights._join, samples = hf_weights._join, join, []
tiny, large = (eval(config) for config in sys.argv[3:])
hf_weights.read_weights(sys.argv[1], tiny, dtype=None)  # starts the backend
start = used()
params = hf_weights.read_weights(sys.argv[2], large, dtype=None)
print(max(*samples, used()) - start)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_peak_memory_is_the_weights_and_little_more(tmp_path):
    """In a new process, where no freed memory of other tests hides the growth."""
    folders = tmp_path / "tiny", tmp_path / "large"
    for folder in folders:
        folder.mkdir()
    tiny, _ = write_checkpoint(folders[0])
    large, tensors = write_checkpoint(
        folders[1], hidden_size=512, intermediate_size=1024, num_layers=24
    )
    total = sum(tensor.nbytes for tensor in tensors.values())
    run = subprocess.run(
        [sys.executable, "-c", PEAK, *folders, repr(tiny), repr(large)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,  # elsewhere, or a folder `jaxkv` there would be imported
    )
    assert run.returncode == 0, run.stderr
    assert 0.95 * total < int(run.stdout) < 1.6 * total


def test_headers_are_checked_before_anything_is_read(tmp_path, monkeypatch):
    config, tensors = write_checkpoint(tmp_path)
    tensors["model.norm.weight"] = np.ones(9, np.float32)
    save_file(tensors, tmp_path / MODEL)
    spy(monkeypatch, lambda name: pytest.fail(f"{name} was read"))
    with raises("model.norm.weight"):
        read_weights(tmp_path, config, dtype=None)
