"""Programs that are let go of: which, when, and that results are none the worse."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import BY_HAND, language_model, parameters

import jaxkv
from jaxkv.runtime import programs
from jaxkv.runtime.programs import Shelf, bounded_jit, memory_maps
from jaxkv.text.stopwatch import stopwatch

SMALLEST = dataclasses.replace(BY_HAND, max_positions=256)


@pytest.fixture
def shelf():
    return Shelf(most=3, most_maps=None, least=1)


@pytest.fixture
def times(shelf):
    """A program with an option, and a count of its traces."""

    @bounded_jit(shelf=shelf, static_argnames=("factor",))
    def times(x, *, factor):
        times.traces += 1
        return {name: factor * leaf for name, leaf in x.items()}

    times.traces = 0
    return times


@pytest.fixture(scope="module")
def lm():
    return language_model(config=SMALLEST, weights=parameters(SMALLEST))


def test_what_is_known_compiles_nothing(times):
    for x in (jnp.ones(3), np.ones(3, np.float32), jnp.zeros(3)):
        got = times({"a": x}, factor=2)["a"]
        assert isinstance(got, jax.Array) and got.tolist() == (2 * x).tolist()
    assert times.traces == 1


def test_without_jit_functions_see_what_they_see_with_it(shelf):
    seen = []

    @bounded_jit(shelf=shelf, static_argnames=("option",))
    def look(x, y, *, option):
        seen.append((option, *[(a.dtype, a.weak_type) for a in (*x, y)]))
        assert all(isinstance(a, jax.Array) for a in (*x, y))
        return y

    host = np.arange(2)
    for context in (contextlib.nullcontext(), jax.disable_jit()):
        with context:
            look((host, np.float64(1)), 3, option=(host.shape, 7))
    assert seen[0] == seen[1]


def test_what_was_compiled_ahead_is_what_is_called(times, shelf):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        sizes = [
            pool.submit(times.compile, {"a": jnp.ones(n)}, factor=2) for n in (3, 4)
        ]
        assert all(size.result().memory_analysis() for size in sizes)
    with stopwatch() as lap:
        got = times({"a": jnp.ones(3)}, factor=2)["a"]
        assert lap().compiling == 0
    assert got.tolist() == [2, 2, 2] and times.traces == len(shelf) == 2


def test_each_shape_type_structure_and_option_has_a_program(times, shelf):
    shelf.most = 9
    a = jnp.ones(3)
    others = [
        ({"a": jnp.ones(4)}, 2),
        ({"a": jnp.ones(3, int)}, 2),
        ({"b": a}, 2),
        ({"a": a}, 3),
    ]
    for x, factor in [({"a": a}, 2), *others]:
        times(x, factor=factor)
    assert times.traces == len(shelf) == 5


def test_the_least_recently_used_goes_first(times, shelf):
    def call(size):
        before = times.traces
        times({"a": jnp.ones(size)}, factor=2)
        return times.traces - before

    assert [call(size) for size in (1, 2, 3, 1, 4)] == [1, 1, 1, 0, 1]  # 2 has gone
    assert [call(size) for size in (1, 3, 4, 2)] == [0, 0, 0, 1]
    assert len(shelf) == 3
    shelf.clear()
    assert call(4) == 1


@pytest.mark.skipif(memory_maps() is None, reason="nothing tells memory maps here")
def test_maps_let_go_of_all_but_a_few(times, shelf):
    """Those of others count, too; a few programs stay, whatever the others do."""
    shelf.most, shelf.most_maps, shelf.least = 99, memory_maps() + 10_000, 2
    for size in range(1, 9):
        times({"a": jnp.ones(size)}, factor=2)
    assert len(shelf) == 8
    shelf.most_maps = memory_maps() // 2
    times({"a": jnp.ones(99)}, factor=2)
    assert len(shelf) == 3
    assert times.traces == 9


@pytest.mark.skipif(memory_maps() is None, reason="nothing tells memory maps here")
def test_a_program_that_is_let_go_of_gives_its_maps_back(times, shelf):
    shelf.most = 1
    counts = []
    for size in range(1, 30):
        times({"a": np.ones(size, np.float32)}, factor=2)
        counts.append(memory_maps())
    assert counts[-1] - counts[3] < 15


def test_nothing_is_counted_where_nothing_tells(times, shelf, monkeypatch):
    shelf.most, shelf.most_maps = 4, 1
    monkeypatch.setattr(programs, "memory_maps", lambda: None)
    for size in range(1, 9):
        times({"a": jnp.ones(size)}, factor=2)
    assert len(shelf) == 4
    assert programs._half_of(None) is None
    assert programs._half_of(65_530) == 32_765


def test_programs_see_what_jax_tells_apart(times):
    """The same shapes on another device, or in another context, run rightly."""
    x = {"a": jnp.ones(3)}
    times(x, factor=2)
    with jax.enable_x64(True):
        assert times({"a": np.ones(3, int)}, factor=2)["a"].dtype == jnp.int64
    assert times({"a": np.ones(3, int)}, factor=2)["a"].dtype == jnp.int32
    mesh = jax.make_mesh((1,), ("model",))
    with jax.set_mesh(mesh):
        where = jax.NamedSharding(mesh, jax.P("model"))
        got = times({"a": jax.device_put(jnp.ones(3), where)}, factor=2)["a"]
    assert got.sharding.is_equivalent_to(where, 1)


def test_threads_share_a_shelf(times, shelf):
    shelf.most = 2
    sizes = list(range(1, 7)) * 8
    wrong = []

    def work(first):
        for size in sizes[first:] + sizes[:first]:
            got = times({"a": jnp.full(size, 7.0)}, factor=3)["a"]
            if got.tolist() != [21.0] * size:
                wrong.append(size)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(shelf) == 2


def test_lowering_keeps_nothing(times, shelf):
    lowered = times.lower({"a": jnp.ones(3)}, factor=2)
    assert lowered.compile()({"a": jnp.ones(3)})["a"].tolist() == [2.0] * 3
    assert len(shelf) == 0


@pytest.mark.skipif(memory_maps() is None, reason="nothing tells memory maps here")
def test_a_long_life_has_few_maps(lm, monkeypatch):
    """Many shapes of `generate` take no more maps than its newest programs do."""

    def run(rows, prompt, new, budget):
        ids = np.random.default_rng(prompt).integers(0, 10, (rows, prompt)).tolist()
        out = jaxkv.generate(
            lm, ids, max_new_tokens=new, budget=budget, prefill=jaxkv.KNorm()
        )
        return out.tokens

    first, *others = itertools.product((1, 2), (50, 90), (3, 70), (20, 70))
    want = run(*first)
    most = memory_maps() + 200
    monkeypatch.setattr(programs.SHELF, "most_maps", most)
    monkeypatch.setattr(programs.SHELF, "least", 1)
    counts = []
    for call in others:
        run(*call)
        counts.append(memory_maps())
    assert max(counts) < most + 150, counts  # those of one call come on top
    assert run(*first) == want
