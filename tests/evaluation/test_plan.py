"""Methods and budgets from flags, and the order of the work."""

import pytest
from questions_by_hand import FULL, ROLLING, SMALL, plan, question

import jaxkv
from jaxkv.evaluation.experiment import whole
from jaxkv.evaluation.methods import (
    Budget,
    Method,
    parse_budgets,
    parse_decode_methods,
    parse_prefill_methods,
)
from jaxkv.evaluation.plan import check_positions


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


def test_prompts_of_a_file_are_padded_by_their_own_length():
    questions = [question(i, prompt=60 + 100 * i) for i in range(4)]
    assert len(plan(questions, [FULL], [])) == 1
    units = plan(questions, [FULL], [], apart=True)
    lengths = [[len(row.question.ids) for row in unit.rows] for unit in units]
    assert lengths == [[60], [160], [260, 360]]


def test_a_unit_that_is_too_large_can_be_halved():
    questions = [question(i) for i in range(8)]
    (unit,) = plan(questions, [SMALL], parse_budgets("6,7"), mixed=True, batch_size=8)
    sizes = []
    half = unit
    while half := half.halved():
        sizes.append((half.size, half.copies))
        rows = [
            row.key
            for batch, real in half.batches()
            for row, counts in zip(batch, real, strict=True)
            if counts
        ]
        assert sorted(rows) == sorted(row.key for row in unit.rows)
    assert sizes == [(4, 2), (2, 2), (1, 1)]
    assert [r.key for r in unit.behind(1).rows] == [r.key for r in unit.rows[8:]]


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
        check_positions(tiny_lm, units)
    check_positions(tiny_lm, plan([question(0, new=1958)], [FULL], []))


def test_a_budget_knows_what_it_is():
    assert Budget(name="6%", value=6).is_percentage
    assert not Budget(name="6", value=6).is_percentage
