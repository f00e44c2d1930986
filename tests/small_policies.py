"""Every policy of the registry with options that suit the tiny network, and variants.

The laws run over `PREFILL` and `DECODE`. A new policy joins by one line in the `SMALL`
of its phase; until it has one, the tests that use the tables fail and say so.
"""

from collections.abc import Mapping

from jaxkv import (
    H2O,
    LAQ,
    RKV,
    TOVA,
    VATP,
    AdaKV,
    ChunkKV,
    CriticalKV,
    DapQ,
    DefensiveKV,
    DropKV,
    ExpectedAttention,
    Full,
    H2ODecode,
    KeyDiff,
    KNorm,
    KVzip,
    LagKV,
    LazyEviction,
    LongFlow,
    Options,
    PyramidKV,
    Random,
    RandomDecode,
    SnapKV,
    StreamingLLM,
    TOVADecode,
    TriAttention,
    registry,
)


def small(name: str, policies: Mapping[str, type], table: Mapping[str, object]) -> dict:
    """Return the table in the registry's order.

    Args:
      name: of the table, for the message.
      policies: of the registry.
      table: a small version of each of them.

    Raises:
      LookupError: a policy that has no line, or a line of another class.
    """
    for key, policy in policies.items():
        if type(table.get(key)) is not policy:
            raise LookupError(
                f"the registry has {key!r}, {name} has no such {policy.__name__}: add "
                f'"{key}": {policy.__name__}(...) to {name} in small_policies.py, with '
                "options for a budget of 9 tokens."
            )
    return {key: table[key] for key in policies}


DAPQ = DapQ(window_size=4, prefix=1, kernel_size=3)
SMALL_PREFILL = {
    "full": Full(),
    "streaming-llm": StreamingLLM(n_sink=1),
    "dapq": DapQ(window_size=6, prefix=2, kernel_size=3),
    "snapkv": SnapKV(window_size=4, kernel_size=3),
    "pyramidkv": PyramidKV(window_size=2, kernel_size=3, pooling="avg", beta=4),
    "h2o": H2O(window_size=None),
    "tova": TOVA(),
    "knorm": KNorm(),
    "expected-attention": ExpectedAttention(n_future_positions=16, n_sink=2),
    "laq": LAQ(window_size=3, draft_window_size=2, kernel_size=3),
    "keydiff": KeyDiff(),
    "lagkv": LagKV(n_sink=1, lag_size=4),
    "chunkkv": ChunkKV(policy=KNorm(), chunk_length=4),
    "criticalkv": CriticalKV(policy=DAPQ, epsilon=1.0),
    "adakv": AdaKV(policy=KNorm(), most=1.5),
    "kvzip": KVzip(repeat_ids=(5, 6), n_sink=1),
    "dropkv": DropKV(window_size=3, kernel_size=3),
    "defensivekv": DefensiveKV(window_size=3, kernel_size=3, mass=0.3),
    "random": Random(),
}
SMALL_DECODE = {
    "full": Full(),
    "h2o": H2ODecode(),
    "lazyeviction": LazyEviction(alpha=0.1, window_size=2),
    "longflow": LongFlow.paper(),
    "r-kv": RKV(window_size=2, kernel_size=3, buffer=2),
    "random": RandomDecode(),
    "streaming-llm": StreamingLLM(n_sink=1),
    "tova": TOVADecode(),
    "triattention": TriAttention(interval=2, n_recent=1),
    "vatp": VATP(n_sink=1, n_recent=2),
}

PREFILL = {
    **small("SMALL_PREFILL", registry.PREFILL, SMALL_PREFILL),
    "dapq, vocabulary, offset, sinks": DapQ(
        window_size=6, prefix=2, content="vocabulary", offset=3, n_sink=1, n_recent=2
    ),
    "dapq, by query head": DapQ(
        window_size=6,
        prefix=2,
        reduction="sum",
        pooling="none",
        granularity="query_head",
    ),
    "adakv, mixed": AdaKV.paper(policy=SnapKV(window_size=2, kernel_size=3), most=1.5),
    "snapkv, turned ahead": SnapKV(window_size=4, kernel_size=3, offset=4),
    "snapkv, all but one": SnapKV(window_size=10, kernel_size=3),
    "h2o, windowed": H2O(window_size=4),
    "criticalkv of adakv of laq": CriticalKV(
        policy=AdaKV(policy=LAQ(window_size=2, draft_window_size=2, kernel_size=3))
    ),
}
# What generates: options without their budget. Prompts are cut where nothing is said.
DECODE = {
    **{
        name: Options(prefill=StreamingLLM(n_sink=1), decode=policy)
        for name, policy in small("SMALL_DECODE", registry.DECODE, SMALL_DECODE).items()
    },
    "streaming-llm, four sinks": Options(prefill=StreamingLLM(), decode=StreamingLLM()),
    "longflow, protected": Options(
        prefill=StreamingLLM(n_sink=1),
        decode=LongFlow(
            score="deletion", n_sink=1, n_recent=1, protect_prompt=True, shared=False
        ),
    ),
    "full prompt, full": Options(),
    "full prompt, streaming-llm": Options(decode=StreamingLLM()),
    "full prompt, longflow in bulk": Options(decode=LongFlow(interval=3, n_recent=1)),
    "dapq prompt, full": Options(prefill=DAPQ),
    "dapq prompt, streaming-llm": Options(prefill=DAPQ, decode=StreamingLLM()),
}
