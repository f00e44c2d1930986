"""Fetching ahead, in Triton; imported at the call only: it needs Triton.

`ahead_triton` says what for.
"""

import triton
import triton.language as tl

# A lane without a chunk asks for nothing. The number is not used; there must be one.
_ASK = tl.constexpr("""
{
    .reg .pred %wanted;
    setp.ne.s32 %wanted, $2, 0;
    @%wanted cp.async.bulk.prefetch.L2.global [$1], $3;
    mov.u32 $0, 0;
}
""")


@triton.jit
def fetch_ahead(
    ahead_ptr,
    program,
    programs,
    CHUNKS: tl.constexpr,  # of all shares together; 0: fetch nothing
    CHUNK: tl.constexpr,  # bytes
    SHARES: tl.constexpr,  # of the depth, whose beginnings are wanted
    STRIDE: tl.constexpr,  # bytes from one share to the next
    LANES: tl.constexpr,  # threads of a program
):
    """Ask for this program's chunks, and wait for none."""
    if CHUNKS:  # else not even compiled, for GPUs that cannot ask
        for first in range(program * LANES, CHUNKS, programs * LANES):
            chunk = first + tl.arange(0, LANES)
            share = chunk // (CHUNKS // SHARES)
            start = share.to(tl.int64) * STRIDE + chunk % (CHUNKS // SHARES) * CHUNK
            tl.inline_asm_elementwise(
                _ASK,
                "=r,l,r,r",
                [
                    ahead_ptr.to(tl.int64) + start,
                    (chunk < CHUNKS).to(tl.int32),
                    tl.full([LANES], CHUNK, tl.int32),
                ],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
