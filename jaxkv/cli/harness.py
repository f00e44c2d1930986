"""`jaxkv lm-eval`: tasks of lm-evaluation-harness under a budget."""

import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxkv.cli import flags
from jaxkv.cli.groups import grouped
from jaxkv.cli.terminal import say
from jaxkv.evaluation.folder import check_writable
from jaxkv.language_model import NEEDLE
from jaxkv.provenance import provenance, write_json


@grouped
def lm_eval(
    *,
    model: flags.Model = NEEDLE,
    tasks: Annotated[str, typer.Option(help="Of the harness, with commas.")],
    eviction: flags.Eviction,
    limit: Annotated[
        float | None,
        typer.Option(help="Samples of each task, or a share of them below 1."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask in the model's chat template.")
    ] = False,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of tasks of your own, in YAML.")
    ] = None,
    metadata: Annotated[
        str | None,
        typer.Option(
            help='For tasks that make their data, in JSON: {"max_seq_lengths":[4096]}.'
        ),
    ] = None,
    batch_size: flags.BatchSize = 1,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of prompt and output; default: the model's."),
    ] = None,
    seed: flags.Seed = 0,
    dtype: flags.Dtype = None,
    follow_links: flags.FollowLinks = False,
    mesh: flags.Mesh = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON file of results and samples.")
    ] = None,
    json_: flags.Json = False,
) -> None:
    """Run tasks of lm-evaluation-harness, with a cache of fixed size.

    Log-likelihoods feel what is cut of a prompt; only what is generated, or a text
    without a prompt, feels a decode policy.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("jaxkv lm-eval needs a package; pip install 'jaxkv[lm-eval]'.")
    if out is not None:
        if out.is_dir():
            raise ValueError(f"--out takes a file, but {out} is a folder.")
        check_writable(out.parent)
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"--include-path {include_path} is no folder.")
    told = _read_metadata(metadata)
    evicted = eviction.arguments
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from jaxkv.evaluation.harness import JaxKV

    lm = flags.load_model(model, dtype, follow_links=follow_links, mesh=mesh)
    asked = JaxKV(
        lm, **evicted, batch_size=batch_size, max_length=max_length, seed=seed
    )
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    # Some of its tasks print; what we print is for programs to read.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        lm.tokenizer.save_pretrained(folder)  # for tasks that count tokens
        manager = TaskManager(
            include_path=None if include_path is None else str(include_path),
            metadata={"tokenizer": folder} | told,
        )
        if unknown := [x for x in names if x not in manager.all_tasks] or not names:
            raise ValueError(
                f"--tasks {tasks}: the harness has no {unknown or 'task of no name'}; "
                "lm-eval ls tasks shows all, --include-path adds your own."
            )
        with _packages_named(tasks):
            found = simple_evaluate(
                asked,
                tasks=names,
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=chat,
                bootstrap_iters=1000,
                random_seed=seed,
                log_samples=out is not None,
            )
    if out is not None:
        write_json(out, provenance() | {"harness": _plain(found)})
        say(f"{out}: results and samples")
    if json_:
        print(json.dumps(_plain({k: x for k, x in found.items() if k != "samples"})))
        return
    print(make_table(found))
    if found.get("groups"):
        print(make_table(found, "groups"))


@contextmanager
def _packages_named(tasks: str) -> Iterator[None]:
    """Say in one line which package a task of the harness lacks."""
    try:
        yield
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--tasks {tasks}: the harness needs a package for it: {reason}"
        ) from error


def _read_metadata(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError
    except ValueError:
        raise ValueError(f"--metadata takes a JSON object, got {text!r}.") from None
    return found


def _plain(found: Any) -> Any:
    """Return the harness' results ready for JSON, what is not as text."""
    return json.loads(json.dumps(found, default=str))
