"""The fast path from a file of annotations to a reward model's folder, on a tiny causal model that stays as it is."""

import numpy as np
import pytest

from openrlhf_pgrpo.models import factorize as fast
from openrlhf_pgrpo.models.scoring import load

pytestmark = pytest.mark.host


def row(user, prompt, chosen, rejected, **more):
    return {"user": user, "prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def test_a_pair_is_the_same_either_way_round():
    rows = [("ana", "p", "b", "a", 1.0), ("ben", "p", "a", "b", 0.75), ("ana", "q", "a", "b", 0.5)]
    pairs, annotations = fast.annotate(rows)
    assert pairs == [("p", "a", "b"), ("q", "a", "b")]
    assert annotations.users == ["ana", "ben"]
    assert annotations.user.tolist() == [0, 1, 0] and annotations.pair.tolist() == [0, 0, 1]
    assert annotations.preference.tolist() == [0.0, 0.75, 0.5]


def test_what_is_written_predicts_what_was_fitted(annotations, tiny, tmp_path):
    assert fast.factorize(annotations, tiny / "model", tmp_path / "m", factors=1, l2=2.0) is None
    pairs, found = fast.annotate(fast.read(annotations))
    X = fast.differences(tiny / "model", pairs, "last")
    scale = np.sqrt(np.square(X).mean(0))
    fitted = fast.fit(X / scale, found, 1, 2.0)
    expected = X / scale @ fitted.head.T @ fitted.coefficients.T
    model = load(tmp_path / "m")
    prompts, first, second = zip(*pairs)
    written = (model.base_rewards(prompts, first) - model.base_rewards(prompts, second)) @ model.coefficients.T
    assert np.abs(written - expected).max() < 1e-4 * np.abs(expected).max()  # weights are saved in float32


@pytest.mark.parametrize(
    "rows, message",
    [
        ([row("a", "p", "x", "y"), {"user": "a"}], "line 2 of .* needs the column 'prompt', got 'user'"),
        ([row("", "p", "x", "y")], "line 1 of .* needs a user, got none in 'user'"),
        ([row("a", "p", ["x"], "y")], "line 1 of .* needs a text as 'chosen'"),
        ([row("a", "p", "x", "y", preference=2)], "line 1 of .* from 0 .* to 1 .* in 'preference', got 2"),
        ([row("a", "p", "x", "y", preference=True)], "got True"),
        ([], "needs at least one row"),
    ],
)
def test_a_bad_row_is_refused_with_its_number(rows, message, jsonl):
    with pytest.raises(ValueError, match=message):
        fast.read(jsonl("pairs.jsonl", rows))


def test_a_line_that_was_cut_is_refused_with_its_number(annotations, tmp_path):
    (tmp_path / "cut.jsonl").write_text(annotations.read_text()[:-30])
    with pytest.raises(ValueError, match="line 320 of"):
        fast.read(tmp_path / "cut.jsonl")
