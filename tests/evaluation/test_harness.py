"""Our models in lm-evaluation-harness. Skipped without it.

Run it in an environment of its own, since the harness brings fifty packages:
`pip install -e ".[test,parity,lm-eval]" accelerate peft`, then
`pytest -n 0 tests/evaluation/test_harness.py`. No test downloads anything.
"""

import dataclasses
import json
import math

import numpy as np
import pytest

import jaxkv

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from jaxkv.evaluation import harness  # noqa: E402
from jaxkv.evaluation.harness import JaxKV  # noqa: E402

SNAP = "[snapkv:window_size=2 kernel_size=1]"
TEXTS = ["The magic number is", "one two three four five six seven", "A"]


def instances(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=index)
        for index, one in enumerate(arguments)
    ]


def asked(**how):
    return instances("generate_until", *((text, how) for text in TEXTS))


PAIRS = [(TEXTS[0], " seven"), (TEXTS[1], " eight nine"), (TEXTS[0], " two"), ("", "x")]


def test_generation_is_that_of_generate(wide_lm):
    kept = dict(budget=8, prefill=SNAP, decode="streaming-llm:n_sink=1")
    model = JaxKV(wide_lm, batch_size=2, **kept)
    found = model.generate_until(asked(max_gen_toks=12), disable_tqdm=True)
    policies = dict(
        prefill=jaxkv.SnapKV(window_size=2, kernel_size=1),
        decode=jaxkv.StreamingLLM(n_sink=1),
    )
    alone = [
        jaxkv.generate(wide_lm, [t], max_new_tokens=12, budget=8, **policies).text[0]
        for t in TEXTS
    ]
    assert found == alone
    full = JaxKV(wide_lm).generate_until(asked(max_gen_toks=12), disable_tqdm=True)
    assert full != found, "the budget was not felt"
    (stop,) = {alone[0][3:5]}
    cut = model.generate_until(asked(max_gen_toks=12, until=[stop]), disable_tqdm=True)
    assert cut == [text.split(stop)[0] for text in alone]


def test_a_batch_ends_where_every_row_has_a_stop_string(wide_lm, monkeypatch):
    whole = JaxKV(wide_lm).generate_until(asked(max_gen_toks=128), disable_tqdm=True)
    letters = set.intersection(*(set(text[: len(text) // 8]) for text in whole))
    seen = []
    real = harness.generate

    def counted(*args, on_tokens, **how):
        def listen(new):
            seen.append(len(new))
            on_tokens(new)

        return real(*args, on_tokens=listen, **how)

    monkeypatch.setattr(harness, "generate", counted)
    until = sorted(letters)[:1]
    assert until, "no letter is in the beginning of each output"
    cut = JaxKV(wide_lm, batch_size=3).generate_until(
        asked(max_gen_toks=128, until=until), disable_tqdm=True
    )
    assert cut == [text.split(until[0])[0] for text in whole]
    assert len(seen) < 128 // 32, "it went on to the end"


@pytest.mark.parametrize(
    "how",
    [
        {},
        dict(budget=3, prefill="[streaming-llm:n_sink=1]"),
        dict(
            budget=4, prefill="streaming-llm:n_sink=1", decode="streaming-llm:n_sink=1"
        ),
        dict(compression_ratio=0.3, prefill=SNAP),
    ],
)
def test_likelihoods_are_those_of_score(wide_lm, how):
    model = JaxKV(wide_lm, batch_size=2, **how)
    found = model.loglikelihood(instances("loglikelihood", *PAIRS), disable_tqdm=True)
    decode = model._policies["decode"]  # a context of one token is never cut
    uncut = dict(budget=model._kept["budget"], decode=decode) if decode.evicts else {}
    for (before, rest), (total, greedy) in zip(PAIRS, found, strict=True):
        context = model.tok_encode(before) if before else [model.prefix_token_id]
        row = model.tok_encode(
            before + rest, add_special_tokens=None if before else False
        )
        alone = jaxkv.score(
            *(wide_lm, [context], [row[len(context) if before else 0 :]]),
            **(model._kept | model._policies if before else uncut),
        )
        assert total == pytest.approx(alone.totals[0], abs=1e-4)
        assert greedy == alone.greedy[0]


def test_a_context_is_read_once(wide_lm, monkeypatch):
    read = []
    real = harness.compress

    def counted(lm, contexts, **how):
        read.extend(map(tuple, contexts))
        return real(lm, contexts, **how)

    monkeypatch.setattr(harness, "compress", counted)
    pairs = [(text, f" {n}") for n in range(3) for text in TEXTS]
    JaxKV(wide_lm).loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    assert len(read) == len(TEXTS)


def test_rolling_likelihoods_go_over_a_text_once(wide_lm, caplog):
    text = " ".join(f"word {n}" for n in range(40))
    model = JaxKV(wide_lm, max_length=32, batch_size=2)
    requests = instances("loglikelihood_rolling", (text,), ("short",))
    found = model.loglikelihood_rolling(requests, disable_tqdm=True)
    ids = model.tok_encode(text, add_special_tokens=False)
    size = 31
    total = 0.0
    for first in range(0, len(ids), size):
        last = min(first + size, len(ids))
        # The last window has as much before it as fits.
        begin = (
            [model.prefix_token_id]
            if first == 0
            else ids[max(last - size - 1, 0) : first]
        )
        part = jaxkv.score(wide_lm, [begin], [ids[first:last]])
        total += part.totals[0]
    assert found[0] == pytest.approx(total, abs=1e-3)
    assert not caplog.records
    JaxKV(wide_lm, budget=8, prefill="knorm").loglikelihood_rolling(requests[1:], True)
    assert "have no prompt, so that prefill evicts nothing" in caplog.text


def test_long_prompts_lose_their_beginning(wide_lm, caplog):
    long = " ".join(map(str, range(99)))
    model = JaxKV(wide_lm, max_length=24, max_gen_toks=4)
    ids = model.tok_encode(long)
    (found,) = model.generate_until(
        instances("generate_until", (long, {})), disable_tqdm=True
    )
    assert found == jaxkv.generate(wide_lm, [ids[-20:]], max_new_tokens=4).text[0]
    assert "1 texts are longer than 24 tokens" in caplog.text
    (pair,) = model.loglikelihood(instances("loglikelihood", (long, " 7")), True)
    rest = model.tok_encode(long + " 7")[len(ids) :]
    alone = jaxkv.score(wide_lm, [ids[-(24 - len(rest)) :]], [rest])
    assert pair[0] == pytest.approx(alone.totals[0], abs=1e-4)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            dict(prefill="knorm"),
            "policies evict and need budget=, or compression_ratio=",
        ),
        (dict(decode="longflow"), "policies evict and need budget="),
        (dict(prefill="nope", budget=4), "prefill: unknown 'nope'"),
        (dict(budget=4, prefill="knorm:x=1"), "'x=1' is no option of knorm"),
        (dict(batch_size="auto"), "batch_size must be a whole number, got 'auto'"),
        (dict(max_length=1), "max_length=1 must be between 2 and 2048"),
        (dict(max_length=9999), "max_length=9999 must be between 2 and 2048"),
    ],
)
def test_bad_arguments(wide_lm, how, message):
    with pytest.raises(ValueError, match=message):
        JaxKV(wide_lm, **how)


def test_what_leaves_no_room(wide_lm):
    model = JaxKV(wide_lm, max_length=8)
    with pytest.raises(ValueError, match="output of 8 tokens leaves no room"):
        model.generate_until(asked(max_gen_toks=8), disable_tqdm=True)
    pair = instances("loglikelihood", ("a", " 1 2 3 4 5 6 7 8 9"))
    with pytest.raises(ValueError, match="tokens leaves no room for its context in"):
        model.loglikelihood(pair, disable_tqdm=True)
    with pytest.raises(ValueError, match="has no tokenizer, and tasks are texts"):
        JaxKV(dataclasses.replace(wide_lm, tokenizer=None))


TASKS = {
    "generate_until": dict(
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs=dict(until=["\n"], max_gen_toks=4),
        metric_list=[
            dict(metric="exact_match", aggregation="mean", higher_is_better=True)
        ],
    ),
    "multiple_choice": dict(
        doc_to_text="{{question}}",
        doc_to_choice=["seven", "two words", "a"],
        doc_to_target=0,
        metric_list=[dict(metric="acc", aggregation="mean", higher_is_better=True)],
    ),
    "loglikelihood_rolling": dict(
        doc_to_text="",
        doc_to_target="{{question}}",
        metric_list=[dict(metric="byte_perplexity")],
    ),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks, whose data lie beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    rows = [dict(question=text, answer="seven") for text in TEXTS]
    data.write_text("\n".join(map(json.dumps, rows)))
    for kind, task in TASKS.items():
        common = dict(
            task=f"local_{kind}",
            output_type=kind,
            dataset_path="json",
            dataset_kwargs=dict(data_files=dict(test=str(data))),
            test_split="test",
        )
        (folder / f"{kind}.yaml").write_text(json.dumps(common | task))
    return folder


def metrics(found):
    return {
        name: {k: x for k, x in row.items() if "stderr" not in k}
        for name, row in found["results"].items()
    }


@pytest.mark.slow
def test_the_harness_own_backend_finds_the_same(tiny, tasks):
    """With torch and transformers it reads the checkpoint that we read."""
    pytest.importorskip("accelerate", reason="its backend needs accelerate and peft")
    pytest.importorskip("torch", reason="its backend needs torch")
    kinds = ["generate_until", "multiple_choice"]

    def run(model, *kinds, **how):
        return lm_eval.simple_evaluate(
            model,
            model_args=dict(pretrained=str(tiny), dtype="float32") | how,
            tasks=[f"local_{kind}" for kind in kinds],
            task_manager=TaskManager(include_path=str(tasks)),
            bootstrap_iters=0,
            device="cpu",
        )

    found = [run(model, *kinds) for model in ("jaxkv", "hf")]
    assert metrics(found[0]) == metrics(found[1])
    # Of a whole text it predicts BOS behind BOS, unless it is told to have none.
    rolling = [
        metrics(run(model, "loglikelihood_rolling", **how))[
            "local_loglikelihood_rolling"
        ]
        for model, how in (("jaxkv", {}), ("hf", dict(add_bos_token=False)))
    ]
    assert rolling[0]["byte_perplexity,none"] == pytest.approx(
        rolling[1]["byte_perplexity,none"], rel=1e-4
    )
    for mine, other in zip(
        *(done["samples"]["local_generate_until"] for done in found), strict=True
    ):
        assert mine["resps"] == other["resps"]
    for mine, other in zip(
        *(done["samples"]["local_multiple_choice"] for done in found), strict=True
    ):
        for (a, b), (c, d) in zip(
            *(np.squeeze(x["resps"], 1).tolist() for x in (mine, other)), strict=True
        ):
            assert math.isclose(float(a), float(c), abs_tol=2e-3) and b == d
    assert get_model("jaxkv") is JaxKV
    text = "pretrained={},budget=8,prefill=[streaming-llm:n_sink=2]"
    by_text = JaxKV.create_from_arg_string(text.format(tiny), {"batch_size": 2})
    assert by_text.get_model_info()["prefill"] == {"name": "StreamingLLM", "n_sink": 2}


@pytest.mark.slow
def test_the_command(jaxkv_, tiny, tasks, tmp_path):
    command = ["lm-eval", tiny, "--include-path", tasks, "--limit", 2]
    names = "local_multiple_choice,local_generate_until"
    budget = ["--budget", 6, "--prefill", "streaming-llm:n_sink=1"]
    out = tmp_path / "new" / "found.json"
    code, text, _ = jaxkv_(*command, "--tasks", names, *budget, "--out", out)
    assert code == 0 and "local_multiple_choice" in text and "exact_match" in text
    found = json.loads(out.read_text())
    assert found["harness"]["n-samples"]["local_generate_until"]["effective"] == 2
    assert len(found["harness"]["samples"]["local_generate_until"]) == 2
    assert found["harness"]["config"]["budget"] == 6
    error = jaxkv_.error(*command, "--tasks", "nope")
    assert "--tasks nope: the harness has no ['nope']" in error
    assert "--metadata takes a JSON object" in jaxkv_.error(
        *command, "--tasks", names, "--metadata", "[1]"
    )


def test_a_package_that_a_task_lacks_is_named(jaxkv_, tiny, tasks, tmp_path):
    """Of a task whose functions import it."""
    (tmp_path / "asked.py").write_text("import no_such_package\n")
    asked = json.loads((tasks / "generate_until.yaml").read_text())
    asked = asked | dict(task="lacking")
    yaml = json.dumps(asked)[:-1] + ', "process_docs": !function asked.cut}'
    (tmp_path / "lacking.yaml").write_text(yaml)
    error = jaxkv_.error(
        "lm-eval", tiny, "--include-path", tmp_path, "--tasks", "lacking"
    )
    assert "--tasks lacking: the harness needs a package for it" in error
    assert "no_such_package" in error


@pytest.mark.slow
def test_ruler_makes_its_own_data(jaxkv_, tiny):
    """Variable tracking is made of nothing but words of the harness."""
    pytest.importorskip("wonderwords", reason="needs the harness' extra `ruler`")
    code, text, err = jaxkv_(
        *("lm-eval", tiny, "--tasks", "ruler_vt", "--limit", 1, "--budget", 64),
        *("--prefill", "streaming-llm", "--max-length", 512, "--json"),
    )
    assert code == 0, err
    found = json.loads(text)["results"]["ruler_vt"]
    assert found["4096,none"] in (0.0, *np.arange(6) / 5)
