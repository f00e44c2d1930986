"""What decode policies share: lots, and the room that options need."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv import RKV, VATP, H2ODecode, LongFlow, RandomDecode
from jaxkv.policies.chance import lots


def test_lots_are_uniform_and_depend_on_the_seed():
    drawn = np.asarray(lots(jnp.arange(4000), 0))
    assert ((drawn >= 0) & (drawn < 1)).all()
    counts, _ = np.histogram(drawn, bins=10, range=(0, 1))
    assert abs(counts - 400).max() < 80  # four standard deviations
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.06
    assert (np.asarray(lots(jnp.arange(4000), 1)) != drawn).mean() > 0.99


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (LongFlow(interval=0), "LongFlow: interval must be >= 1, got 0"),
        (LongFlow(n_sink=-1), "LongFlow: n_sink must be >= 0, got -1"),
        (LongFlow(n_recent=-1), "n_recent must be a number of tokens >= 0"),
        (LongFlow(n_sink=9, n_recent=8), "use a budget of at least 18"),
        (LongFlow(interval=17), "use a budget of at least 17"),
        (H2ODecode(n_recent=1.0), r"or a fraction of the budget in \[0, 1\), got 1.0"),
        (H2ODecode(n_recent=float("nan")), r"of the budget in \[0, 1\), got nan"),
        (H2ODecode(n_recent=float("inf")), r"of the budget in \[0, 1\), got inf"),
        (H2ODecode(n_recent=np.float32(1)), r"or a fraction of .* got 1.0"),
        (H2ODecode(n_recent=16), "use a budget of at least 17"),
        (VATP(), "20 sinks, 8 recent tokens and 1 to evict"),
        (RandomDecode(n_recent=16), "RandomDecode: budget=16 is too small"),
        (RKV(), "RKV: budget=16 is too small"),
        (RKV(window_size=0), "window_size must be >= 1, got 0"),
        (RKV(buffer=0), "buffer must be >= 1, got 0"),
        (RKV(kernel_size=4), "kernel_size must be odd and >= 1, got 4"),
        (RKV(mix_lambda=1.5), r"mix_lambda must lie in \[0, 1\], got 1.5"),
    ],
)
def test_refusals(policy, message):
    with pytest.raises(ValueError, match=message):
        policy.check(16)
