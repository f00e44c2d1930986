"""Questions as a part of what is cut, and questions behind documents that were cut."""

import csv
import json

import numpy as np
import pytest

import jaxkv
from jaxkv.evaluation import questions, tables
from jaxkv.evaluation.experiment import Experiment, questions_of, run_experiment
from jaxkv.evaluation.methods import parse_budgets, parse_prefill_methods
from jaxkv.evaluation.questions import AGNOSTIC, Cell, apart, as_chat, draw_questions
from jaxkv.text.chat import encode_chat

CELL = Cell(task="niah_single_1", length=160)


def drawn(lm, samples=2):
    return draw_questions(lm, [CELL], samples=samples, seed=3)


def test_documents_and_questions_are_the_prompt(wide_lm):
    for question, whole in zip(
        apart(wide_lm, drawn(wide_lm)), drawn(wide_lm), strict=True
    ):
        assert 0 < question.document < len(question.ids)
        text = wide_lm.tokenizer.decode(question.ids[: question.document])
        assert "What is the special magic number" not in text
        np.testing.assert_array_equal(question.ids, whole.ids)
    chat = as_chat(wide_lm, drawn(wide_lm))
    for question in apart(wide_lm, chat, chat=True, system="Be brief."):
        said = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": question.sample.prompt},
        ]
        assert question.ids.tolist() == encode_chat(wide_lm, said)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("protocol", ["query-aware", AGNOSTIC])
def test_questions_are_the_same_however_many_are_tokenised_together(
    wide_lm, monkeypatch, protocol, chat
):
    asked = experiment(protocol=protocol, chat=chat)
    whole = drawn(wide_lm)
    if chat:
        whole = as_chat(wide_lm, whole)
    if protocol == AGNOSTIC:
        whole = apart(wide_lm, whole, chat=chat)
    monkeypatch.setattr(questions, "_TOGETHER", 1)
    found = questions_of(wide_lm, asked, lambda *done: None)
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        assert (one.document, one.sample) == (other.document, other.sample)


def experiment(methods="full,snapkv:window_size=4", budgets="50%,100%", **options):
    return Experiment(
        kind="ruler",
        cells=[CELL],
        methods=parse_prefill_methods(methods, decode="full"),
        budgets=parse_budgets(budgets),
        samples=2,
        seed=3,
        max_new_tokens=4,
        **options,
    )


@pytest.fixture(scope="module")
def folders(wide_lm, tmp_path_factory):
    """Folders of one experiment by both protocols."""
    places = {}
    for protocol in ("query-aware", AGNOSTIC):
        places[protocol] = tmp_path_factory.mktemp("runs") / protocol
        asked = experiment(protocol=protocol)
        run_experiment(wide_lm, asked, places[protocol], pictures=False)
    return places


def rows(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_document_is_cut_and_its_question_is_not(wide_lm, folders):
    questions = apart(wide_lm, drawn(wide_lm))
    found = rows(folders[AGNOSTIC])
    assert len(found) == 6  # all budgets, and the control
    for row in found:
        question = questions[int(row["index"])]
        size = question.document
        if row["budget"] == "50%":
            assert int(row["budget_tokens"]) == round(size / 2)
        context = jaxkv.compress(
            wide_lm,
            [question.ids[:size]],
            budget=int(row["budget_tokens"] or size),
            prefill=jaxkv.SnapKV(window_size=4),
        )
        out = jaxkv.generate(
            wide_lm, [question.ids[size:]], context=context, max_new_tokens=4
        )
        assert out.text == (row["prediction"],)
    whole, other = (
        {row["index"]: row["prediction"] for row in some if row["method"] == "full"}
        for some in (found, rows(folders["query-aware"]))
    )
    assert whole == other


def test_folders_say_their_protocol(wide_lm, folders):
    with pytest.raises(ValueError, match="query_aware=true, this run has"):
        run_experiment(
            *(wide_lm, experiment(protocol=AGNOSTIC), folders["query-aware"]),
            pictures=False,
        )


def test_what_evicts_while_decoding_is_refused(wide_lm, tmp_path):
    asked = experiment(protocol=AGNOSTIC)
    methods = parse_prefill_methods("snapkv", decode="longflow")
    asked = type(asked)(**{**vars(asked), "methods": methods})
    with pytest.raises(ValueError, match="evicts while decoding, but --protocol"):
        run_experiment(wide_lm, asked, tmp_path / "run", pictures=False)


def test_a_file_must_tell_questions_from_documents(jaxkv_, tiny, tmp_path):
    file = tmp_path / "asked.jsonl"
    line = {"context": "The number is 7. " * 9, "question": "\nWhich?", "answer": "7"}
    file.write_text(json.dumps(line))
    out = tmp_path / "run"
    command = ("eval", tiny, "--task-file", file, "--protocol", AGNOSTIC)
    options = ("--methods", "knorm", "--budgets", "25%", "--out", out, "--no-pictures")
    code, printed, _ = jaxkv_(*command, *options)
    assert code == 0 and "query-agnostic" in printed
    (row,) = rows(out)
    assert int(row["budget_tokens"]) < int(row["prompt_tokens"]) // 3
    file.write_text(json.dumps({"prompt": "Which?", "answer": "7"}))
    said = jaxkv_.error(*command, "--out", tmp_path / "other")
    assert "nothing tells it from what it is about" in said


def test_the_two_stand_side_by_side(jaxkv_, folders):
    aware, agnostic = folders.values()
    code, printed, _ = jaxkv_("eval", "report", aware, "--beside", agnostic)
    assert code == 0
    assert "50%, query-aware | 50%, query-agnostic" in printed
    assert tables.AGNOSTIC in printed
    said = jaxkv_.error("eval", "report", aware, "--beside", aware)
    assert "are both query-aware" in said
