"""A policy of a module that is not ours: by name, with options, and each mistake."""

import dataclasses
import sys

import jax.numpy as jnp
import pytest
from tiny import language_model

import jaxkv
from jaxkv import KNorm, outside, registry
from jaxkv.options import described
from jaxkv.policies.base import WholePrompt

MODULE = '''
import dataclasses

import jax.numpy as jnp

from jaxkv import StreamingLLM
from jaxkv.policies.base import WholePrompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Large(WholePrompt):
    """Keep the keys of the largest norm."""

    power: int = 1
    anything: "no such type" = None

    @classmethod
    def squared(cls, **options):
        return cls(**dict(power=2) | options)

    def __post_init__(self):
        if self.power == 7:
            raise RuntimeError("not\\nseven")

    def scores(self, prompt):
        return jnp.linalg.norm(prompt.keys, axis=-1).swapaxes(1, 2) ** self.power


class Recent(StreamingLLM):
    """A class that adds no option of its own."""


class Silent(WholePrompt):
    pass


class Needing:
    def __init__(self, what):
        pass


number = 3
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with modules in it, which is the current one."""
    (tmp_path / "my_policies.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "needing.py").write_text("import not_installed_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in ("my_policies", "broken", "leaving", "needing"):
        sys.modules.pop(name, None)


def prefill(text):
    return registry.parse(text, registry.PREFILL, flag="--methods")


def test_options_and_settings_are_said_as_of_ours(here):
    policy = prefill("my_policies:Large:power=3")
    assert (type(policy).__name__, policy.power) == ("Large", 3)
    assert prefill("my_policies:Large") == type(policy)()
    assert prefill("my_policies:Large:squared,anything=[1 2]").power == 2
    assert prefill("my_policies:Large:anything=[1 2]").anything == [1, 2]
    within = prefill("adakv:policy=[my_policies:Large:power=2],most=3")
    assert within.policy.power == 2
    decode = registry.parse("my_policies:Recent:n_sink=2", registry.DECODE, flag="--x")
    assert decode.n_sink == 2
    text = "my_policies:Large:power=3,full,my_policies:Recent:n_sink=1"
    assert len(registry.split_methods(text)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("my_policy:Large", "--methods: no module 'my_policy', neither in .* nor inst"),
        ("my_policies.sub:Large", "no module 'my_policies.sub'"),
        ("my_policies:Small", "--methods: Small of my_policies is not there; name"),
        ("my_policies:number", "number of my_policies is no class"),
        (
            "my_policies:Silent",
            "my_policies:Silent is no PrefillPolicy: it has no c",
        ),
        ("my_policies:Needing", "making my_policies:Needing raises TypeError: "),
        (
            "my_policies:Large:power=7",
            "making .*:Large raises RuntimeError: not sev",
        ),
        (
            "my_policies:Large:size=3",
            "'size=3' is no option of my_policies:Large; .*p",
        ),
        ("my_policies:Silent:a=3", "no option of my_policies:Silent; .* options: none"),
        ("broken:Large", "--methods: importing broken raises SyntaxError: "),
        ("leaving:Large", "--methods: importing leaving raises SystemExit: 3"),
        (
            "needing:Large",
            "importing needing raises ModuleNotFoundError: No module n",
        ),
        ("my-policies:Large", "unknown 'my-policies'; .* or write module:Class"),
        ("snapkvv:window_size=8", "unknown 'snapkvv'; choose one of full, "),
    ],
)
def test_a_mistake_is_one_line(here, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        prefill(text)
    assert "\n" not in str(caught.value)


def test_drafters_are_ours(here):
    with pytest.raises(ValueError, match=r"unknown 'my_policies'; choose .*aligned\.$"):
        registry.parse("my_policies:Large", registry.SPECULATE, flag="--speculate")


def test_what_a_class_does_is_part_of_what_was_run(here):
    policy = prefill("my_policies:Large")
    before = described({"prefill": policy})["prefill"]
    assert before["name"] == "Large" and before["power"] == 1
    (here / "my_policies.py").write_text(MODULE + "# otherwise\n")
    after = described({"prefill": policy})["prefill"]
    assert before["source"] != after["source"]
    assert outside.source_digest(KNorm()) is None
    within = described({"prefill": jaxkv.AdaKV(policy=policy)})["prefill"]
    assert "source" not in within and within["policy"] == after
    exec("class Typed: pass", scope := {"__name__": "__main__"})
    assert len(outside.source_digest(scope["Typed"]())) == 32


@dataclasses.dataclass(frozen=True)
class Hoarding(WholePrompt):
    """Keeps one more of its second row than it may."""

    def rank(self, prompt, *, budget):
        scores, keep = KNorm().rank(prompt, budget=budget)
        return scores, keep + (prompt.lengths > 3)[:, None].astype(jnp.int32)


def test_too_many_tokens_are_named(tmp_path):
    lm = language_model(tmp_path)
    message = "Hoarding keeps more tokens of prompt 1 in layer 0 than its budget; comp"
    with pytest.raises(ValueError, match=message):
        jaxkv.generate(
            lm,
            [[9, 10, 11], [5, 6, 7, 8] * 5],
            max_new_tokens=4,
            budget=[9, 9],
            prefill=Hoarding(),
        )
