"""The fast road from a file of annotations to a reward model's folder, on a tiny causal model that stays as it is."""

import json

import numpy as np
import pytest

from openrlhf_pgrpo.cli.main import command_line
from openrlhf_pgrpo.models import factorize as fast
from openrlhf_pgrpo.models.factorized_reward import load

pytestmark = pytest.mark.host


def row(user, prompt, chosen, rejected, **more):
    return {"user": user, "prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def saved(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    """Users 0 to 3 prefer the answer with more exclamation marks, 4 to 7 the one with fewer; 40 pairs, each seen
    either way round."""
    rng = np.random.default_rng(0)
    rows = []
    for pair in range(40):
        loud, calm = (f"{rng.integers(1000)}{'!' * count}" for count in (rng.integers(6, 12), rng.integers(0, 4)))
        for user in range(8):
            chosen, rejected = (loud, calm) if user < 4 else (calm, loud)
            rows.append(row(f"u{user}", f"{pair} says: ", chosen, rejected))
    return saved(tmp_path_factory.mktemp("annotations") / "pairs.jsonl", rows)


def test_a_pair_is_the_same_either_way_round():
    rows = [("ana", "p", "b", "a", 1.0), ("ben", "p", "a", "b", 0.75), ("ana", "q", "a", "b", 0.5)]
    pairs, annotations = fast.annotate(rows)
    assert pairs == [("p", "a", "b"), ("q", "a", "b")]
    assert annotations.users == ["ana", "ben"]
    assert annotations.user.tolist() == [0, 1, 0] and annotations.pair.tolist() == [0, 0, 1]
    assert annotations.preference.tolist() == [0.0, 0.75, 0.5]


def test_the_command_writes_a_model_that_predicts_its_users(annotations, tiny, tmp_path, capsys):
    argv = ["factorize", "--data", annotations, "--backbone", tiny / "model", "--output", tmp_path / "m"]
    argv += ["--pooling", "mean", "--l2", 1, "--curve", tmp_path / "curve.png"]
    args = command_line().parse_args([*map(str, argv)])
    assert args.run(args) == 0
    printed = capsys.readouterr().out
    assert "recommended" in printed and printed.splitlines()[-1] == str(tmp_path / "m")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")

    model = load(tmp_path / "m")
    assert model.users == [f"u{user}" for user in range(8)]
    rows = fast.read(annotations)
    users, prompts, chosen, rejected, _ = zip(*rows)
    features = model.base_rewards(prompts, chosen) - model.base_rewards(prompts, rejected)
    own = model.coefficients[[model.users.index(user) for user in users]]
    assert ((features * own).sum(1) > 0).mean() > 0.95
    strangers = model.coefficients[[(model.users.index(user) + 4) % 8 for user in users]]
    assert ((features * strangers).sum(1) > 0).mean() < 0.05


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
def test_a_bad_row_is_refused_with_its_number(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fast.read(saved(tmp_path / "pairs.jsonl", rows))


def test_a_line_that_was_cut_is_refused_with_its_number(annotations, tmp_path):
    (tmp_path / "cut.jsonl").write_text(annotations.read_text()[:-30])
    with pytest.raises(ValueError, match="line 320 of"):
        fast.read(tmp_path / "cut.jsonl")


def test_nothing_is_written_where_nothing_was_fitted(annotations, tiny, tmp_path):
    argv = ["factorize", "--data", annotations, "--backbone", tiny / "model", "--output", tmp_path / "m"]
    for flags, message in {
        ("--factors", 9, "--l2", 1): "users",
        ("--factors", 2, "--curve", tmp_path / "no" / "c.png"): "--curve needs",
        ("--factors", 2, "--l2", 1, "--curve", tmp_path / "c.png"): "--curve needs something to choose",
    }.items():
        args = command_line().parse_args([*map(str, argv), *map(str, flags)])
        assert message in args.run(args)
    assert not (tmp_path / "m").exists()
