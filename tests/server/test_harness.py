"""lm-evaluation-harness against a server. Skipped without it, and slow.

Run it where `tests/evaluation/test_harness.py` says, with the harness' extra `api`.
"""

import json

import pytest
from server.http_served import Running

import jaxkv

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval")
for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package)
pytest.importorskip("tenacity", reason="needs the harness' extra `api`")

TEXTS = ["The magic number is", "one two three four five six seven", "A b"]
CHOICES = [" seven", " eight nine", " 5"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [dict(question=text, answer=1) for text in TEXTS]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = dict(
        dataset_path="json",
        dataset_kwargs=dict(data_files=dict(test=str(folder / "data.jsonl"))),
        test_split="test",
        doc_to_text="{{question}}",
    )
    choose = dict(
        task="choose",
        output_type="multiple_choice",
        doc_to_target="answer",
        doc_to_choice=CHOICES,
        target_delimiter="",
        metric_list=[dict(metric="acc")],
    )
    write = dict(
        task="write",
        output_type="generate_until",
        doc_to_target="{{answer}}",
        generation_kwargs=dict(until=["\n\n"], max_gen_toks=12, do_sample=False),
        metric_list=[dict(metric="exact_match")],
    )
    for task in (choose, write):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(common | task))
    return folder


@pytest.mark.slow
def test_the_harness_weighs_and_generates_over_the_api(wide_lm, tiny, tasks):
    from lm_eval.tasks import TaskManager

    with Running(wide_lm, engine={"top_logprobs": 1}, top_logprobs=1) as served:
        found = lm_eval.simple_evaluate(
            "local-completions",
            model_args=dict(
                model="tiny",
                base_url=f"{served.url}/completions",
                tokenizer=str(tiny),
                num_concurrent=4,
                max_length=128,
            ),
            tasks=["choose", "write"],
            task_manager=TaskManager(include_path=str(tasks)),
            bootstrap_iters=0,
        )

    def ids(text):
        return wide_lm.tokenizer(text, add_special_tokens=False)["input_ids"]

    for sample in found["samples"]["choose"]:
        prompt = ids(sample["doc"]["question"])
        scores = jaxkv.score(wide_lm, [prompt], [ids(c) for c in CHOICES])
        for (told,), total, best in zip(
            sample["resps"], scores.totals, scores.greedy, strict=True
        ):
            assert float(told[0]) == pytest.approx(total, abs=1e-3)
            assert str(told[1]) == str(best)
    for sample in found["samples"]["write"]:
        prompt = ids(sample["doc"]["question"])
        (text,) = jaxkv.generate(wide_lm, [prompt], max_new_tokens=12).text
        assert sample["resps"][0][0] == text.partition("\n\n")[0]
