"""What clients may ask a server for: bodies of OpenAI's API, checked.

Fields that ask for nothing (null, false, zero, empty) are taken whatever their names;
others that are not known are refused by name.
"""

import abc
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxkv.fields import MOST, MOST_SEED
from jaxkv.sampling import Categorical, Greedy
from jaxkv.server.refusals import Refusal

MOST_STOPS = 16  # stop strings of a request
_LONGEST_STOP = 256  # characters of one
_LONGEST_SHOWN = 60  # characters of a field's name in a message
# They say who asks and how it is filed, and nothing of the answer.
_WITHOUT_EFFECT = {
    *("user", "metadata", "safety_identifier", "prompt_cache_key"),
    "parallel_tool_calls",
}

T = TypeVar("T")
_List = Annotated[
    list[T], Field(fail_fast=True)
]  # a million wrong elements are one error
Stop = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]
Count = Annotated[int, Field(ge=1, le=MOST)]


class _Checked(BaseModel):
    """Values are of the types that are written, and numbers are finite."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True
    )

    def others(self) -> list[str]:
        """Return the names of fields that are not known and ask for something."""
        extra = self.model_extra or {}
        return [n for n, x in extra.items() if x and n not in _WITHOUT_EFFECT]


class StreamOptions(_Checked):
    """Of a streamed answer."""

    include_usage: bool = False


class Format(_Checked):
    """Of an answer; there is one."""

    type: Literal["text"]


class Common(_Checked, abc.ABC):
    """What completions and chats have in common; see OpenAI's reference.

    `top_k`, `min_p`, `repetition_penalty` and `budget` are ours. They are those of
    `jaxkv.Categorical` and `jaxkv.Engine.submit`.
    """

    model: str
    n: Count = 1
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    response_format: Format = Format(type="text")
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=MOST)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    budget: Count | None = None

    @property
    def stops(self) -> list[str]:
        """Strings that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def sampler(self) -> Greedy | Categorical:
        """How tokens are chosen."""
        if self.temperature == 0:
            return Greedy(repetition_penalty=self.repetition_penalty)
        return Categorical(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )

    @property
    @abc.abstractmethod
    def alternatives(self) -> int | None:
        """How many alternatives to each token are wanted; None for no logprobs."""


class Completion(Common):
    """Of `/v1/completions`."""

    prompt: str | _List[str] | _List[int] | _List[_List[int]]
    max_tokens: Annotated[int, Field(ge=0, le=MOST)] = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Count | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Texts, or lists of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        listed: Any = self.prompt
        return [listed] if listed and isinstance(listed[0], int) else listed

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to each token are wanted; None for no logprobs."""
        return self.logprobs


class Part(_Checked):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Checked):
    """Of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | _List[Part]

    def spoken(self) -> dict[str, str]:
        """Return it as chat templates take it."""
        said = self.content
        text = said if isinstance(said, str) else "".join(part.text for part in said)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text}


class Chat(Common):
    """Of `/v1/chat/completions`."""

    messages: Annotated[_List[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to each token are wanted; None for no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None


B = TypeVar("B", Completion, Chat)


def parse(kind: type[B], body: bytes) -> B:
    """Return the body of a request, checked.

    Args:
      kind: what it is to be.
      body: JSON.

    Raises:
      Refusal: it is not; the message names the field and holds nothing else of it.
    """
    try:
        given = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError:
        raise Refusal(400, "The body is no valid JSON in UTF-8.") from None
    if not isinstance(given, dict):
        raise Refusal(400, "The body must be a JSON object.")
    try:
        made = kind.model_validate(_without_nulls(given))
    except ValidationError as error:
        found = _telling(error.errors(include_url=False, include_input=False))
        place = [part[:_LONGEST_SHOWN] for part in _place(given, found)]
        name = place[0] if place else None
        message = f"{'.'.join(place) or 'body'}: {found['msg']}."
        raise Refusal(400, message, param=name) from None
    _refuse_others(made)
    return made


def _telling(errors: list[Any]) -> Any:
    """Return the error that says most of the first wrong field.

    Where a field may be of several types, each of them has errors, and the one that was
    meant is right the farthest; one that was wrong from the start says "_type".
    """
    of_field = [e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]]

    def reached(error):
        indices = [part for part in error["loc"] if isinstance(part, int)]
        return len(error["loc"]), indices, not error["type"].endswith("_type")

    return max(of_field, key=reached)


def _place(given: Any, error: Any) -> list[str]:
    """Return where in a body an error is, without the names of types on the way."""
    place = []
    for part in error["loc"]:
        if isinstance(given, dict) and part in given:
            given = given[part]
        elif isinstance(given, list) and isinstance(part, int):
            given = given[part] if part < len(given) else None
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        place.append(str(part))
    return place


def _without_nulls(given: dict[str, Any]) -> dict[str, Any]:
    """Drop what is null, in messages and options, too: it asks for nothing."""
    kept = {name: value for name, value in given.items() if value is not None}
    if isinstance(kept.get("messages"), list):
        kept["messages"] = [
            _without_nulls(m) if isinstance(m, dict) else m for m in kept["messages"]
        ]
    if isinstance(kept.get("stream_options"), dict):
        kept["stream_options"] = _without_nulls(kept["stream_options"])
    return kept


def _refuse_others(made: Completion | Chat) -> None:
    """Raise Refusal for what this server does not have."""
    others = made.others() + made.stream_options.others()
    if isinstance(made, Chat):
        others += [name for message in made.messages for name in message.others()]
        if made.top_logprobs is not None and not made.logprobs:
            message = "top_logprobs does nothing without logprobs: true."
            raise Refusal(400, message, param="top_logprobs")
    elif made.best_of not in (None, made.n):
        raise Refusal(400, "best_of must be n, or left out.", param="best_of")
    if others:
        name = others[0][:_LONGEST_SHOWN]
        raise Refusal(400, f"{name} is not supported by this server.", param=name)
