"""Groups of flags: frozen dataclasses that commands share and hand on whole."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of flags.

    A group is a dataclass whose fields are flags. Each parameter of such a type is
    replaced, in its place, by a flag per field; the command itself gets the group.

    Args:
      command: with keyword arguments only.

    Returns:
      The same with the groups' fields as parameters.
    """
    hints = get_type_hints(command, include_extras=True)
    signature = inspect.signature(command)
    groups: dict[str, list[str]] = {}
    parameters = []
    for name, parameter in signature.parameters.items():
        if not dataclasses.is_dataclass(hints[name]):
            parameters.append(parameter)
            continue
        fields = dataclasses.fields(hints[name])
        of_field = get_type_hints(hints[name], include_extras=True)
        groups[name] = [field.name for field in fields]
        parameters += [
            parameter.replace(
                name=field.name, default=field.default, annotation=of_field[field.name]
            )
            for field in fields
        ]

    @functools.wraps(command)
    def with_flags(**values: Any) -> None:
        made = {
            name: hints[name](**{field: values.pop(field) for field in fields})
            for name, fields in groups.items()
        }
        command(**values, **made)

    signature = signature.replace(parameters=parameters)
    with_flags.__signature__ = signature  # type: ignore[attr-defined]
    return with_flags
