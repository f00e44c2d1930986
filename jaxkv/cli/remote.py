"""A conversation with a server of OpenAI's API, for `jaxkv chat --server`."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxkv.cli.serve import read_key
from jaxkv.cli.terminal import say

_NO_KEY = "none"  # the client would take one of the environment, which is not ours


class RemoteChat:
    """A conversation that a server answers; the transcript is kept here.

    Attributes:
      name: of the model.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None,
        key_file: Path | None,
        system: str | None,
        budget: int | None,
        settings: dict[str, Any],
        write: Callable[[str], None],
    ):
        """Ask the server what it has.

        Args:
          url: of the API, which often ends in /v1.
          model: as the server calls it; None is its first one.
          key_file: with the key that it wants, or None.
          system: what the system says first.
          budget: of each turn, or None.
          settings: fields of each request.
          write: takes the text of answers as it comes.

        Raises:
          ValueError: there is no such server or model, or no client for it here.
        """
        if importlib.util.find_spec("openai") is None:
            raise ValueError(
                "jaxkv chat --server needs openai; pip install 'jaxkv[serve]'."
            )
        import openai

        self._openai, self._url = openai, url
        key = read_key(key_file) or _NO_KEY
        with self._told():
            self._client = openai.OpenAI(base_url=url, api_key=key)
            self.name = model or next(iter(self._client.models.list())).id
        self._system, self._budget = system, budget
        self._settings, self._write = settings, write
        self._usage: Any = None
        self.reset()

    def reset(self) -> None:
        """Forget all that was said."""
        system = {"role": "system", "content": self._system}
        self._messages: list[Any] = [] if self._system is None else [system]

    def set_budget(self, budget: int | None) -> None:
        """Let the next turns keep so many tokens, at most the server's."""
        self._budget = budget

    def stats(self) -> str:
        """Return what the server has counted at the last turn."""
        budget = "the server's" if self._budget is None else self._budget
        if self._usage is None:
            return f"nothing said yet (budget {budget})"
        read, written = self._usage.prompt_tokens, self._usage.completion_tokens
        return f"{read} tokens read, {written} written (budget {budget})"

    def turn(self, text: str) -> None:
        """Say something and show the answer; Ctrl-C forgets the turn.

        Raises:
          ValueError: the server refuses it.
        """
        said = [*self._messages, {"role": "user", "content": text}]
        extra = {} if self._budget is None else {"budget": self._budget}
        own = {"top_k", "min_p", "repetition_penalty"} & set(self._settings)
        settings = {n: x for n, x in self._settings.items() if n not in own}
        extra |= {name: self._settings[name] for name in own}
        parts: list[str] = []
        try:
            with self._told():
                stream = self._client.chat.completions.create(
                    model=self.name,
                    messages=said,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body=extra,
                    **settings,
                )
                with stream:
                    for chunk in stream:
                        self._usage = chunk.usage or self._usage
                        for choice in chunk.choices:
                            parts.append(choice.delta.content or "")
                            self._write(parts[-1])
        except KeyboardInterrupt:
            self._write("\n")
            say("interrupted; this turn is forgotten")
            return
        self._write("\n")
        self._messages = [*said, {"role": "assistant", "content": "".join(parts)}]
        say(self.stats())

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Say what a server refuses, or that there is none, in one line."""
        openai = self._openai
        try:
            yield
        except openai.APIConnectionError:
            raise ValueError(f"--server {self._url}: nothing answers there.") from None
        except openai.APIStatusError as error:
            body = error.body if isinstance(error.body, dict) else {}
            said = body.get("message") or f"status {error.status_code}"
            raise ValueError(f"the server says: {said}") from None
        except openai.APIError as error:
            raise ValueError(f"the server says: {error.message}") from None
        except StopIteration:
            raise ValueError(f"--server {self._url} has no model.") from None
