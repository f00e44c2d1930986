"""Train "needle", the checkpoint that ships with the package.

`jaxkv train OUT` runs the recipe below: about 9 minutes on one H200. Rows are made by
`needle_rows` while the device computes; the row of a step depends on the seed and the
step alone, so a resumed run sees the rows that an uninterrupted one would have seen.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

from jaxkv.kernels import prefill
from jaxkv.models.config import Config
from jaxkv.models.decoder import Decoder, random_parameters
from jaxkv.models.hf import export as hf_export
from jaxkv.models.hf import tokenizer as hf_tokenizer
from jaxkv.models.rope import Rope
from jaxkv.runtime.seeds import key_of

CONFIG = Config(
    vocab_size=4096,
    hidden_size=384,
    intermediate_size=1024,
    num_layers=8,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    rope=Rope(theta=500_000.0),
    max_positions=16_384,
    qk_norm=True,
    tied=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training at one length.

    Attributes:
      length: tokens of a row.
      rows: of a batch.
      steps: batches.
    """

    length: int
    rows: int
    steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what comes out.

    Attributes:
      config: the network.
      stages: in order; short rows first, because retrieval is learnt there fastest.
      learning_rate: at its plateau.
      warmup: steps of linear rise.
      decay: last fraction of all steps, in which the rate falls linearly to zero.
      weight_decay: on matrices.
      optimizer: "adamw" or "muon" (matrices by Muon, the rest by Adam).
      seed: of parameters and rows.
    """

    config: Config = CONFIG
    stages: tuple[Stage, ...] = (
        Stage(length=512, rows=128, steps=4500),
        Stage(length=2048, rows=32, steps=3500),
        Stage(length=8192, rows=8, steps=2500),
    )
    learning_rate: float = 3e-3
    warmup: int = 200
    decay: float = 0.35
    weight_decay: float = 0.05
    optimizer: str = "muon"
    seed: int = 0

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage(self, step: int) -> Stage:
        """Return the stage that a step belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise ValueError(f"step must be below {self.steps}, the end of the last stage.")


def make_optimizer(recipe: Recipe) -> Any:
    """Return the optax transformation of a recipe."""
    import optax
    from optax import contrib

    decay_steps = int(recipe.decay * recipe.steps)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, recipe.learning_rate, recipe.warmup),
            optax.constant_schedule(recipe.learning_rate),
            optax.linear_schedule(recipe.learning_rate, 0.0, decay_steps),
        ],
        [recipe.warmup, recipe.steps - decay_steps],
    )
    matrices = functools.partial(jax.tree.map, lambda x: x.ndim == 2)
    if recipe.optimizer == "adamw":
        update = optax.adamw(
            schedule, b2=0.95, weight_decay=recipe.weight_decay, mask=matrices
        )
    else:

        def orthogonalised(params):
            return jax.tree_util.tree_map_with_path(
                lambda path, x: (
                    contrib.MuonDimensionNumbers(0, 1)
                    if x.ndim == 2 and path[-1].key != "embedding"
                    else None
                ),
                params,
            )

        update = contrib.muon(
            schedule,
            weight_decay=recipe.weight_decay,
            weight_decay_mask=matrices,
            adam_b2=0.95,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=orthogonalised,
        )
    return optax.chain(optax.clip_by_global_norm(1.0), update)


def initial_parameters(recipe: Recipe) -> Any:
    """Draw float32 parameters, the residual branches' outputs scaled by depth."""
    params = random_parameters(recipe.config, key_of(recipe.seed), dtype=jnp.float32)
    scale = (2 * recipe.config.num_layers) ** -0.5
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x * scale if path[-1].key in ("output", "down") else x, params
    )


def loss(
    config: Config, params: Any, tokens: jax.Array, weights: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the weighted cross-entropy of next tokens, in nats, and some measures.

    Args:
      config: the network.
      params: float32; the network runs in bfloat16.
      tokens: integer `[B, T + 1]`.
      weights: `[B, T + 1]`, of each token as a label; 1 on answers.

    Returns:
      The loss, and `accuracy` of answer tokens and of whole rows (`rows_right`).
    """
    tokens = tokens.astype(jnp.int32)
    inputs, labels, weights = tokens[:, :-1], tokens[:, 1:], weights[:, 1:]
    weights = weights.astype(jnp.float32)
    network = Decoder(config)
    low = {"params": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)}
    implementation: prefill.Implementation = (
        "cudnn" if jax.default_backend() == "gpu" else "reference"
    )

    def attend(q, k, v, state, weighing):
        scale = config.head_dim**-0.5
        out = prefill.causal_attention(
            *(q, k, v),
            scale=scale,
            window=weighing.window,
            **weighing.softmax,
            implementation=implementation,
        )
        return out, state

    positions = jnp.broadcast_to(
        jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape
    )
    hidden, _ = network.apply(
        low, inputs, positions, (None,) * config.num_layers, attend
    )
    logits: Any = network.apply(low, hidden, method="unembed")
    log_norm = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    value = jnp.sum(weights * (log_norm - chosen)) / jnp.sum(weights)
    answer = weights == 1
    right = jnp.argmax(logits, axis=-1) == labels
    return value, {
        "accuracy": jnp.sum(right & answer) / jnp.sum(answer),
        "rows_right": jnp.mean(jnp.all(right | ~answer, axis=-1)),
    }


def batches(
    recipe: Recipe, tokenizer_folder: Path, *, first: int, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (tokens, weights) of every step from `first` on, made by processes."""
    chunks = 8
    ahead = 4 * workers
    pool = concurrent.futures.ProcessPoolExecutor(
        workers,
        # Forked children of a process that runs JAX may deadlock.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(str(tokenizer_folder),),
    )

    def jobs():
        for step in range(first, recipe.steps):
            stage = recipe.stage(step)
            for chunk in range(chunks):
                yield stage.length, stage.rows // chunks, step * chunks + chunk

    def submit(job):
        length, count, index = job
        return pool.submit(_make_rows, length, count, recipe.seed * 10**9 + index)

    with pool:
        queue = iter(jobs())
        pending = collections.deque(
            submit(job) for job in itertools.islice(queue, ahead)
        )
        while pending:
            parts = []
            for _ in range(chunks):
                parts.append(pending.popleft().result())
                job = next(queue, None)
                if job is not None:
                    pending.append(submit(job))
            tokens, weights = zip(*parts, strict=True)
            yield np.concatenate(tokens), np.concatenate(weights)


_tokenizer: Any  # of a worker


def _start_worker(tokenizer_folder: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    global _tokenizer
    _tokenizer = hf_tokenizer.read_tokenizer(Path(tokenizer_folder))


def _make_rows(length: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from jaxkv.needle import rows as needle_rows

    return needle_rows.rows(_tokenizer, length=length, count=count, seed=seed)


def train(
    recipe: Recipe,
    out: Path,
    *,
    tokenizer_folder: Path,
    workers: int,
    save_every: int = 1000,
    log_every: int = 50,
) -> None:
    """Train, or go on where an interrupted run in the same folder stopped.

    Args:
      recipe: what to train.
      out: folder; gets `state/` (Orbax), `log.jsonl`, and at the end `checkpoint/`, a
        Hugging Face folder.
      tokenizer_folder: of the tokenizer, copied into the checkpoint.
      workers: processes that make rows.
      save_every: steps between saved states.
      log_every: steps between lines of the log.
    """
    import orbax.checkpoint as ocp

    optimizer = make_optimizer(recipe)
    params = initial_parameters(recipe)
    state = {"params": params, "optimizer": optimizer.init(params)}
    out = Path(out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    manager = ocp.CheckpointManager(
        out / "state", options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    first = manager.latest_step() or 0
    if first:
        state = manager.restore(first, args=ocp.args.StandardRestore(state))

    step_fn = _step_of(recipe, optimizer)
    begin = time.perf_counter()
    window: list[dict[str, jax.Array]] = []
    data = batches(recipe, tokenizer_folder, first=first, workers=workers)
    with (
        open(out / "log.jsonl", "a") as log,
        rich.progress.Progress(
            *rich.progress.Progress.get_default_columns(),
            rich.progress.TextColumn("{task.fields[status]}"),
            console=rich.console.Console(stderr=True),
        ) as progress,
    ):
        task = progress.add_task(
            "train", total=recipe.steps, completed=first, status=""
        )
        for step, (tokens, weights) in enumerate(data, first + 1):
            state, measures = step_fn(state, tokens, weights)
            window.append(measures)
            if step % log_every == 0 or step == recipe.steps:
                means = {
                    name: round(float(np.mean([m[name] for m in window])), 5)
                    for name in window[0]
                }
                window = []
                record = {
                    "step": step,
                    "length": recipe.stage(step - 1).length,
                    "seconds": round(time.perf_counter() - begin, 2),
                } | means
                log.write(json.dumps(record) + "\n")
                log.flush()
                status = " ".join(f"{k} {v:.3f}" for k, v in means.items())
                progress.update(task, completed=step, status=status)
            if step % save_every == 0 or step == recipe.steps:
                manager.save(step, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()
    write_checkpoint(
        recipe.config, state["params"], out / "checkpoint", tokenizer_folder
    )


def _step_of(recipe: Recipe, optimizer: Any) -> Callable[..., Any]:
    """Return the compiled training step: state and batch in, state and measures out."""
    import optax

    @functools.partial(jax.jit, donate_argnums=0)
    def step_fn(state, tokens, weights):
        gradient = jax.value_and_grad(
            functools.partial(loss, recipe.config), has_aux=True
        )
        (value, measures), grads = gradient(state["params"], tokens, weights)
        updates, optimizer_state = optimizer.update(
            grads, state["optimizer"], state["params"]
        )
        new = optax.apply_updates(state["params"], updates)
        return {"params": new, "optimizer": optimizer_state}, {"loss": value} | measures

    return step_fn


def write_checkpoint(
    config: Config, params: Any, folder: Path, tokenizer_folder: Path
) -> None:
    """Write bfloat16 weights and the tokenizer's files as a Hugging Face folder."""
    tokenizer = hf_tokenizer.read_tokenizer(Path(tokenizer_folder))
    hf_export.write_qwen3(
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), params),
        config,
        folder,
        bos_id=tokenizer.bos_token_id,
        stop_ids=[tokenizer.eos_token_id],
        pad_id=tokenizer.pad_token_id,
        extra_files=sorted(Path(tokenizer_folder).glob("*token*.json")),
    )
