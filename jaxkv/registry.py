"""Methods by name, as commands take them: `full`, `streaming-llm:n_sink=2`.

A method joins the command line by one line in a table here. Its options are the fields
of its dataclass, so there is nothing else to declare. A policy that is in no table is
written as `module:Class`, with options behind it as all others have them.
"""

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable, Mapping
from typing import Any

from jaxkv import outside
from jaxkv.fields import element, kinds, words
from jaxkv.policies import contract
from jaxkv.policies.adakv import AdaKV
from jaxkv.policies.base import DecodePolicy, PrefillPolicy, WholePrompt
from jaxkv.policies.chance import Random, RandomDecode
from jaxkv.policies.chunkkv import ChunkKV
from jaxkv.policies.criticalkv import CriticalKV
from jaxkv.policies.dapq import DapQ
from jaxkv.policies.defensivekv import DefensiveKV
from jaxkv.policies.dropkv import DropKV
from jaxkv.policies.expected_attention import ExpectedAttention
from jaxkv.policies.full import Full
from jaxkv.policies.h2o import H2O, H2ODecode
from jaxkv.policies.keydiff import KeyDiff
from jaxkv.policies.knorm import KNorm
from jaxkv.policies.kvzip import KVzip
from jaxkv.policies.lagkv import LagKV
from jaxkv.policies.laq import LAQ
from jaxkv.policies.lazyeviction import LazyEviction
from jaxkv.policies.longflow import LongFlow
from jaxkv.policies.pyramidkv import PyramidKV
from jaxkv.policies.rkv import RKV
from jaxkv.policies.snapkv import SnapKV
from jaxkv.policies.streaming_llm import StreamingLLM
from jaxkv.policies.tova import TOVA, TOVADecode
from jaxkv.policies.triattention import TriAttention
from jaxkv.policies.vatp import VATP
from jaxkv.speculation.drafters import Aligned, PromptLookup, Tree
from jaxkv.speculation.rules import Conditional, Exact, FixedThreshold, TopK, Typical

PREFILL: Mapping[str, type] = {
    "full": Full,
    "streaming-llm": StreamingLLM,
    "dapq": DapQ,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "h2o": H2O,
    "tova": TOVA,
    "knorm": KNorm,
    "expected-attention": ExpectedAttention,
    "laq": LAQ,
    "keydiff": KeyDiff,
    "lagkv": LagKV,
    "chunkkv": ChunkKV,
    "criticalkv": CriticalKV,
    "adakv": AdaKV,
    "kvzip": KVzip,
    "dropkv": DropKV,
    "defensivekv": DefensiveKV,
    "random": Random,
}
DECODE: Mapping[str, type] = {
    "full": Full,
    "h2o": H2ODecode,
    "lazyeviction": LazyEviction,
    "longflow": LongFlow,
    "r-kv": RKV,
    "random": RandomDecode,
    "streaming-llm": StreamingLLM,
    "tova": TOVADecode,
    "triattention": TriAttention,
    "vatp": VATP,
}
SPECULATE: Mapping[str, type] = {
    "prompt-lookup": PromptLookup,
    "tree": Tree,
    "aligned": Aligned,
}
ACCEPT: Mapping[str, type] = {
    "exact": Exact,
    "conditional": Conditional,
    "fixed-threshold": FixedThreshold,
    "top-k": TopK,
    "typical": Typical,
}
TABLES = {
    "prefill": PREFILL,
    "decode": DECODE,
    "speculate": SPECULATE,
    "accept": ACCEPT,
}
_ROLES = {"prefill": PrefillPolicy, "decode": DecodePolicy}  # may be one's own


def parse(text: str, table: Mapping[str, type], *, flag: str) -> Any:
    """Make the method that a text such as `name:option=value,option=value` names.

    Args:
      text: values are written as in JSON, strings without quotes, and lists with
        spaces instead of commas. A named setting of the method, such as the `tables`
        of `DapQ.tables()`, may stand before the options: `dapq:tables,offset=2`. A
        policy within another is written as it would be alone, in brackets and with
        spaces instead of commas: `adakv:policy=[snapkv:window_size=8 pooling=avg]`.
      table: names and their dataclasses.
      flag: what the text was given for, for the messages.

    Returns:
      An instance of the dataclass.

    Raises:
      ValueError: unknown name, setting or option, or a value of the wrong type; a class
        that cannot be imported, or is no policy.
    """
    name, _, rest = text.partition(":")
    role: Any = next((_ROLES[x] for x in _ROLES if TABLES[x] is table), None)
    own = name not in table
    if own:
        method, name, rest = _outside(name, rest, role, table, flag)
    else:
        method = table[name]
    fields = _options(method)
    settings = _settings(method)
    make: Callable[..., Any] = method
    values: dict[str, Any] = {}
    parts = [part.strip() for part in rest.split(",") if part.strip()]
    if parts and parts[0] in settings:
        make = settings[parts.pop(0)]
    for part in parts:
        option, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or option not in fields:
            known = ", ".join(fields) or "none"
            first = f", or first one of {', '.join(settings)}" if settings else ""
            raise ValueError(
                f"{flag}: {part!r} is no option of {name}; write option=value with "
                f"one of its options: {known}{first}."
            )
        if option in values:
            raise ValueError(f"{flag}: {option} is given twice in {text!r}.")
        values[option] = _read(value, fields[option], f"{flag}: {name}'s {option}")
    if not own:
        return make(**values)
    made = outside.make(make, values, name=name, flag=flag)
    if lacks := contract.missing(made, role):
        raise ValueError(
            f"{flag}: {name} is no {role.__name__}: it has no {', '.join(lacks)}."
        )
    return made


def _outside(
    module: str, rest: str, role: Any, table: Mapping[str, type], flag: str
) -> tuple[type, str, str]:
    """Return the class that `module:Class` names, that text, and its options."""
    name, _, options = rest.partition(":")
    parts = [*module.split("."), name]
    if role is None or not all(part.isidentifier() for part in parts):
        own = ", or write module:Class for one of your own" if role else ""
        raise ValueError(
            f"{flag}: unknown {module!r}; choose one of {', '.join(table)}{own}."
        )
    return outside.find(module, name, flag=flag), f"{module}:{name}", options


def _options(method: type) -> dict[str, Any]:
    """Return the options of a method by name, with their annotations."""
    if not dataclasses.is_dataclass(method):
        return {}
    try:
        hints = typing.get_type_hints(method)
    except Exception:  # whatever the text of an annotation raises when it is evaluated
        hints = {}
    fields = dataclasses.fields(method)
    return {f.name: hints.get(f.name, Any) for f in fields if f.init}


def split_methods(text: str) -> list[str]:
    """Split `a:x=1,y=2,b` into `a:x=1,y=2` and `b`.

    Methods and their options are both separated by commas; a part of the form
    `option=value` goes on the method before it.
    """
    found: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if found and "=" in part.partition(":")[0]:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def _settings(method: type) -> dict[str, Callable[..., Any]]:
    """Return the named settings of a method: its class methods."""
    return {
        name: getattr(method, name)
        for name in dir(method)
        if not name.startswith("_")
        and isinstance(inspect.getattr_static(method, name), classmethod)
    }


def _read(text: str, hint: Any, what: str) -> Any:
    if hint is WholePrompt:
        return parse(without_brackets(text), PREFILL, flag=what)
    try:
        # A comma would end the option.
        value = json.loads(",".join(text.split()) if text[:1] == "[" else text)
    except ValueError:
        spellings = {"none": None, "true": True, "false": False}  # Python's as well
        value = spellings.get(text.lower(), text)
    if hint is Any:
        return value
    for kind in kinds(hint):
        if typing.get_origin(kind) is typing.Literal:
            if text in typing.get_args(kind):  # "none" is a choice of some
                return text
        elif kind is float and type(value) is int:
            return float(value)
        elif inner := element(kind):
            if isinstance(value, list) and all(type(x) is inner for x in value):
                return tuple(value)
        elif type(value) is kind:
            return value
    wanted = words(hint, a_list="a list of {} such as [1 2]")
    raise ValueError(f"{what} takes {wanted}, got {text!r}.")


def without_brackets(text: str) -> str:
    """Return a method as it is written alone, with commas for spaces.

    Args:
      text: of one that stands where a comma would end it: `[snapkv:window_size=8
        pooling=avg]`, or without brackets. Spaces within further brackets stay.
    """
    text = text.strip()
    if text[:1] == "[" and text[-1:] == "]":
        text = text[1:-1].strip()
    depth, found = 0, []
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        found.append("," if letter == " " and depth == 0 else letter)
    return "".join(found)
