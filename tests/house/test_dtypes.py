"""Arrays that sources make have a dtype; without one, JAX's settings choose it.

Under `jax_enable_x64` a number without a dtype becomes one of 64 bits. `laws/
test_settings.py` traces all methods under it; this reads the code that it does not
reach. Keys of PRNGs depend on settings, too: `jaxkv.runtime.seeds` makes them.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in ("jaxkv", "kernels", "models")
    for path in sorted((ROOT / folder).rglob("*.py"))
}

# Each function, and how many positional arguments have the dtype among them.
MAKERS = {
    "jnp.arange": 9,  # by keyword only
    "jnp.empty": 2,
    "jnp.eye": 9,
    "jnp.full": 3,
    "jnp.linspace": 9,
    "jnp.ones": 2,
    "jnp.zeros": 2,
    "jax.random.exponential": 3,
    "jax.random.gumbel": 3,
    "jax.random.normal": 3,
    "jax.random.randint": 5,
    "jax.random.uniform": 3,
}
KEYS = {"jax.random.key", "jax.random.PRNGKey"}
# Where a key decides nothing that is kept: shapes, and what is only timed.
ANY_KEY = ("models/decoder.py", "jaxkv/bench/", "jaxkv/cli/bench")


def without_dtype(source: str) -> list[tuple[int, str]]:
    """Return lines and calls of arrays that are made without a dtype."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        least = MAKERS.get(name)
        named = any(keyword.arg == "dtype" for keyword in node.keywords)
        if least and not named and len(node.args) < least:
            found.append((node.lineno, ast.unparse(node)))
    return found


def keys_of_jax(source: str) -> list[int]:
    """Return the lines where a key is made that depends on settings."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [call.lineno for call in calls if ast.unparse(call.func) in KEYS]


@pytest.mark.parametrize("module", MODULES)
def test_arrays_are_made_with_a_dtype(module):
    assert without_dtype(MODULES[module]) == [], f"{module}: say dtype="


@pytest.mark.parametrize("module", MODULES)
def test_keys_are_made_by_seeds(module):
    lines = [] if module.startswith(ANY_KEY) else keys_of_jax(MODULES[module])
    assert lines == [], f"{module}: use jaxkv.runtime.seeds.key_of"


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("jnp.arange(3)", 1),
        ("jnp.arange(3, dtype=jnp.int32)", 0),
        ("jnp.zeros(3)", 1),
        ("jnp.zeros(3, bool)", 0),
        ("jnp.full(3, 0)", 1),
        ("jax.random.uniform(key, (3,))", 1),
        ("np.arange(3)", 0),
    ],
)
def test_the_reader_of_calls(source, count):
    assert len(without_dtype(source)) == count
    assert keys_of_jax("jax.random.key(0)") == [1]
