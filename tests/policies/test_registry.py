"""Methods by name: every option can be said, and nothing else."""

import dataclasses
import json

import pytest

from jaxkv import (
    AdaKV,
    ChunkKV,
    CriticalKV,
    DapQ,
    KNorm,
    LongFlow,
    PyramidKV,
    SnapKV,
    registry,
)

TABLES = registry.TABLES
ALL = [(kind, name) for kind, table in TABLES.items() for name in table]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_a_name_alone_gives_the_defaults(kind, name):
    table = TABLES[kind]
    assert registry.parse(name, table, flag="--x") == table[name]()


def written(value):
    """Return an option as a command has it."""
    if not dataclasses.is_dataclass(value):
        return value if type(value) is str else json.dumps(value)
    name = next(k for k, x in registry.PREFILL.items() if x is type(value))
    fields = [f.name for f in dataclasses.fields(value)]
    inner = " ".join(f"{x}={written(getattr(value, x))}" for x in fields)
    return f"[{name}:{inner}]"


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_every_option_can_be_said(kind, name):
    table = TABLES[kind]
    default = table[name]()
    said = []
    for field in (f for f in dataclasses.fields(default) if f.init):
        value = getattr(default, field.name)
        said.append(f"{field.name}={written(value)}")
    assert registry.parse(f"{name}:{','.join(said)}", table, flag="--x") == default


def test_lists_and_the_word_none():
    text = "dapq:content=fixed,fixed_ids=[5 6],pooling=none"
    policy = registry.parse(text, registry.PREFILL, flag="--x")
    assert (policy.fixed_ids, policy.pooling) == ((5, 6), "none")
    policy = registry.parse("h2o:window_size=none", registry.PREFILL, flag="--x")
    assert policy.window_size is None
    with pytest.raises(ValueError, match="takes a list of whole numbers such as"):
        registry.parse("dapq:fixed_ids=[5 x]", registry.PREFILL, flag="--x")
    with pytest.raises(ValueError, match="pooling takes none, max or avg, got"):
        registry.parse("dapq:pooling=mean", registry.PREFILL, flag="--x")


def test_a_policy_within_another():
    def parse(text):
        return registry.parse(text, registry.PREFILL, flag="--prefill")

    assert parse("chunkkv:policy=knorm") == ChunkKV(policy=KNorm())
    snap = SnapKV(window_size=8, pooling="avg")
    assert parse("adakv:policy=[snapkv:window_size=8 pooling=avg],most=3") == AdaKV(
        policy=snap, most=3.0
    )
    dapq = DapQ(content="fixed", fixed_ids=(5, 6), window_size=2)
    deep = CriticalKV(policy=AdaKV(policy=dapq, most=4.0))
    text = "[dapq:content=fixed fixed_ids=[5 6] window_size=2]"
    assert parse(f"criticalkv:policy=[adakv:policy={text} most=4]") == deep
    assert parse("adakv:board,policy=[expected-attention:kvpress]") == AdaKV.board()
    message = r"--prefill: adakv's policy: 'size=3' is no option of snapkv"
    with pytest.raises(ValueError, match=message):
        parse("adakv:policy=[snapkv:size=3]")
    with pytest.raises(ValueError, match="adakv's policy: unknown 'magic'; choose one"):
        parse("adakv:policy=magic")


def test_truth_values_as_in_json_and_as_in_python():
    for text in ("false", "False"):
        policy = registry.parse(f"longflow:shared={text}", registry.DECODE, flag="--x")
        assert policy == LongFlow(shared=False)


def test_named_settings_stand_before_the_options():
    def parse(text, table=registry.PREFILL):
        return registry.parse(text, table, flag="--x")

    assert parse("dapq:tables") == DapQ.tables() != DapQ()
    assert parse("dapq:literal, offset=2") == DapQ.literal(offset=2)
    assert parse("pyramidkv:kvpress,beta=2") == PyramidKV.kvpress(beta=2)
    paper = parse("longflow:paper,n_sink=1", registry.DECODE)
    assert paper == LongFlow.paper(n_sink=1)
    recommended = parse("longflow:recommended,n_recent=8", registry.DECODE)
    assert recommended == LongFlow(protect_prompt=True, n_recent=8)
    with pytest.raises(ValueError, match="or first one of literal, tables"):
        parse("dapq:offset=2,tables")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "unknown 'magic'; choose one of full, "),
        ("", "unknown ''"),
        ("full:n_sink=1", "no option of full"),
        ("streaming-llm:n_sink", "write option=value"),
        ("streaming-llm:sinks=1", "one of its options: n_sink"),
        ("streaming-llm:n_sink=two", "n_sink takes a whole number, got 'two'"),
        ("streaming-llm:n_sink=1.5", "n_sink takes a whole number"),
        ("streaming-llm:n_sink=true", "n_sink takes a whole number"),
        ("streaming-llm:n_sink=1,n_sink=2", "given twice"),
        ("longflow:shared=maybe", "shared takes true or false, got 'maybe'"),
    ],
)
def test_bad_text_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        registry.parse(text, registry.DECODE, flag="--decode")


def test_methods_are_split_from_one_another_and_keep_their_options():
    found = registry.split_methods("a:x=1,y=2, b,,c:z=3")
    assert found == ["a:x=1,y=2", "b", "c:z=3"]
