"""Messages of the library in the words of the command line.

The library names its arguments as Python does (`budget=20`, `prefill=Full()`). Who runs
a command has typed flags (`--budget 20`, `--prefill full`), and reads of those.
"""

import dataclasses
import inspect
import itertools
import re
from collections.abc import Collection, Sequence
from typing import Any

from jaxkv.registry import ACCEPT, DECODE, PREFILL, SPECULATE
from jaxkv.sampling import Categorical, Greedy
from jaxkv.text.documents import compress
from jaxkv.text.inference import generate

ARGUMENTS = {
    *inspect.signature(generate).parameters,
    *inspect.signature(compress).parameters,
    *(field.name for field in dataclasses.fields(Categorical)),
    "dtype",  # of `jaxkv.load`
    "max_prompt",  # of `jaxkv.Engine`
}
# What a command calls an argument that has no flag of its name.
_ALIASES = {
    "stop_ids": "stop_id",
    "budget": "budgets",
    "prefill": "methods",
    "decode": "methods",
}
_METHODS = {
    method.__name__: name
    for table in (PREFILL, DECODE, SPECULATE, ACCEPT)
    for name, method in table.items()
}
# What messages begin with, which no command of that name was given.
_CALLS = (
    *("generate", "compress", r"Chat\.begin", r"Chat\.say", "Engine", "Categorical"),
    "Greedy",
)
_TEXTS = {"--prompt", "--system", "--question"}  # flags whose values say something
_VALUE = r"""(?P<value>[A-Z]\w*\(\)|'[^']*'|"[^"]*"|[\w.+-]*\w)?"""


def parameters(root: Any, argv: Sequence[str]) -> set[str]:
    """Return the names of the flags of the command that is run.

    Where a group runs one of its commands by itself, they are those of all of them.

    Args:
      root: the group of all commands.
      argv: the arguments of the process.
    """
    return {parameter.name for parameter in _parameters(root, argv)}


def _parameters(root: Any, argv: Sequence[str]) -> list[Any]:
    command = root
    for argument in argv:
        command = getattr(command, "commands", {}).get(argument, command)
    inner = getattr(command, "commands", {}).values()
    return [parameter for c in (command, *inner) for parameter in c.params]


def check_empty(root: Any, argv: Sequence[str]) -> None:
    """Raise ValueError for an argument of no letters, as an unset variable leaves it.

    The empty path would be the folder that one is in. Texts may be empty, or are
    refused by who reads them.

    Args:
      root: the group of all commands.
      argv: the arguments of the process.
    """
    flags = {
        flag
        for parameter in _parameters(root, argv)
        if not getattr(parameter, "is_flag", False)
        for flag in parameter.opts
    }
    for before, argument in itertools.pairwise(["", *argv]):
        flag, equals, value = argument.partition("=")
        if flag and (before in flags or not (equals and flag in flags)):
            continue  # not empty, and no flag
        name = flag or (before if before in flags else "an argument")
        if not value and name not in _TEXTS:
            raise ValueError(
                f"{name} is empty, where a value or a name was expected; write one, or "
                "leave it out."
            )


def in_flags(message: str, known: Collection[str]) -> str:
    """Return a message with flags in place of Python's arguments and classes.

    Args:
      message: what a function of the library has said.
      known: names of the parameters of the command.
    """
    message = re.sub(rf"^({'|'.join(_CALLS)}): ", "", message)
    message = message.replace("jaxkv.compress", "jaxkv compress")
    flags = {}
    for name in ARGUMENTS:
        used = name if name in known else _ALIASES.get(name)
        if used is not None and used in known:
            flags[name] = "--" + used.strip("_").replace("_", "-")
    if not flags:
        return message
    names = "|".join(sorted(map(re.escape, flags), key=len, reverse=True))

    def assigned(match: re.Match[str]) -> str:
        value = match["value"] or ""
        return f"{flags[match['name']]} {_METHODS.get(value, value)}".rstrip()

    # Not within a path, a longer name, or an option of a policy.
    message = re.sub(rf"(?<![\w./:,-])(?P<name>{names})={_VALUE}", assigned, message)
    message = re.sub(
        rf"(?<![\w./:,-])(?P<name>{names})(?![\w/-]|\.\w)",
        lambda m: flags[m["name"]] if "_" in m["name"] else m["name"],
        message,
    )
    message = re.sub(
        rf"^(?P<name>{names})(?= (?:must|takes) )",
        lambda m: flags[m["name"]],
        message,
    )
    message = message.replace(f"{Greedy.__name__}()", "--temperature 0")
    return re.sub(r"\b([A-Z]\w*)\(\)", lambda m: _METHODS.get(m[1], m[0]), message)
