"""The table of what goes with what is what the library says today."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import feature_matrix


def test_the_table_of_features_is_up_to_date():
    text = feature_matrix.README.read_text(encoding="utf-8")
    assert text == feature_matrix.written(text), (
        "a policy, a drafter or what goes with what has changed; run "
        "python tests/house/feature_matrix.py"
    )


def test_the_table_knows_yes_no_and_drafts():
    text = feature_matrix.matrix()
    assert {"yes", "no", "yes, drafts"} <= {c.strip() for c in text.split("|")}
