"""Many clients of `jaxkv serve` at once: nothing lost, repeated or mixed up.

Each client asks one of some questions, with a seed, whole or as a stream, and compares
the answer with what `jaxkv.generate` gives alone; some leave in the middle of a stream.
The memory of the server's process is watched. Exit code 1 says that it did not hold.
"""

import asyncio
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

import jaxkv
from jaxkv.provenance import provenance, write_json

QUESTIONS = 48
LONGEST, TOKENS = 200, 48  # of prompts and answers
LEAVE = 0.1  # of all requests
FLAT = 1.05  # memory at the end against that after a third of the time


class Question(NamedTuple):
    """What is asked, and what is to come back."""

    prompt: list[int]
    seed: int
    text: str
    tokens: int


def questions(lm: jaxkv.LanguageModel) -> list[Question]:
    """Return some questions; one differs from the next in little."""
    rng = np.random.default_rng(0)
    base = rng.integers(3, lm.config.vocab_size, LONGEST).tolist()
    prompts = []
    for _ in range(QUESTIONS):
        prompt = base[: int(rng.integers(2, LONGEST))]
        prompt[-1] = int(rng.integers(3, lm.config.vocab_size))
        prompts.append(prompt)
    out = jaxkv.generate(
        lm,
        prompts,
        seed=list(range(QUESTIONS)),
        sampler=jaxkv.Categorical(),
        max_new_tokens=TOKENS,
    )
    columns = zip(prompts, range(QUESTIONS), out.text, out.lengths, strict=True)
    return [Question(*row) for row in columns]


class Clients:
    """What the clients have come to."""

    def __init__(self, url: str, asked: list[Question]):
        import openai

        self._openai = openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0)
        self._asked = asked
        self.counts = dict.fromkeys(("whole", "streamed", "left", "full"), 0)
        self.wrong: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self.tokens = 0

    async def run(self, clients: int, seconds: float) -> None:
        """Let so many clients ask for so long."""
        end = time.monotonic() + seconds
        await asyncio.gather(*(self._one(number, end) for number in range(clients)))
        await self._openai.close()

    async def _one(self, number: int, end: float) -> None:
        import openai

        rng = random.Random(number)
        while time.monotonic() < end:
            question = rng.choice(self._asked)
            kind = "streamed" if rng.random() < 0.5 else "whole"
            if rng.random() < LEAVE:
                kind = "left"
            begun = time.monotonic()
            try:
                said = await self._ask(question, kind)
            except openai.RateLimitError:
                self.counts["full"] += 1
                await asyncio.sleep(rng.random() / 10)
                continue
            except openai.OpenAIError as error:
                self.wrong.append({"kind": kind, "error": type(error).__name__})
                continue
            self.counts[kind] += 1
            if kind != "left":
                self.seconds.append(time.monotonic() - begun)
                self.tokens += question.tokens
                right = said == question.text
            else:
                right = question.text.startswith(said)
            if not right:
                self.wrong.append({"kind": kind, "seed": question.seed, "said": said})

    async def _ask(self, question: Question, kind: str) -> str:
        asked: dict[str, Any] = dict(model="needle", max_tokens=TOKENS)
        asked |= dict(prompt=question.prompt, seed=question.seed)
        if kind == "whole":
            answer = await self._openai.completions.create(**asked)
            return answer.choices[0].text
        parts = []
        async with await self._openai.completions.create(stream=True, **asked) as all_:
            async for chunk in all_:
                parts.append(chunk.choices[0].text)
                if kind == "left":
                    break
        return "".join(parts)


def resident(pid: int) -> float:
    """Return the memory of a process in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    if found is None:
        raise SystemExit(f"process {pid} has ended")
    return int(found[1]) / 1024


async def watch(pid: int, seconds: float) -> list[float]:
    """Return the memory of a process, once a second."""
    found = []
    for _ in range(int(seconds)):
        await asyncio.sleep(1)
        found.append(resident(pid))
    return found


def main(
    clients: int = 64,
    seconds: float = 120,
    rows: int = 16,
    out: Annotated[Path | None, typer.Option(help="File of results.")] = None,
):
    """Start a server, ask it, and compare."""
    flags = ["--port=0", f"--rows={rows}", "--max-prompt=256", f"--queue={clients}"]
    flags += [f"--max-new-tokens={TOKENS}", "--dtype=float32"]
    with tempfile.TemporaryFile("w+") as log:
        program = [sys.executable, "-m", "jaxkv", "serve", "needle", *flags]
        server = subprocess.Popen(program, stderr=log)
        try:
            asked = questions(jaxkv.load("needle", dtype="float32"))
            while True:
                log.seek(0)
                if found := re.search(r"http\S+/v1", log.read()):
                    break
                if server.poll() is not None:
                    raise SystemExit("the server has ended")
                time.sleep(0.5)
            told = Clients(found[0], asked)

            async def both() -> list[float]:
                asking = told.run(clients, seconds)
                return (await asyncio.gather(watch(server.pid, seconds), asking))[0]

            memory = asyncio.run(both())
        finally:
            server.terminate()
            code = server.wait(120)
    third = max(memory[: len(memory) // 3])
    numbers = sorted(told.seconds)
    result: dict[str, Any] = {
        "clients": clients,
        "seconds": seconds,
        "rows": rows,
        **told.counts,
        "wrong": told.wrong,
        "p50_seconds": numbers[len(numbers) // 2],
        "p99_seconds": numbers[len(numbers) * 99 // 100],
        "answered_tokens_per_second": round(told.tokens / seconds, 1),
        "memory_mb_after_a_third": third,
        "memory_mb_at_the_end": max(memory[-len(memory) // 3 :]),
        "exit_code": code,
    }
    print(result)
    if out is not None:
        write_json(out, result | provenance())
    grown = result["memory_mb_at_the_end"] > FLAT * third
    raise SystemExit(int(bool(told.wrong) or grown or code != 0))


if __name__ == "__main__":
    typer.run(main)
