"""Sinks and caps in Triton kernels; imported at the call only: it needs Triton.

A kernel that attends takes `sink_ptr`, its last input, and `SINK` and `CAP`, which
`triton_call.weighing` makes. Logits are capped where they are computed, before
they are masked. The sink is paid once for each query head, in the one part of a row
that has its newest tokens or its first tile: the part's statistic has it then, and
whatever joins parts or asks for a token's weight need not know of it.

Without them neither leaves anything in the compiled kernel, the parameter included.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def capped(logits, CAP: tl.constexpr):
    """Return logits bounded by `CAP`, `CAP * tanh(logits / CAP)`; None is no bound.

    Both are in base 2. Where the tangent is small, the exponential's would lose its
    last digits to the 1 beside it, and `CAP` would make them matter: a series then.
    """
    if CAP is not None:
        x = logits * (1.0 / CAP)
        square = x * x
        # x - x^3 / 3 + 2 x^5 / 15 - 17 x^7 / 315 + 62 x^9 / 2835, to 2^-24 below 0.3
        series = tl.fma(square, 62.0 / 2835, -17.0 / 315)
        series = tl.fma(series, square, 2.0 / 15)
        series = tl.fma(series, square, -1.0 / 3)
        near = tl.fma(series * square, x, x)
        far = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * _LOG2_E)))
        logits = CAP * tl.where(square < 0.09, near, far)
    return logits


@triton.jit
def pay_sink(maximum, total, acc, sink_ptr, heads, real):
    """Return the softmax with one logit more, whose weight goes nowhere.

    Args:
      maximum: `[M]`.
      total: `[M]`, added up.
      acc: `[M, H]`.
      sink_ptr: `[N]`.
      heads: `[M]`, which of the `N` heads a row is of.
      real: `[M]`, false for padding, and where another part pays.
    """
    new_maximum, total, rescale = count_sink(maximum, total, sink_ptr, heads, real)
    return new_maximum, total, acc * rescale[:, None]


@triton.jit
def count_sink(maximum, total, sink_ptr, heads, real):
    """Return maximum and total with the sink, and the factor of what was before."""
    sink = _LOG2_E * tl.load(sink_ptr + heads, real, other=float("-inf")).to(tl.float32)
    new_maximum = tl.maximum(maximum, sink)
    rescale = tl.exp2(maximum - new_maximum)
    total = tl.fma(total, rescale, tl.exp2(sink - new_maximum))
    return new_maximum, total, rescale
