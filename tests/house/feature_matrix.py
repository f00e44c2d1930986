"""What goes with what, asked of the library itself: the tables of `jaxkv/README.md`.

Run as a script, it writes them anew; `test_feature_matrix` says when that is needed.
"""

from pathlib import Path
from unittest import mock

from jaxkv import registry
from jaxkv.kernels import dispatch
from jaxkv.options import Options

README = Path(__file__).resolve().parents[2] / "jaxkv" / "README.md"
BEGIN, END = "<!-- feature_matrix.py: begin -->\n", "<!-- feature_matrix.py: end -->\n"
BUDGET = 512  # room for every policy and every draft
PLATFORMS = {"CPU": "cpu", "NVIDIA GPU": "gpu", "TPU": "tpu"}


def accepted(**options) -> bool:
    """Whether the library takes these options."""
    try:
        Options(budget=BUDGET, **options).check()
    except ValueError:
        return False
    return True


def cell(prefill, decode) -> str:
    """Say whether two policies go together, and which drafts go with both."""
    if not accepted(prefill=prefill, decode=decode):
        return "no"
    drafters = [make() for make in registry.SPECULATE.values()]
    together = [
        accepted(prefill=prefill, decode=decode, speculate=drafter, accept=rule())
        for drafter in drafters
        for rule in registry.ACCEPT.values()
    ]
    return "yes, drafts" if all(together) else "some drafts" if any(together) else "yes"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "".join(
        [row(*head), "|" + "---|" * len(head) + "\n", *(row(*r) for r in rows)]
    )


def matrix() -> str:
    """Return both tables."""
    decode = {name: make() for name, make in registry.DECODE.items()}
    together = table(
        ["prefill \\ decode", *(f"`{name}`" for name in decode)],
        [
            [f"`{name}`", *(cell(make(), policy) for policy in decode.values())]
            for name, make in registry.PREFILL.items()
        ],
    )
    with mock.patch.object(dispatch, "triton_unavailable", lambda: ""):
        kernels = [
            [f"`{name}`", *map(policy.default_implementation, PLATFORMS.values())]
            for name, policy in decode.items()
        ]
    return f"{together}\n{table(['decode', *PLATFORMS], kernels)}"


def written(text: str) -> str:
    """Return the text with the tables between its marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{matrix()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
