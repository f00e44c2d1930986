"""Compiled programs, of which a process keeps the ones that it used last.

`jax.jit` keeps all that it has compiled. On a CPU each program takes memory maps, and
Linux gives a process 65,530 of them (`vm.max_map_count`): beyond, it cannot compile, or
ends in a segmentation fault. So `bounded_jit` gives each set of static options and
shapes a `jax.jit` of its own, and drops the one that was used longest ago when there
are too many. JAX frees what was compiled with the last reference to it; a program that
still runs, or that another thread is about to call, has one.
"""

import collections
import functools
import inspect
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxkv.runtime.collectives import compiler_options
from jaxkv.runtime.meshes import mesh_of, under

R = TypeVar("R")


def memory_maps() -> int | None:
    """Return how many memory maps this process has, None where nothing tells."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return None


def memory_maps_allowed() -> int | None:
    """Return how many it may have, None where nothing tells."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


class Shelf:
    """The programs of a process by what they were compiled for; threads share it.

    Attributes:
      most: programs that are kept, whatever they take.
      most_maps: memory maps of the whole process beyond which programs go earlier, or
        None where maps are not counted.
      least: programs that are kept, however many maps the process has: others may
        have made them.
    """

    def __init__(self, *, most: int, most_maps: int | None, least: int = 8):
        self.most, self.most_maps, self.least = most, most_maps, least
        self._programs: collections.OrderedDict[Hashable, Any] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return how many programs there are."""
        return len(self._programs)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the program of this key; make it, and room for it, if it is new."""
        with self._lock:
            if key in self._programs:
                self._programs.move_to_end(key)
                return self._programs[key]
            self._make_room()
            return self._programs.setdefault(key, make())

    def clear(self) -> None:
        """Drop all programs."""
        with self._lock:
            self._programs.clear()

    def _make_room(self) -> None:
        """Drop the programs that were used longest ago, until one more is fine."""
        while len(self._programs) >= self.most:
            self._programs.popitem(last=False)
        if self.most_maps is None:
            return
        while len(self._programs) > self.least:
            maps = memory_maps()
            if maps is None or maps <= self.most_maps:
                return
            # Several at a time, because it takes a while to count so many maps.
            spare = len(self._programs) - self.least
            for _ in range((spare + 3) // 4):
                self._programs.popitem(last=False)


def _half_of(maps: int | None) -> int | None:
    return None if maps is None else maps // 2


SHELF = Shelf(most=64, most_maps=_half_of(memory_maps_allowed()))


class Program(Generic[R]):
    """A function that is compiled for each set of options and shapes, as `jax.jit`'s.

    Its programs stand on a shelf. One of them holds whatever `jax.jit` tells apart
    beside options and shapes: shardings, devices, meshes, `jax.enable_x64`. What XLA is
    told of a mesh (`collectives`) makes two of them.
    """

    def __init__(
        self,
        function: Callable[..., R],
        shelf: Shelf,
        implied: tuple[str, ...],
        **options: Any,
    ):
        functools.update_wrapper(self, function)
        self._function, self._shelf, self._options = function, shelf, options
        self._names = tuple(inspect.signature(function).parameters)
        self._static: tuple[str, ...] = tuple(options["static_argnames"])
        self._implied = implied

    def __call__(self, *args: Any, **kwargs: Any) -> R:
        """Call the program of these arguments."""
        key, mesh = self._known(args, kwargs)
        with under(mesh):
            return self._program(key)(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> jax.stages.Compiled:
        """Compile for these arguments, and run nothing; threads may share the work."""
        key, mesh = self._known(args, kwargs)
        with under(mesh):
            # JAX calls what was lowered before; `tests/runtime` holds it to that.
            return self._program(key).lower(*args, **kwargs).compile()

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """Trace and lower as `jax.jit(...).lower` does; nothing is kept."""
        key, mesh = self._known(args, kwargs)
        with under(mesh):
            return self._fresh(key[-1]).lower(*args, **kwargs)

    def key(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return what the program of these arguments is known by."""
        return self._known(args, kwargs)[0]

    def _known(self, args: tuple, kwargs: dict) -> tuple[tuple[Any, ...], Mesh | None]:
        """Return what the program of these arguments is known by, and their mesh.

        What XLA is told of it stands last.
        """
        named = dict(zip(self._names, args, strict=False)) | kwargs
        static = tuple(named.pop(name, None) for name in self._static)
        mesh = mesh_of([named.pop(name, None) for name in self._implied])
        leaves, tree = jax.tree.flatten(named)
        shapes = tuple(
            (leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else type(leaf)
            for leaf in leaves
        )
        return (self, static, tree, shapes, compiler_options(mesh)), mesh

    def _program(self, key: tuple[Any, ...]) -> Any:
        """Return the program of a key; it is made if it is new."""
        return self._shelf.get(key, functools.partial(self._fresh, key[-1]))

    def _of_jax(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Return arguments with JAX's arrays for NumPy's, as `jax.jit` has them."""
        named = dict(zip(self._names, args, strict=False)) | kwargs
        arrays = {k: v for k, v in named.items() if k not in self._static}
        named |= jax.tree.map(jnp.asarray, arrays)
        return (), named

    def _fresh(self, told: tuple[tuple[str, str], ...]) -> Any:
        """Return a `jax.jit` that shares no program with any other."""
        function = self._function

        def alone(*args, **kwargs):
            if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
                args, kwargs = self._of_jax(args, kwargs)
            return function(*args, **kwargs)

        # JAX's caches know a function by its identity, and a program by its name.
        return jax.jit(
            functools.update_wrapper(alone, function),
            compiler_options=dict(told) or None,
            **self._options,
        )


def bounded_jit(
    *, shelf: Shelf = SHELF, implied: tuple[str, ...] = (), **options: Any
) -> Callable[[Callable[..., R]], Program[R]]:
    """Return a decorator like `jax.jit` whose programs are let go of.

    Args:
      shelf: where they stand.
      implied: names of arguments whose shapes follow from what is static, as those of
        parameters follow from the network. They are many, and not looked at. Where
        they are laid out over a mesh, it is set while the program is traced and runs.
      **options: of `jax.jit`; `static_argnames` must be a tuple.
    """
    return lambda function: Program(function, shelf, implied, **options)
