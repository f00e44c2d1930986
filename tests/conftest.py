"""Flags, seeds and fixtures of all tests."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import itertools
import random
import sys
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest

jax.config.update("jax_enable_x64", False)

# Tests may import the modules beside them, also where pytest imports by path.
sys.path.append(str(Path(__file__).parent))

hypothesis.settings.register_profile(
    "jaxkv",
    deadline=None,  # the first example of a shape compiles
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("jaxkv"), derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "jaxkv")


def pytest_configure(config):
    """Turn warnings about our own code into errors; those of others stay warnings."""
    config.addinivalue_line("filterwarnings", r"error:::jaxkv(\..*)?$")


def pytest_runtest_setup(item):
    """Skip tests marked `gpu` where JAX runs on something else."""
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU; on a machine with one, set JAX_PLATFORMS=cuda,cpu")


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Seed the global generators; transformers draws weights from torch's."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def getkey():
    """Return a function that hands out a fresh PRNG key at each call."""
    seeds = itertools.count()
    return lambda: jax.random.key(next(seeds))
