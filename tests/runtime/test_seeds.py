"""Keys depend on seeds alone, and on all of their bits."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.policies.chance import lots
from jaxkv.runtime.seeds import independent, key_of, row_keys

SEEDS = [0, 5, -1, -5, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**63 - 1, 1 - 2**63]
SETTINGS = {
    "as they are": contextlib.nullcontext,
    "64 bits": lambda: jax.enable_x64(True),
    "rbg": lambda: jax.default_prng_impl("rbg"),
    "unsafe_rbg": lambda: jax.default_prng_impl("unsafe_rbg"),
}
data = jax.random.key_data


def test_a_row_with_its_own_seed_is_the_first_row_of_that_seed():
    own = data(row_keys([5, 7], 2))
    np.testing.assert_array_equal(own[0], data(row_keys(5, 3))[0])
    np.testing.assert_array_equal(own[1], data(row_keys(7, 1))[0])
    assert len({key.tobytes() for key in np.asarray(data(row_keys(5, 3)))}) == 3


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_seeds_give_the_same_keys_under_all_settings(setting):
    with setting():
        keys = row_keys(SEEDS, len(SEEDS))
        assert str(jax.random.key_impl(keys)) == "threefry2x32"
        found = [key.tobytes() for key in np.asarray(data(keys))]
        one = [np.asarray(data(key_of(seed))).tolist() for seed in SEEDS]
    assert len(set(found)) == len(SEEDS)
    assert found == [key.tobytes() for key in np.asarray(data(row_keys(SEEDS, 10)))]
    # Those of 32 bits are the keys that JAX's own default gives.
    assert one[1] == data(jax.random.key(5, impl="threefry2x32")).tolist()
    assert one == [[s >> 32 & 0xFFFFFFFF, s & 0xFFFFFFFF] for s in SEEDS]


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_others_draw_by_themselves(implementation):
    def draw(seeds):
        keys = [jax.random.key(seed, impl=implementation) for seed in seeds]
        drawn = jax.vmap(lambda key: jax.random.bits(key, (3,)))
        return np.asarray(drawn(independent(jnp.stack(keys))))

    together = draw([5, 6, 7, 5 + 2**31])
    assert len({row.tobytes() for row in together}) == 4
    for row, seed in zip(together, [5, 6, 7], strict=False):
        np.testing.assert_array_equal(draw([seed])[0], row)


def test_keys_of_threefry_stay_as_they_are():
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 3)
    np.testing.assert_array_equal(data(independent(keys)), data(keys))
    np.testing.assert_array_equal(data(independent(data(keys))), data(keys))


def test_lots_differ_by_all_bits_of_the_seed():
    positions = jnp.arange(8, dtype=jnp.int32)
    drawn = {np.asarray(lots(positions, seed)).tobytes() for seed in SEEDS}
    assert len(drawn) == len(SEEDS)
