"""`jaxkv study positions`: identities that hold for any model, and small hand cases."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.evaluation import position_study, query_probe
from jaxkv.evaluation.methods import parse_budgets
from jaxkv.evaluation.position_study import CONTENTS, Study
from jaxkv.evaluation.query_probe import Cosines
from jaxkv.evaluation.questions import Cell, draw_questions

STUDY = Study(
    tokens=8, sizes=(1, 4, 8), budgets=parse_budgets("6%,100"), window=4, steps=2
)


@pytest.fixture(scope="module")
def questions(tiny_lm):
    cells = [Cell(task="niah_multikey_uuid", length=300)]
    return draw_questions(tiny_lm, cells, samples=2, seed=0)


@pytest.fixture(scope="module")
def found(tiny_lm, questions):
    return position_study.measure(tiny_lm, questions, STUDY)


def table(found):
    return {(r["content"], r["position"]): r for r in found["table"]}


def test_right_content_at_the_right_position_is_the_truth(found):
    for name in Cosines._fields:
        record = table(found)["same", "same"][name]
        assert record["mean"] == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(record["layers"], 1, atol=1e-5)


def test_rotation_changes_nothing_at_the_right_position(found):
    for content in CONTENTS:
        record = table(found)[content, "same"]
        for pair in (("before", "after"), ("before_centred", "after_centred")):
            layers = [record[name]["layers"] for name in pair]
            np.testing.assert_allclose(*layers, atol=1e-5)
        if content != "same":
            assert record["after"]["mean"] < 0.999
    wrong = table(found)["same", "start"]
    assert abs(wrong["before"]["mean"] - wrong["after"]["mean"]) > 0.01


def test_the_offset_curve_goes_through_the_table(found):
    by_start = {record["start"]: record for record in found["offsets"]}
    assert list(by_start) == ["0%", "50%", "100%", "+32", "+64", "+128", "+256", "+512"]
    assert by_start["0%"]["after"] == table(found)["same", "start"]["after"]
    assert by_start["100%"]["after"]["mean"] == pytest.approx(1, abs=1e-5)


def test_windows(found, questions):
    kept = np.mean([len(question.ids) for question in questions])
    by_window = {(r["window"], r["size"]): r for r in found["windows"]}
    kinds = [
        "dapq, random",
        "dapq, nonsense",
        "dapq, prompt",
        "dapq, suffix",
        "snapkv",
        "snapkv, moved",
    ]
    assert set(by_window) == {
        *((kind, size) for kind in kinds for size in (1, 4, 8)),
        ("snapkv, recents", 4),
        ("sinks + recent", None),
        ("random tokens", None),
    }
    for record in by_window.values():
        for share in record["recall"].values():
            assert 0 <= share["mean"] <= 1
    # Of what is drawn at random, as much is right as is kept of the prompt.
    share = by_window["random tokens", None]["recall"]["100"]["mean"]
    assert share == pytest.approx(100 / kept, abs=0.15)
    assert "similarity" not in by_window["snapkv, recents", 4]


def test_moved_queries_are_those_of_the_same_tokens_behind_the_prompt(
    tiny_lm, questions
):
    """In the first layer, where a query depends on token and position only."""
    rng = np.random.default_rng(0)
    one = position_study._One(
        tiny_lm, questions[0].ids, np.arange(8), STUDY, padded=512, rng=rng
    )
    scores = dict(one._window_scores())
    # Windows of 1 and 4 have none of the prompt's first tokens, one of 8 has one.
    again, moved = scores["dapq, prompt"][0], scores["snapkv, moved"][0]
    np.testing.assert_allclose(again[:2], moved[:2], atol=1e-5)
    assert np.abs(again[2] - moved[2]).max() > 1e-4
    np.testing.assert_allclose(scores["dapq, suffix"][0], moved, atol=1e-5)
    # A window of one is the last token, which sees the whole prompt where it stands.
    assert np.abs(scores["snapkv"][0] - moved).max() > 1e-4
    assert scores["snapkv"].sum(-1) == pytest.approx(
        np.broadcast_to(np.array([1, 4, 8])[:, None], (2, 3, 4)), abs=1e-4
    )


def test_a_recording_holds_what_the_network_rotates(tiny_lm):
    """At position 0 nothing is rotated, so queries there are those before RoPE."""
    tokens = jnp.asarray([5, 6, 7, 8, 0, 0], jnp.int32)
    places = jnp.asarray([3, 1])

    def recorded(positions):
        return query_probe.record(
            tiny_lm.network,
            tiny_lm.params,
            tokens,
            jnp.asarray(positions),
            places,
            jnp.int32(2),
        )

    # The first layer's queries depend on token and position only.
    plain, moved = recorded([0] * 6), recorded([0, 9, 2, 30, 4, 5])
    back = query_probe.turn(moved.queries, jnp.asarray([-30, -9]), tiny_lm.network)
    np.testing.assert_allclose(back[0], plain.queries[0], atol=1e-5)
    assert np.abs(moved.queries[0] - plain.queries[0]).max() > 0.1
    np.testing.assert_allclose(plain.means, moved.means, atol=1)
    np.testing.assert_allclose(plain.means[0], moved.means[0], atol=1e-5)
    assert plain.queries.shape == (2, 2, 4, 8) and plain.keys.shape == (2, 2, 6, 8)


def test_window_scores_against_a_plain_softmax(getkey):
    queries = jax.random.normal(getkey(), (1, 3, 2, 4))
    keys = jax.random.normal(getkey(), (1, 1, 6, 4))  # two query heads share it
    visible, members = jnp.asarray([5, 5, 2]), jnp.asarray([[1, 0, 0], [0, 1, 1]])
    got = query_probe.window_scores(queries, keys, visible, members)
    want = np.zeros((2, 2, 6))
    for window, rows in enumerate(([0], [1, 2])):
        for row in rows:
            for head in range(2):
                seen = int(visible[row])
                logits = (
                    np.asarray(keys)[0, 0, :seen] @ np.asarray(queries)[0, row, head]
                )
                weights = np.exp(logits / 2)
                want[window, head, :seen] += weights / weights.sum()
    np.testing.assert_allclose(got[0], want, atol=1e-6)


def test_recall_by_hand():
    truth = jnp.asarray([[9.0, 8.0, 1.0, 2.0, 99.0]])
    scores = jnp.asarray([[1.0, 0.0, 5.0, 2.0, 7.0]])  # the last one is padding
    share = query_probe.recall(scores, truth, jnp.int32(4), budget=2)
    assert share.tolist() == [0.0]
    assert query_probe.recall(scores, truth, jnp.int32(4), budget=3)[0] == (
        pytest.approx(2 / 3)
    )


def test_a_cosine_of_nothing_is_zero():
    assert query_probe.cosine(jnp.zeros(3), jnp.ones(3)) == 0


def test_bad_prompts_are_refused(tiny_lm, questions):
    with pytest.raises(ValueError, match="needs prompts of more than 8000 tokens"):
        study = Study(tokens=8, sizes=(1,), budgets=parse_budgets("8000"))
        position_study.measure(tiny_lm, questions, study)
    with pytest.raises(ValueError, match="goes up to position"):
        study = Study(tokens=1200, sizes=(1,), budgets=parse_budgets("6%"))
        long = [Cell(task="niah_single_1", length=1400)]
        long = draw_questions(tiny_lm, long, samples=1, seed=0)
        position_study.measure(tiny_lm, long, study)

    class Bare:
        name, tokenizer = "bare", None

    with pytest.raises(ValueError, match="bare has no tokenizer"):
        position_study.measure(Bare(), questions, STUDY)


def test_without_a_command_there_is_help(jaxkv_):
    code, out, err = jaxkv_("study")
    assert code == 0 and "  positions " in out and not err


def test_the_command(jaxkv_, tiny, tmp_path, monkeypatch, found):
    asked = []

    def measure(lm, questions, *_, **__):
        asked.append(questions[0].ids.tolist())
        return found

    monkeypatch.setattr(position_study, "measure", measure)
    flags = ["--length=300", "--samples=2", "--sizes=8,1,4", "--budgets=6%,100"]
    out = tmp_path / "study.json"
    code, text, _ = jaxkv_("study", "positions", tiny, *flags, "--out", out)
    assert code == 0
    assert "| same | same | 1.0000 ± 0.0000 | 1.0000 ± 0.0000 |" in text
    assert "| sinks + recent |  |  |" in text and "| +512 |" in text
    record = json.loads(out.read_text())
    assert record["config"]["sizes"] == [1, 4, 8] and record["run_meta"]["device"]
    digests = {"weights", "network", "tokenizer", "questions", "jaxkv"}
    assert all(record["config"][name] for name in digests)
    code, text, _ = jaxkv_("study", "positions", tiny, *flags, "--json")
    assert json.loads(text)["table"] == record["table"]
    jaxkv_("study", "positions", tiny, *flags, "--development")
    assert asked[0] == asked[1] != asked[2]
    error = jaxkv_.error("study", "positions", tiny, "--task=ledger")
    assert "--task takes one of niah_single_1" in error and "got 'ledger'" in error
    error = jaxkv_.error("study", "positions", tiny, "--task=vt,quote")
    assert "got 'vt,quote'" in error
    text = tmp_path / "text.txt"
    text.write_text("A long text is of other words than a task. " * 200)
    given = ("--text", text, "--json")
    _, shown, _ = jaxkv_("study", "positions", tiny, *flags, *given)
    config = json.loads(shown)["config"]
    assert config["task"] == "text" and config["length"] == len(asked[3]) == 300
    error = jaxkv_.error("study", "positions", tiny, "--task=vt", "--text=pydoc")
    assert "of a --task or of a --text" in error
    seen = len(asked)
    error = jaxkv_.error("study", "positions", tiny, *flags, "--out", tmp_path)
    assert "--out takes a file" in error
    jaxkv_.error("study", "positions", tiny, *flags, "--out", out / "below-a-file")
    assert len(asked) == seen  # said before the work
