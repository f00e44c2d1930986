"""Methods and budgets from flags, the order of the work, and the folder it fills."""

import itertools
import json
import threading

import numpy as np
import pytest
import yaml

import jaxkv
from jaxkv.evaluation import folder, sweep
from jaxkv.evaluation.experiment import whole
from jaxkv.evaluation.folder import COLUMNS, Predictions
from jaxkv.evaluation.methods import (
    Budget,
    Method,
    parse_budgets,
    parse_decode_methods,
    parse_prefill_methods,
)
from jaxkv.evaluation.questions import Cell, Question
from jaxkv.tasks.samples import Sample

FULL = Method(name="full")
SMALL = Method(name="small", prefill=jaxkv.StreamingLLM())
ROLLING = Method(
    name="rolling", prefill=jaxkv.StreamingLLM(), decode=jaxkv.StreamingLLM()
)


def question(index, *, length=100, task="vt", prompt=90, new=10, answer=5, depth=None):
    cell = Cell(task=task, length=length, depth=depth)
    sample = Sample(
        task=task,
        segments=(("ask", False), (" red blue", True)),
        outputs=("red", "blue"),
        max_new_tokens=new,
    )
    ids = np.arange(prompt, dtype=np.int32) + index
    return Question(
        cell=cell,
        index=index,
        ids=ids,
        sample=sample,
        answer_tokens=answer,
        by_lines=False,
    )


def plan(questions, methods, budgets, *, limit=None, by_cell=False, **options):
    defaults = dict(
        whole=whole("ruler", questions),
        outputs=sweep.longest_outputs(questions, by_cell=by_cell, limit=limit),
        batch_size=4,
        mixed=False,
        done=set(),
    )
    return sweep.plan(questions, methods, budgets, **defaults | options)


def test_budgets():
    whole = [b.tokens(1000) for b in parse_budgets("1.5%, 50%,256,100%, .01%")]
    assert whole == [15, 500, 256, 1000, 1]
    assert [b.name for b in parse_budgets("6%,256")] == ["6%", "256"]


@pytest.mark.parametrize("text", ["", "x", "0", "0%", "101%", "-5", "1.5", "5%%"])
def test_bad_budgets(text):
    with pytest.raises(ValueError, match="--budgets takes"):
        parse_budgets(text)


def test_a_budget_given_twice():
    with pytest.raises(ValueError, match="'6%' twice"):
        parse_budgets("6%,3%,6%")


def test_methods_keep_their_options():
    text = "full, streaming-llm:n_sink=2,streaming-llm"
    found = parse_prefill_methods(text, decode="streaming-llm")
    assert [m.name for m in found] == ["full", "streaming-llm:n_sink=2", text[-13:]]
    assert found[1].prefill == jaxkv.StreamingLLM(n_sink=2)
    # The control is the whole cache, whatever follows the other methods.
    assert [m.decode for m in found] == [jaxkv.Full(), *2 * [jaxkv.StreamingLLM()]]
    assert [m.bounded for m in found] == [False, True, True]
    (found,) = parse_decode_methods("streaming-llm:n_sink=1", prefill="streaming-llm")
    assert found.decode == jaxkv.StreamingLLM(n_sink=1)
    assert found.prefill == jaxkv.StreamingLLM()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no method"),
        ("magic", "unknown 'magic'"),
        ("full,full", "'full' twice"),
        ("streaming-llm:n_sink=2,size=3", "'size=3' is no option"),
    ],
)
def test_bad_methods(text, message):
    with pytest.raises(ValueError, match=message):
        parse_prefill_methods(text, decode="full")


def test_methods_that_cannot_have_a_budget_are_named_before_anything_runs():
    with pytest.raises(ValueError, match=r"small at 2: StreamingLLM: budget=2"):
        plan([question(0)], [SMALL], parse_budgets("2"))
    bare = Method(name="bare", decode=jaxkv.StreamingLLM())
    with pytest.raises(ValueError, match=r"bare at 50: keeps 50 tokens .* up to 90"):
        plan([question(0)], [bare], parse_budgets("50"))
    plan([question(0)], [bare], parse_budgets("90"))


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [("ruler", (100, 100)), ("reasoning", (120, 120)), ("card", (60, 80))],
)
def test_a_percentage_is_of_what_its_kind_says(kind, tokens):
    both = [question(0, prompt=60, answer=20), question(1, prompt=80, answer=80)]
    assert tuple(map(whole(kind, both), both)) == tokens
    of_kind = {"whole": whole(kind, both), "mixed": True}
    (unit,) = plan(both, [SMALL], parse_budgets("50%"), **of_kind)
    assert [row.tokens for row in unit.rows] == [count / 2 for count in tokens]


def test_one_program_has_batches_of_one_size_and_one_output_length():
    questions = [question(i) for i in range(5)]
    questions += [question(i, task="niah_single_1", new=30) for i in range(4)]
    full, six, fifty = plan(questions, [FULL, SMALL], parse_budgets("6,50"))
    for unit in (full, six, fifty):
        assert (len(unit.rows), unit.size, unit.max_new_tokens) == (9, 3, 30)
        assert [len(batch) for batch, _ in unit.batches()] == [3, 3, 3]
    assert {row.tokens for row in full.rows} == {None}
    assert [{r.tokens for r in unit.rows} for unit in (six, fifty)] == [{6}, {50}]
    assert plan(questions, [SMALL], parse_budgets("6"), limit=7)[0].max_new_tokens == 7


def test_cells_may_have_output_lengths_of_their_own():
    questions = [question(0), question(0, task="niah_single_1", new=30)]
    units = plan(questions, [FULL], [], by_cell=True)
    assert [unit.max_new_tokens for unit in units] == [10, 30]


def test_mixed_batches_hold_every_budget():
    questions = [question(i) for i in range(8)]
    (unit,) = plan(
        questions, [SMALL], parse_budgets("10%,20%,50%"), mixed=True, batch_size=6
    )
    batches = list(unit.batches())
    for batch, _ in batches:
        # Both questions at one budget, then at the next, for each to be read once.
        assert [row.tokens for row in batch] == [10, 10, 20, 20, 50, 50]
        assert [row.question for row in batch] == [r.question for r in batch[:2]] * 3
    counted = [
        row.key for batch in batches for row, real in zip(*batch, strict=True) if real
    ]
    assert len(counted) == len(set(counted)) == 24
    (unit,) = plan(
        questions[:3], [SMALL], parse_budgets("10%,50%"), mixed=True, batch_size=4
    )
    (_, first), (_, last) = unit.batches()
    assert all(first) and last == [True, False, True, False]
    # Their cache has as many slots as the budget, so they cannot share a program.
    assert len(plan(questions, [ROLLING], parse_budgets("10,20"), mixed=True)) == 2


def test_lengths_have_programs_of_their_own():
    questions = [question(0), question(0, length=1000, prompt=900)]
    units = plan(questions, [SMALL], parse_budgets("6%"))
    assert [unit.rows[0].question.cell.length for unit in units] == [100, 1000]


def test_what_is_done_is_left_out():
    questions = [question(i, depth=0.5) for i in range(3)]
    (unit,) = plan(questions, [SMALL], parse_budgets("6%"))
    assert unit.rows[1].key == ("small", "6%", "vt", "100", "0.5", "1")
    done = {unit.rows[1].key}
    (unit,) = plan(questions, [SMALL], parse_budgets("6%"), done=done)
    assert [row.question.index for row in unit.rows] == [0, 2]
    assert unit.size == 2


def test_positions_are_checked_before_anything_runs(tiny_lm):
    units = plan([question(0, new=1990)], [FULL], [])
    with pytest.raises(ValueError, match="90 tokens and an output of 1990 exceed the"):
        sweep.check_positions(tiny_lm, units)
    sweep.check_positions(tiny_lm, plan([question(0, new=1958)], [FULL], []))


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
            text=(" Red",) * count,
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
    assert sweep.run_units(None, units, found.append, stop_ids=[7])
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
    assert not sweep.run_units(None, units, lambda batch: None, deadline=0.0)
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


@pytest.mark.parametrize(
    ("maps", "side_by_side", "times"), [(50, 1, 0), (51, 1, 2), (51, 2, 0)]
)
def test_programs_are_let_go_before_their_maps_are_used_up(
    calls, monkeypatch, tmp_path, maps, side_by_side, times
):
    cleared = []
    monkeypatch.setattr(sweep.jax, "clear_caches", lambda: cleared.append(1))
    monkeypatch.setattr(sweep, "MAPS", tmp_path / "maps")
    monkeypatch.setattr(sweep, "MOST_MAPS", tmp_path / "most")
    units = plan([question(0)], [FULL, SMALL], parse_budgets("6"))
    sweep.run_units(None, units, lambda batch: None)  # nothing tells
    (tmp_path / "maps").write_text("a map\n" * maps)
    (tmp_path / "most").write_text("100\n")
    sweep.run_units(None, units, lambda batch: None, side_by_side=side_by_side)
    assert len(cleared) == times


def test_an_error_ends_all_programs(calls, monkeypatch):
    counter, gate = itertools.count(), threading.Event()
    answer = sweep.generate

    def generate(lm, prompts, **arguments):
        if next(counter) == 0:
            gate.set()
            raise MemoryError("full")
        gate.wait(10)
        return answer(lm, prompts, **arguments)

    monkeypatch.setattr(sweep, "generate", generate)
    units = plan([question(i) for i in range(40)], [FULL, SMALL], parse_budgets("6,7"))
    with pytest.raises(MemoryError, match="full"):
        sweep.run_units(None, units, lambda batch: None, side_by_side=2)
    assert next(counter) < 30  # units have ten batches each, and there are three


CONFIG = {"kind": "ruler", "model": "tiny", "dtype": "float32", "seed": 5}
CONFIG |= {"cells": [(1, 2)], "methods": []}


def row(index, prediction='a\nb,"c" é'):
    values = dict.fromkeys(COLUMNS, 1) | {"depth": "", "prediction": prediction}
    return values | {"index": index}


def test_a_folder_can_be_gone_on_with(tmp_path):
    first = Predictions(tmp_path, CONFIG)
    first.append([row(0), row(1)])
    second = Predictions(tmp_path, CONFIG)
    assert second.done == first.done and len(second.done) == 2
    second.append([row(2)])
    rows = folder.read_rows(tmp_path)
    assert [r["index"] for r in rows] == ["0", "1", "2"]
    assert rows[0]["prediction"] == row(0)["prediction"]
    assert folder.read_config(tmp_path)["cells"] == [[1, 2]]


@pytest.mark.parametrize("lost", [1, 2, 5, 9, 12, 20])
def test_a_row_that_was_not_finished_is_dropped(tmp_path, lost):
    Predictions(tmp_path, CONFIG).append([row(0), row(1)])
    path = tmp_path / "predictions.csv"
    path.write_bytes(path.read_bytes()[:-lost])
    again = Predictions(tmp_path, CONFIG)
    assert {key[-1] for key in again.done} == {"0"}
    again.append([row(1)])
    assert [r["index"] for r in folder.read_rows(tmp_path)] == ["0", "1"]


def test_a_field_may_be_longer_than_csv_s_default_allows(tmp_path):
    Predictions(tmp_path, CONFIG).append([row(0, "a" * 200_000), row(1)])
    assert len(Predictions(tmp_path, CONFIG).done) == 2


def test_a_run_without_results_binds_nobody(tmp_path):
    """As after a mistake in its flags that showed only later."""
    Predictions(tmp_path, CONFIG)
    Predictions(tmp_path, CONFIG | {"seed": 6})
    assert folder.read_config(tmp_path)["seed"] == 6
    (tmp_path / "predictions.csv").unlink()  # now it may be somebody else's
    with pytest.raises(ValueError, match="holds results with seed=6"):
        Predictions(tmp_path, CONFIG)


def test_another_experiment_is_refused(tmp_path):
    Predictions(tmp_path, CONFIG).append([row(0)])
    with pytest.raises(ValueError, match="seed=5, this run has seed=6; choose another"):
        Predictions(tmp_path, CONFIG | {"seed": 6})
    (tmp_path / "config.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="it lacks cells, dtype, kind, methods"):
        Predictions(tmp_path, CONFIG)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not valid YAML"):
        Predictions(tmp_path, CONFIG)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"predictions but no config\.yaml"):
        Predictions(tmp_path, CONFIG)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({}))
    (tmp_path / "predictions.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has other columns than method"):
        folder.read_rows(tmp_path)
    (tmp_path / "predictions.csv").write_text('"a')
    with pytest.raises(ValueError, match="has other columns than method"):
        folder.read_rows(tmp_path)


@pytest.mark.parametrize("text", ["[", "{}", "[1]", '{"runs": 1}'])
def test_broken_circumstances_are_named(tmp_path, text):
    (tmp_path / "run_meta.json").write_text(text)
    with pytest.raises(ValueError, match=r"run_meta\.json holds no JSON object"):
        folder.add_run(tmp_path, {})


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no predictions\.csv"):
        folder.read_rows(tmp_path)
    with pytest.raises(ValueError, match=r"holds no config\.yaml"):
        folder.read_config(tmp_path)


def test_names_of_files():
    assert folder.safe_name("org/model") == "org--model"
    assert folder.safe_name("tova:a=8,b=1") == "tova-a=8-b=1"
    assert folder.safe_name("12.5%") == "12.5pct"
    assert folder.safe_name("::") == "-"


def test_a_budget_knows_what_it_is():
    assert Budget(name="6%", value=6).is_percentage
    assert not Budget(name="6", value=6).is_percentage
