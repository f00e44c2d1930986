"""Programs on disk: that they are found again, and whose folder is used."""

import os
import threading

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxkv.runtime.compilation_cache import enable_compilation_cache

DIRECTORY = "jax_compilation_cache_dir"
OPTIONS = (
    DIRECTORY,
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture(autouse=True)
def options(monkeypatch, tmp_path):
    """JAX's options as they are at first, put back afterwards."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    jax.config.update(DIRECTORY, None)
    compilation_cache.reset_cache()  # of a test before, which had a folder
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def hits():
    """A list that gets an entry whenever this thread finds a program on disk."""
    found = []
    mine = threading.get_ident()  # a test before may have left one that compiles

    def listen(event, **_):
        if event.endswith("/cache_hits") and threading.get_ident() == mine:
            found.append(event)

    jax.monitoring.register_event_listener(listen)
    yield found
    jax.monitoring.unregister_event_listener(listen)


def compile_one(size):
    """Compile and run a program that no cache in memory holds."""
    jax.jit(lambda x: x * 3 + size)(jnp.ones(size))


def test_a_program_is_found_again(tmp_path, hits):
    """Also where JAX has compiled, and looked for no folder, before."""
    compile_one(5)
    folder = enable_compilation_cache()
    assert folder == tmp_path / "home" / "jaxkv" / "programs"
    compile_one(5)
    assert any(folder.glob("*-cache")) and not hits
    compile_one(5)
    assert hits


def test_the_folder_is_bounded(tmp_path):
    folder = tmp_path / "programs"
    assert enable_compilation_cache(folder, most_bytes=6_000) == folder
    for size in range(1, 12):
        compile_one(size)
    sizes = [path.stat().st_size for path in folder.glob("*-cache")]
    assert 0 < sum(sizes) <= 6_000
    assert len(sizes) < 11


def test_what_a_process_left_unfinished_is_dropped(tmp_path):
    folder = enable_compilation_cache(tmp_path, most_bytes=10**6)
    compile_one(3)
    whole = set(folder.iterdir())
    (folder / "jit_f-abc-cache").write_bytes(b"half")
    enable_compilation_cache(tmp_path)
    assert set(folder.iterdir()) == whole


def test_a_users_own_folder_is_left_alone(tmp_path):
    theirs = tmp_path / "theirs"
    jax.config.update(DIRECTORY, str(theirs))
    limits = [getattr(jax.config, name) for name in OPTIONS]
    assert enable_compilation_cache() == theirs
    assert [getattr(jax.config, name) for name in OPTIONS] == limits
    assert not (tmp_path / "home").exists()
    assert enable_compilation_cache(tmp_path / "named") == tmp_path / "named"
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "named")


@pytest.mark.parametrize("how", ["no folder", "no permission", "no home"])
def test_a_home_that_cannot_be_written(tmp_path, monkeypatch, how):
    if how == "no folder":
        (tmp_path / "home").write_text("")
    elif how == "no permission":  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda *_: False)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(
            "pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home"))
        )
    assert enable_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir is None
    if how != "no home":
        with pytest.raises(OSError, match=r"home"):
            enable_compilation_cache(tmp_path / "home" / "named")


@pytest.mark.parametrize("most_bytes", [0, -1, 0.5, "1 GB", True])
def test_a_bad_size_is_named(tmp_path, most_bytes):
    with pytest.raises(ValueError, match=r"most_bytes is the size .*, got"):
        enable_compilation_cache(tmp_path / "new", most_bytes=most_bytes)
    assert not (tmp_path / "new").exists()
