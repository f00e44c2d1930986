"""`jaxkv.evaluate`: policies as objects, and what `jaxkv eval` would say of them."""

import pytest

import jaxkv

TASKS = dict(tasks=["niah_single_1"], lengths=[160], samples=2, max_new_tokens=4)


def test_policies_are_compared(tiny_lm, tmp_path):
    methods = {
        "all": jaxkv.Full(),
        "mine": jaxkv.SnapKV(window_size=4),
        "pair": (jaxkv.KNorm(), jaxkv.StreamingLLM()),
    }
    folder = tmp_path / "run"
    found = jaxkv.evaluate(tiny_lm, methods, budgets=[64], folder=folder, **TASKS)
    assert [(row["method"], row["budget"]) for row in found.rows[::2]] == [
        *(("all", "full"), ("mine", "64"), ("pair", "64"))
    ]
    assert found.metrics["rows"] == found.metrics["wanted"] == len(found.rows) == 6
    assert "| mine |" in found.report and found._repr_markdown_() == found.report
    assert repr(found) == "Evaluation(6 rows; print its report)"
    again = jaxkv.evaluate(tiny_lm, methods, budgets=[64], folder=folder, **TASKS)
    assert again == found


@pytest.mark.parametrize(
    ("methods", "options", "message"),
    [
        ({"a": jaxkv.SnapKV}, {}, r"a must be a prefill policy, such as SnapKV\(\)"),
        ({"a": jaxkv.LongFlow()}, {}, "a must be a prefill policy and, in a pair"),
        ({"a": (jaxkv.KNorm(), jaxkv.KNorm())}, {}, "a decode policy behind it"),
        ({"a": 5}, {}, "a must be a prefill policy"),
        ({"a": jaxkv.KNorm()}, dict(tasks=["qa"]), "unknown task 'qa'; choose among"),
        ({"a": jaxkv.KNorm()}, dict(budgets=["x"]), "budgets= takes tokens such as"),
        (
            {"a": (jaxkv.KNorm(), jaxkv.LongFlow())},
            dict(protocol="query-agnostic"),
            "a evicts while decoding",
        ),
    ],
)
def test_bad_comparisons_are_named(tiny_lm, methods, options, message):
    with pytest.raises(ValueError, match=message):
        jaxkv.evaluate(tiny_lm, methods, **TASKS | options)
