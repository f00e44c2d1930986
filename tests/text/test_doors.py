"""What no public function takes is refused by it, in a line of its own.

Each argument of each function is given an object, a list of nothing and a fraction.
None of them is anything anywhere, so that each must be refused, by a `raise` of ours:
what fails in the depths says nothing to who has called.
"""

import inspect
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkv
from jaxkv.models.checkpoint import CheckpointError
from jaxkv.policies.triattention import TriAttention

ROOT = Path(jaxkv.__file__).parents[1]
CLASSES = {"Context", "Chat", "Engine"}  # whose methods are called below


class Thing:
    def __repr__(self):
        return "Thing()"


def pure_functions(lm, cache):
    """Return those that take arrays, which may be traced."""
    pure = dict(network=lm.network, params=lm.params, options=jaxkv.Options())
    one = jnp.array([3])
    prompts = dict(tokens=jnp.ones((1, 3), jnp.int32), lengths=one, slots=8)
    keys = jax.random.split(jax.random.key(0), 1)
    ends = dict(keys=keys, stop_ids=one, max_new_tokens=jnp.int32(2), max_out=2)
    step = dict(token=one, position=one, cache=cache)
    return {
        "prefill": (jaxkv.prefill, pure | prompts),
        "decode_step": (jaxkv.decode_step, pure | step),
        "generate_tokens": (jaxkv.generate_tokens, pure | prompts | ends),
    }


def methods(lm, context):
    chat = jaxkv.Chat.begin(lm)
    engine = jaxkv.Engine(lm, rows=1, max_prompt=16, max_new_tokens=4)
    return {
        "Context.take": (context.take, {}),
        "Context.join": (lambda other: context.join(other), {}),
        "Context.kept_positions": (context.kept_positions, {}),
        "Chat.begin": (jaxkv.Chat.begin, dict(lm=lm)),
        "Chat.say": (chat.say, dict(text="one")),
        "Chat.with_budget": (chat.with_budget, {}),
        "Engine": (jaxkv.Engine, dict(lm=lm)),
        "Engine.submit": (engine.submit, dict(prompt="one")),
        "Engine.submit behind": (engine.submit, dict(prompt="one", context=context)),
        "Engine.cancel": (engine.cancel, {}),
        "Engine.wait": (engine.wait, {}),
        "Engine.stream": (engine.stream, {}),
        "Engine.warm_up": (engine.warm_up, {}),
    }


@pytest.fixture(scope="module")
def doors(tiny, tiny_lm, tmp_path_factory):
    """Return public functions by name, and arguments that they would take."""
    folder, lm = tmp_path_factory.mktemp("doors"), dict(lm=tiny_lm)
    context = jaxkv.compress(tiny_lm, ["one"])
    jaxkv.save_context(context, folder / "context")
    asked = lm | dict(prompts=["one"], max_new_tokens=1)
    scored = lm | dict(prompts=["one"], continuations=["two"])
    behind = dict(prompts=None, context=context)
    saved = dict(context=context, folder=folder / "new")
    return {
        "load": (jaxkv.load, dict(name=tiny)),
        "save": (jaxkv.save, lm | dict(folder=folder / "copy")),
        "generate": (jaxkv.generate, asked),
        "generate behind": (jaxkv.generate, asked | dict(context=context)),
        "compress": (jaxkv.compress, lm | dict(documents=["one"])),
        "compress a chat": (jaxkv.compress, lm | dict(documents=["one"], chat=True)),
        "score": (jaxkv.score, scored),
        "score behind": (jaxkv.score, scored | behind),
        "evaluate": (jaxkv.evaluate, lm | dict(methods={"random": jaxkv.Random()})),
        "save_context": (jaxkv.save_context, saved),
        "load_context": (jaxkv.load_context, lm | dict(folder=folder / "context")),
        "enable_compilation_cache": (jaxkv.enable_compilation_cache, {}),
        **pure_functions(tiny_lm, context.cache),
        **methods(tiny_lm, context),
    }


def is_ours(error):
    """Return whether a line of ours has raised an error; `speaking_of` rewords some."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if last.name == "speaking_of":
        return is_ours(error.__cause__)
    return Path(last.filename).is_relative_to(ROOT) and "raise " in str(last.line)


def names_another(door, said):
    """Return whether a message begins with the name of what nobody has called."""
    called, said = door.partition(" ")[0], said.partition(":")[0]
    kin = {"generate_tokens": "prefill", "Chat.with_budget": "Chat.begin"}
    own = {called, called.partition(".")[0], kin.get(called)}
    return said in {*jaxkv.__all__, "Chat.begin", "Chat.say"} - own


@pytest.mark.parametrize("wrong", [Thing(), [None], -1.5], ids=repr)
def test_each_argument_is_refused_in_a_line(doors, wrong):
    bad = []
    for door, (function, given) in doors.items():
        for name in inspect.signature(function).parameters:
            try:
                function(**given | {name: wrong})
            except ValueError as error:
                said = str(error)
                if not is_ours(error) or "\n" in said or names_another(door, said):
                    bad.append(f"{door}({name}=): {error}")
            except Exception as error:
                bad.append(f"{door}({name}=): {type(error).__name__}: {error}")
            else:
                bad.append(f"{door}({name}=) takes it")
    assert not bad


def test_each_public_function_is_a_door(doors):
    names = {door.partition(".")[0].partition(" ")[0] for door in doors}
    public = {name: getattr(jaxkv, name) for name in jaxkv.__all__}
    functions = {name for name, x in public.items() if inspect.isfunction(x)}
    assert names == functions | CLASSES


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda lm, _: jaxkv.save("tiny", "x"), r"got 'tiny'; write jaxkv\.load"),
        (lambda lm, _: jaxkv.load("needle", dtype=np.ones(2)), "dtype must be one of"),
        (lambda lm, _: jaxkv.load("needle", max_positions=True), "found True"),
        (lambda lm, ctx: ctx.take(1), r"takes a list of indices, such as \[0\], got 1"),
        (lambda lm, ctx: ctx.take({0}), "takes a list of indices"),
        (lambda lm, ctx: ctx.join(1), r"takes what jaxkv\.compress returns, got 1"),
        (lambda lm, ctx: ctx.kept_positions(np.ones((2, 2), int)), "a whole number"),
        (lambda lm, ctx: jaxkv.load_context(5, lm), "takes a path, .*, got 5"),
        (lambda lm, ctx: jaxkv.load_context("", lm), "takes a path, .*, got ''"),
        (lambda lm, _: jaxkv.generate(lm, "a", logprobs=5), "takes True or False"),
        (lambda lm, _: jaxkv.Chat.begin(lm, system=5), "system= takes a text, got 5"),
        (lambda lm, _: jaxkv.evaluate(lm, {}), "methods= takes .* at least one, got"),
        (lambda lm, _: jaxkv.evaluate(lm, {"a": 5}, match="some"), "all or any, got"),
        (lambda lm, _: jaxkv.evaluate(lm, {"a": 5}, seed=-1), "seed must be >= 0"),
        (
            lambda lm, _: jaxkv.evaluate(lm, {"a": 5}, lengths=[0]),
            r"\[0\] must be >= 1",
        ),
        (lambda lm, _: jaxkv.evaluate(lm, {"a": 5}, tasks=[]), "list of at least one"),
        (lambda lm, _: jaxkv.Options(decode=5).check(), "Options: decode= takes some"),
        (
            lambda lm, _: jaxkv.Options(budget=9, decode=TriAttention(stats=5)).check(),
            "stats takes a text, got 5",
        ),
        (
            lambda lm, _: jaxkv.generate(lm, "a", prefill=jaxkv.KVzip(repeat_ids=5)),
            "repeat_ids takes a tuple of whole numbers, got 5",
        ),
        (
            lambda lm, _: jaxkv.prefill(
                *(lm.network, {}, jnp.ones((1, 1), jnp.int32), jnp.ones(1, jnp.int32)),
                options=jaxkv.Options(),
                slots=1,
            ),
            r"such as lm\.params, got \{\}",
        ),
    ],
)
def test_what_is_said_of_it(doors, tiny_lm, call, said):
    context = doors["save_context"][1]["context"]
    with pytest.raises((ValueError, CheckpointError), match=said):
        call(tiny_lm, context)
