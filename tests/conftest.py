"""Flags, seeds and fixtures of all tests."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Nothing is promoted or broadcast in silence, here and in the processes of tests.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

import contextlib
import dataclasses
import importlib.metadata
import itertools
import random
import signal
import sys
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest

from jaxkv.runtime.programs import memory_maps, memory_maps_allowed

jax.config.update("jax_enable_x64", False)

ON_CPU = os.environ["JAX_PLATFORMS"] == "cpu"
# Tests compile thousands of programs and run each for a moment, so that compiling is
# what costs. XLA reads this when JAX starts; so do the processes that tests start.
QUICK_TO_COMPILE = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",  # one module, not one per core
]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # gone in newer ones
    QUICK_TO_COMPILE.append("--xla_cpu_use_fusion_emitters=false")
if ON_CPU:
    own = os.environ.get("XLA_FLAGS", "")  # a flag given by hand comes last and wins
    os.environ["XLA_FLAGS"] = " ".join([*QUICK_TO_COMPILE, own])

# Each compiled program maps some memory, and a process that asks for more maps than it
# may have ends in a segmentation fault. No test comes near it.
MOST_MAPS = min(memory_maps_allowed() or 65_530, 65_530) // 4

# Of a test, many times what it takes; the machine may be shared.
MOST_SECONDS = {"fast": 240, "slow": 1500}

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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Share the whole suite among workers; files and folders by name, and GPUs, not."""
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    return min(os.cpu_count() or 1, 8) if whole and ON_CPU else 0


def pytest_runtest_setup(item):
    """Skip tests marked `gpu` where JAX runs on something else."""
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a GPU; on a machine with one, set JAX_PLATFORMS=cuda,cpu")


@contextlib.contextmanager
def ends_within(seconds: float, where: str):
    """Fail where the main thread is, if it is here for longer.

    No `except Exception` catches it; it comes again where something does.
    """

    def late(*_):
        pytest.fail(f"{where} has not ended within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fail a test that does not end: a loop that waits for ever, a lost wake-up."""
    seconds = MOST_SECONDS["slow" if item.get_closest_marker("slow") else "fast"]
    with ends_within(seconds, item.nodeid):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    """Fail where what a test has started does not end."""
    with ends_within(MOST_SECONDS["fast"], f"what {item.nodeid} has started"):
        return (yield)


def check_maps(where: str, maps: int, most: int = MOST_MAPS) -> None:
    """Raise where a test has left more memory maps than a run can afford."""
    if maps > most:
        raise RuntimeError(
            f"{maps} memory maps after {where}, more than {most}: split the test, "
            "or let go of what it has compiled"
        )


@pytest.fixture(scope="module", autouse=True)
def patched_programs_are_let_go(request):
    """Let go of what was compiled where tests of a module replace functions.

    A compiled program stays what it was, whatever is put back. Those of other modules
    stay for the next ones.
    """
    yield
    tests = (item for item in request.session.items if item.path == request.path)
    if any("monkeypatch" in getattr(item, "fixturenames", ()) for item in tests):
        jax.clear_caches()


@pytest.fixture(autouse=True)
def maps_are_bounded(request):
    """Let go of all programs where there are many, and fail if a test has more."""
    yield
    maps = memory_maps() or 0
    if maps > MOST_MAPS // 2:
        jax.clear_caches()
    check_maps(request.node.nodeid, maps)


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


class CommandLine:
    """Runs the command line in this process."""

    def __init__(self, capsys):
        self._capsys = capsys

    def __call__(self, *arguments):
        """Return exit code, stdout and stderr."""
        from jaxkv.cli import main as cli

        code = cli.main(["--no-compilation-cache", *map(str, arguments)])
        return code, *self._capsys.readouterr()

    def error(self, *arguments) -> str:
        """Return the one line on stderr that bad input must give, and nothing else."""
        code, out, err = self(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("jaxkv: error: ")
        assert err.count("\n") == 1 and err.endswith("\n")
        assert "Traceback" not in err
        return err


@pytest.fixture
def jaxkv_(capsys):
    return CommandLine(capsys)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with random weights and the tokenizer of needle."""
    from tiny import CONFIG

    from jaxkv.language_model import needle_folder
    from jaxkv.models.decoder import random_parameters
    from jaxkv.models.hf.export import write_qwen3

    config = dataclasses.replace(CONFIG, vocab_size=4096, max_positions=2048)
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    params = random_parameters(config, jax.random.key(0), dtype=jax.numpy.float32)
    tokenizer = sorted(needle_folder().glob("*token*.json"))
    ids = {"bos_id": 0, "stop_ids": [1], "pad_id": 2}
    write_qwen3(params, config, folder, extra_files=tokenizer, **ids)
    return folder


@pytest.fixture(scope="session")
def tiny_lm(tiny):
    import jaxkv

    return jaxkv.load(tiny)


@pytest.fixture(scope="session")
def wide_lm(tiny_lm):
    """The same with weights so wide that its outputs depend on all that it has read."""
    params = jax.tree.map(lambda x: 12 * x if x.ndim == 2 else x, tiny_lm.params)
    return dataclasses.replace(tiny_lm, params=params)
