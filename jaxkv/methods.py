"""Methods by name, as commands take them: `full`, `streaming-llm:n_sink=2`.

A method joins the command line by one line in a table here. Its options are the fields
of its dataclass, so there is nothing else to declare.
"""

import dataclasses
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxkv.acceptance import Conditional, Exact, FixedThreshold, TopK, Typical
from jaxkv.basic_policies import Full, StreamingLLM
from jaxkv.dapq import LAQ, DapQ
from jaxkv.decode_policies import (
    VATP,
    H2ODecode,
    LongFlow,
    RandomDecode,
    TOVADecode,
)
from jaxkv.drafts import Aligned, PromptLookup, Tree
from jaxkv.expected_attention import ExpectedAttention
from jaxkv.prompt_policies import H2O, TOVA, KNorm, PyramidKV, Random, SnapKV
from jaxkv.rkv import RKV

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
    "random": Random,
}
DECODE: Mapping[str, type] = {
    "full": Full,
    "h2o": H2ODecode,
    "longflow": LongFlow,
    "r-kv": RKV,
    "random": RandomDecode,
    "streaming-llm": StreamingLLM,
    "tova": TOVADecode,
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

_TABLES = (PREFILL, DECODE, SPECULATE, ACCEPT)


def parse(text: str, table: Mapping[str, type], *, flag: str) -> Any:
    """Make the method that a text such as `name:option=value,option=value` names.

    Args:
      text: values are written as in JSON, strings without quotes, and lists with
        spaces instead of commas. A named setting of the method, such as the `tables`
        of `DapQ.tables()`, may stand before the options: `dapq:tables,offset=2`.
      table: names and their dataclasses.
      flag: what the text was given for, for the messages.

    Returns:
      An instance of the dataclass.

    Raises:
      ValueError: unknown name, setting or option, or a value of the wrong type.
    """
    name, _, rest = text.partition(":")
    if name not in table:
        raise ValueError(f"{flag}: unknown {name!r}; choose one of {', '.join(table)}.")
    hints = typing.get_type_hints(table[name])
    fields = {f.name: hints[f.name] for f in dataclasses.fields(table[name])}
    settings = _settings(table[name])
    make, values = table[name], {}
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
    return make(**values)


def check_types(method: Any) -> None:
    """Raise ValueError if an option of a method in the tables is of the wrong type.

    Names such as `score="l1"` are left to the method, which knows what they mean.
    """
    if not any(type(method) in table.values() for table in _TABLES):
        return
    hints = typing.get_type_hints(type(method))
    for field in dataclasses.fields(method):
        value, hint = getattr(method, field.name), hints[field.name]
        if not any(_fits(value, kind) for kind in _kinds(hint)):
            raise ValueError(
                f"{type(method).__name__}: {field.name} takes "
                f"{_words(hint, a_list='a tuple of {}')}, got {value!r}."
            )


def _fits(value: Any, kind: Any) -> bool:
    truth = isinstance(value, bool | np.bool_)
    if kind is bool:
        return truth
    if kind is int:
        return isinstance(value, int | np.integer) and not truth
    if kind is float:
        return isinstance(value, int | float | np.number) and not truth
    if kind is types.NoneType:
        return value is None
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return isinstance(value, tuple) and all(_fits(x, inner) for x in value)
    return True


def _settings(method: type) -> dict[str, Callable[..., Any]]:
    """Return the named settings of a method: its class methods."""
    return {
        name: getattr(method, name)
        for name in dir(method)
        if not name.startswith("_")
        and isinstance(inspect.getattr_static(method, name), classmethod)
    }


def _read(text: str, hint: Any, what: str) -> Any:
    try:
        # A comma would end the option.
        value = json.loads(",".join(text.split()) if text[:1] == "[" else text)
    except ValueError:
        spellings = {"none": None, "true": True, "false": False}  # Python's as well
        value = spellings.get(text.lower(), text)
    for kind in _kinds(hint):
        if typing.get_origin(kind) is typing.Literal:
            if text in typing.get_args(kind):  # "none" is a choice of some
                return text
        elif kind is float and type(value) is int:
            return float(value)
        elif typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)[0]
            if isinstance(value, list) and all(type(x) is inner for x in value):
                return tuple(value)
        elif type(value) is kind:
            return value
    raise ValueError(f"{what} takes {_words(hint)}, got {text!r}.")


def _kinds(hint: Any) -> tuple[Any, ...]:
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _words(hint: Any, a_list: str = "a list such as [{} ...]") -> str:
    words = []
    for kind in _kinds(hint):
        if typing.get_origin(kind) is typing.Literal:
            words += map(str, typing.get_args(kind))
        elif typing.get_origin(kind) is tuple:
            words.append(a_list.format(typing.get_args(kind)[0].__name__))
        else:
            special = {types.NoneType: "none", bool: "true or false"}
            words.append(special.get(kind, kind.__name__))
    return " or ".join(words)
