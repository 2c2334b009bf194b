"""The experiment on signals: its bandit is the paper's, and its traps are traps."""

import numpy as np
import pytest

import group_robust_signals as lab

pytestmark = pytest.mark.core

SMALL = dict(seeds=3, steps=150, prompts=32, samples=8)


@pytest.fixture(scope="module")
def world():
    return lab.World(states=100)


def test_features_by_hand():
    x, a = np.array([0.25, 0.75]), 1 + 3 / 8  # action 3
    cosine, sine = a * np.cos(np.pi * x), np.sin(np.pi * x) / a
    np.testing.assert_allclose(lab.features(x, 0)[3], [cosine[0], sine[0], cosine[1], sine[1]])
    np.testing.assert_allclose(lab.features(x[None], np.array([1]))[0, 3], [sine[0], cosine[0], sine[1], cosine[1]])


def test_regret_is_0_for_the_best_and_1_for_the_worst(world):
    for pref_group in (0, 1):
        for_it, against_it = 50 * lab.TASTE[[pref_group]], -50 * lab.TASTE[[pref_group]]
        assert world.regret(for_it)[0, pref_group] == pytest.approx(0, abs=0.01)
        assert world.regret(against_it)[0, pref_group] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("case", ["majority x5", "minority -10"])
def test_the_raw_reward_collapses_and_the_default_does_not(case, world):
    regret, alpha = lab.train("raw", case, **SMALL, world=world)
    assert (alpha[:, 0] > 0.99).all()
    default, moved = lab.train("quantiles", case, **SMALL, world=world)
    assert ((moved > 0.05) & (moved < 0.95)).all()  # of both
    assert default.max(1).mean() < regret.max(1).mean() - 0.01


def test_offset_and_scale_of_a_group_alone_change_nothing_for_the_default(world):
    # The minority's rewards less 10: the same advantages, so the same run
    for one, other in zip(lab.train("quantiles", "equal", **SMALL, world=world),
                          lab.train("quantiles", "minority -10", **SMALL, world=world)):  # fmt: skip
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_lambda_1_is_as_fast_as_quantiles_and_lambda_0_hardly_moves_the_weights(world):
    (_, quantiles), (_, one), (_, none) = (
        lab.train(method, "majority x5", **SMALL, world=world)
        for method in ("quantiles", "improvement", "improvement, lambda 0")
    )
    np.testing.assert_allclose(one.mean(0), quantiles.mean(0), atol=0.05)
    assert quantiles[:, 0].mean() > 0.6 and abs(none[:, 0].mean() - 0.5) < 0.1


def test_the_surrogate_loss_says_nothing(world):
    _, alpha = lab.train("surrogate", "majority x5", **SMALL, world=world)
    np.testing.assert_allclose(alpha, 0.5, atol=1e-9)


@pytest.mark.parametrize("name, least", [("seeds", 2), ("steps", 1), ("samples", 2)])
def test_a_table_of_nothing_is_refused(name, least, capsys):
    with pytest.raises(SystemExit):
        lab.main([f"--{name}", str(least - 1)])
    assert f"--{name} needs at least {least}, got {least - 1}" in capsys.readouterr().err


def test_the_table(capsys):
    lab.main(["--seeds", "2", "--steps", "3", "--prompts", "8", "--samples", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(lab.CASES) * len(lab.METHODS)
    assert lines[0].split() == "case weights worst regret mean regret minority alpha largest alpha".split()
