"""Messages that reach a user of the command line name its flags."""

import ast
import re
from pathlib import Path

import pytest

import jaxkv
from jaxkv.cli import main as cli
from jaxkv.cli.wording import ARGUMENTS, in_flags, parameters

ROOT = Path(jaxkv.__file__).parent
COMMANDS = cli.every_command()
GENERATE = parameters(COMMANDS, ["generate"])
# Of `jaxkv.generate`, what the command line decides by itself.
WITHOUT_FLAG = {"lm", "prompts", "sampler", "pool", "on_tokens", "block"} | {
    "logprobs",
    "top_logprobs",
    "return_cache",
}
NAMES = ARGUMENTS - WITHOUT_FLAG - {"scores_implementation"}

SAID = {
    "generate: pass budget= or compression_ratio=, not both.": (
        "pass --budget or --compression-ratio, not both."
    ),
    "x.txt: the prompt has 30 tokens and budget=20, but prefill=Full() keeps "
    "all; choose a prefill policy that evicts, such as StreamingLLM(), or more.": (
        "x.txt: the prompt has 30 tokens and --budget 20, but --prefill full keeps "
        "all; choose a prefill policy that evicts, such as streaming-llm, or more."
    ),
    "generate: a prompt of 5 tokens and max_new_tokens=64 need 69 positions": (
        "a prompt of 5 tokens and --max-new-tokens 64 need 69 positions"
    ),
    "Categorical: temperature must be above 0, got -1.": (
        "--temperature must be above 0, got -1."
    ),
    "Greedy: repetition_penalty must be above 0": (
        "--repetition-penalty must be above 0"
    ),
    "top_p must be a number that float32 holds": (
        "--top-p must be a number that float32 holds"
    ),
    "budget must be at least 1 token, got 0.": (
        "--budget must be at least 1 token, got 0."
    ),
    "accept=TopK does nothing without drafts; pass speculate= too.": (
        "--accept top-k does nothing without drafts; pass --speculate too."
    ),
    "generate: pass prefill= to jaxkv.compress.": "pass --prefill to jaxkv compress.",
    "Chat.say: budget=3 is too small": "--budget 3 is too small",
    "use Greedy(), or decode=Full().": "use --temperature 0, or --decode full.",
    "generate: stop_ids[0] must be whole": "--stop-id[0] must be whole",
    "--prefill: unknown 'magic'": "--prefill: unknown 'magic'",
    # Neither files, nor options of policies, nor words.
    "max_new_tokens.txt: No such file": "max_new_tokens.txt: No such file",
    "a/budget=3 is no folder": "a/budget=3 is no folder",
    "DapQ: seed must be at least 0": "DapQ: seed must be at least 0",
    "--decode dapq:seed=3 is unknown": "--decode dapq:seed=3 is unknown",
    "streaming-llm:n_sink=4,budget=3": "streaming-llm:n_sink=4,budget=3",
    "holds results with samples=3": "holds results with samples=3",
    "the budget of a decode policy": "the budget of a decode policy",
    "no class Unknown() of ours": "no class Unknown() of ours",
}


@pytest.mark.parametrize(("message", "want"), SAID.items())
def test_messages_in_flags(message, want):
    assert in_flags(message, GENERATE) == want


def test_other_commands_have_other_flags():
    ruler = parameters(COMMANDS, ["--debug", "eval", "ruler", "needle"])
    message = "budget=3 is too small; choose prefill=StreamingLLM() and decode=Full()"
    assert in_flags(message, ruler) == (
        "--budgets 3 is too small; choose --methods streaming-llm and --decode full"
    )
    assert in_flags(message, []) == message
    decode = parameters(COMMANDS, ["bench", "decode"])
    assert in_flags("generate: budget=3", decode) == "--budget 3"
    card = parameters(COMMANDS, ["eval", "needle"])  # without a command: card
    assert in_flags("compression_ratio=3", card) == "--compression-ratio 3"


def messages():
    """Yield every message that the library raises, with numbers in its gaps."""
    rooms = ".", "policies", "runtime", "speculation", "text"
    for place in sorted(path for room in rooms for path in ROOT.glob(f"{room}/*.py")):
        for node in ast.walk(ast.parse(place.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("ValueError", "CheckpointError", "NotImplementedError"):
                yield place.stem, text(node.args[0])


def text(node):
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=values):
            return "".join(
                "7" if not isinstance(v, ast.Constant) else v.value for v in values
            )
    return ""


# Pure functions that no command calls with what a user has given.
PYTHON_ONLY = re.compile(
    r"set Options\(budget=\)|pool=|on_tokens=|revision=|documents="
)


MESSAGES = list(messages())


@pytest.mark.parametrize(
    "message", [m for _, m in MESSAGES], ids=[p for p, _ in MESSAGES]
)
def test_no_message_names_an_argument_of_python(message):
    if PYTHON_ONLY.search(message):
        return
    said = in_flags(message, GENERATE)
    names = "|".join(NAMES)
    assert not re.search(rf"(?<![\w-])({names})=", said), said
    longer = "|".join(name for name in NAMES if "_" in name)
    assert not re.search(rf"\b({longer})\b", said), said
    assert not re.search(r"\b[A-Z]\w+\(\)", said), said
    assert not said.startswith("generate:")


def test_the_messages_are_found():
    assert len(MESSAGES) > 60
    assert sum("budget" in message for _, message in MESSAGES) > 10
