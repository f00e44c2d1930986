"""Units are run batch by batch, and what becomes of a batch that cannot run."""

import itertools
import json
import threading

import jax
import pytest
from questions_by_hand import FULL, SMALL, plan, question

import jaxkv
from jaxkv.evaluation import rows as folder_rows
from jaxkv.evaluation import sweep
from jaxkv.evaluation.methods import parse_budgets
from jaxkv.evaluation.rows import COLUMNS
from jaxkv.soundness import LogitsError


@pytest.fixture
def calls(monkeypatch):
    """Answer every prompt with " Red", and keep the arguments."""
    seen = []

    def generate(lm, prompts, **arguments):
        seen.append((prompts, arguments))
        stats = jaxkv.Stats(
            prompt_tokens=tuple(map(len, prompts)),
            cache_bytes=80 * len(prompts),
            slots=4,
            compile_seconds=0.0,
            prefill_seconds=0.0,
            decode_seconds=0.0,
            tokens_per_second=0.0,
            prefill_implementation="xla",
            decode_implementation="xla",
        )
        count = len(prompts)
        return jaxkv.Completion(
            decoded=(" Red",) * count,
            tokens=((1,),) * count,
            lengths=(1,) * count,
            finish_reason=("length",) * count,
            stats=stats,
        )

    monkeypatch.setattr(sweep, "generate", generate)
    return seen


def test_rows_say_what_came(calls):
    found = []
    units = plan([question(i) for i in range(5)], [SMALL], parse_budgets("6%,50%"))
    assert sweep.run_units(None, units, found.append, stop_ids=[7]).complete
    rows = [row for batch in found for row in batch.rows]
    assert len(rows) == 10
    assert set(rows[0]) == set(COLUMNS)
    assert rows[0]["score"] == 0.5 and rows[0]["exact"] == 0
    assert rows[0]["truncated"] == 1 and rows[0]["cache_bytes"] == 80
    assert json.loads(rows[0]["outputs"]) == ["red", "blue"]
    # The last batch is filled up, and what fills it is in no result.
    assert [len(prompts) for prompts, _ in calls] == [3, 3, 3, 3]
    assert [arguments["budget"] for _, arguments in calls] == [6, 6, 50, 50]
    assert calls[0][1]["stop_ids"] == [7] and calls[0][1]["max_new_tokens"] == 10


def test_mixed_batches_get_a_budget_per_row(calls):
    units = plan([question(0)], [SMALL], parse_budgets("6%,50%"), mixed=True)
    sweep.run_units(None, units, lambda batch: None)
    assert calls[0][1]["budget"] == [6, 50]


def test_one_wanted_string_may_be_enough_and_outputs_may_be_cut(calls):
    found = []
    units = plan([question(0)], [FULL], [])
    sweep.run_units(None, units, found.append, match="any", characters=3)
    (row,) = found[0].rows
    assert (row["score"], row["exact"]) == (1.0, 1)
    assert (row["prediction"], row["outputs"]) == (" R…", '["…')


def test_no_batch_begins_after_the_deadline(calls):
    units = plan([question(i) for i in range(5)], [FULL], [])
    ran = sweep.run_units(None, units, lambda batch: None, deadline=0.0)
    assert (ran.complete, ran.late, ran.failed) == (False, True, [])
    assert not calls


def test_programs_side_by_side_give_the_same_rows(calls):
    def rows(side_by_side):
        found = []
        units = plan(
            [question(i) for i in range(5)], [FULL, SMALL], parse_budgets("6,7")
        )
        sweep.run_units(None, units, found.append, side_by_side=side_by_side)
        return sorted(str(row) for batch in found for row in batch.rows)

    assert rows(3) == rows(1)


def test_an_error_ends_all_programs(calls, monkeypatch):
    counter, gate = itertools.count(), threading.Event()
    answer = sweep.generate

    def generate(lm, prompts, **arguments):
        if next(counter) == 0:
            gate.set()
            raise RuntimeError("full")
        gate.wait(10)
        return answer(lm, prompts, **arguments)

    monkeypatch.setattr(sweep, "generate", generate)
    units = plan([question(i) for i in range(40)], [FULL, SMALL], parse_budgets("6,7"))
    with pytest.raises(RuntimeError, match="full"):
        sweep.run_units(None, units, lambda batch: None, side_by_side=2)
    assert next(counter) < 30  # units have ten batches each, and there are three


def gpu_error():
    return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9")


@pytest.mark.parametrize("error", [MemoryError, gpu_error])
@pytest.mark.parametrize("mixed", [False, True])
def test_what_does_not_fit_runs_in_smaller_batches(calls, monkeypatch, error, mixed):
    """Of seven questions at two budgets, no batch has more than three rows."""
    answer, tried = sweep.generate, []

    def generate(lm, prompts, **arguments):
        tried.append(len(prompts))
        if len(prompts) > 3:
            raise error()
        return answer(lm, prompts, **arguments)

    monkeypatch.setattr(sweep, "generate", generate)
    found, said = [], []
    some = [question(i) for i in range(7)]
    units = plan(some, [SMALL], parse_budgets("6,7"), mixed=mixed, batch_size=8)
    ran = sweep.run_units(None, units, found.append, tell=said.append)
    assert ran.complete and max(tried) > 3
    keys = [folder_rows.key(row) for batch in found for row in batch.rows]
    assert len(keys) == len(set(keys)) == 14
    assert "small at 6, 100 tokens: out of memory with" in said[0]
    assert "goes on with" in said[0]


@pytest.mark.parametrize("side_by_side", [1, 2])
def test_what_never_fits_is_left_out_and_the_rest_runs(
    calls, monkeypatch, side_by_side
):
    answer = sweep.generate

    def generate(lm, prompts, **arguments):
        if arguments["budget"] == 7 and any(ids[0] == 1 for ids in prompts):
            raise MemoryError
        return answer(lm, prompts, **arguments)

    monkeypatch.setattr(sweep, "generate", generate)
    found = []
    units = plan([question(i) for i in range(3)], [SMALL], parse_budgets("6,7,8"))
    ran = sweep.run_units(None, units, found.append, side_by_side=side_by_side)
    assert (ran.complete, ran.late) == (False, False)
    assert ran.failed == ["small at 7, 100 tokens: 2 rows"]
    there = sorted((r["budget"], r["index"]) for batch in found for r in batch.rows)
    assert there == sorted([(b, i) for b in "68" for i in range(3)] + [("7", 0)])


def test_what_cannot_be_scored_is_named_and_what_has_run_is_kept(calls, monkeypatch):
    answer = sweep.generate

    def generate(lm, prompts, **arguments):
        broken = {i: 0 for i, ids in enumerate(prompts) if ids[0] in (4, 5)}
        if broken:
            raise LogitsError(broken, "float16 holds no number beyond 65,504.")
        return answer(lm, prompts, **arguments)

    monkeypatch.setattr(sweep, "generate", generate)
    found = []
    units = plan([question(i) for i in range(8)], [SMALL], parse_budgets("6,7"))
    message = r"small at 6, questions 4, 5 of vt at 100 tokens: .* NaN .* 65,504"
    with pytest.raises(ValueError, match=message):
        sweep.run_units(None, units, found.append)
    assert [row["index"] for batch in found for row in batch.rows] == [0, 1, 2, 3]
