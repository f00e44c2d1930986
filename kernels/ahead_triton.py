"""Fetching the matrix of the next product ahead, on NVIDIA GPUs.

Between two products memory rests: a launch that has little to read takes its two
microseconds, and the next product takes as many until its first numbers arrive. So
such a launch asks for the beginning of the next matrix. It waits for nothing: the
numbers come into the second-level cache while the launches change, and no result
depends on them.

From Hopper on a single thread asks for as much as it likes; older GPUs fetch nothing.
"""

from typing import Any

import jax

from jaxkv.kernels.triton_call import fetches_in_bulk, num_processors

MOST_BYTES = 8 << 20  # what memory delivers in two microseconds

_CHUNK = 4096
_SHARES = 4  # of the depth: a product begins in as many places, at most


def helpers(ahead: jax.Array | None) -> int:
    """Return how many programs more a launch of few should have, only to ask."""
    return num_processors() if _fetched(ahead) else 0


def constants(ahead: jax.Array | None, *, warps: int) -> dict[str, Any]:
    """Return the compile-time arguments of `fetch_ahead`.

    Args:
      ahead: the matrix, or None to fetch nothing.
      warps: of the launch that asks.
    """
    share, stride = _fetched(ahead) or (0, 0)
    return dict(
        AHEAD_CHUNKS=_SHARES * (share // _CHUNK),
        AHEAD_CHUNK=_CHUNK,
        AHEAD_SHARES=_SHARES,
        AHEAD_STRIDE=stride,
        LANES=32 * warps,
    )


def _fetched(ahead) -> tuple[int, int] | None:
    """Return what to fetch of a share of the depth, and the size of one, in bytes."""
    if ahead is None or len(ahead) % _SHARES or not fetches_in_bulk():
        return None
    stride = ahead.size // _SHARES * ahead.dtype.itemsize
    share = min(stride, MOST_BYTES // _SHARES)
    return None if stride % 16 or share < _CHUNK else (share, stride)
