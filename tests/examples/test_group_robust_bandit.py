"""The reproduced bandit: its parts by hand, its weights those of `GroupWeights`, and the paper's claims, reduced."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import group_robust_bandit as bandit
from openrlhf_pgrpo.core.group_weights import GroupWeights, RobustOptions

pytestmark = pytest.mark.core

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "reproduce" / "group_robust_bandit.py"


PLAIN, IS, GR = range(3)


# --- data ------------------------------------------------------------------------------------------------------------


def test_features_by_hand_and_one_reward_for_both_preference_groups():
    x, action = np.array([[1 / 3, 1 / 2]]), np.array([4])  # s = 3/2; cos 1/2 and 0, sin sqrt(3)/2 and 1
    own, other = [0.75, 0], [np.sqrt(3) / 3, 2 / 3]
    np.testing.assert_allclose(bandit.features(x, action, 0), [[own[0], other[0], own[1], other[1]]], atol=1e-15)
    np.testing.assert_allclose(bandit.features(x, action, 1), [[other[0], own[0], other[1], own[1]]], atol=1e-15)
    states, actions = np.random.default_rng(0).random((50, 2)), np.arange(50) % 8
    rewards = [bandit.features(states, actions, group) @ bandit.BEST[group] for group in (0, 1)]
    np.testing.assert_allclose(*rewards, rtol=1e-12)


def test_pairs_of_actions():
    rng = np.random.default_rng(0)
    first, second = bandit.draw_actions(rng, 10_000, 0, uneven=False)
    steps = np.bincount((second - first) % 8, minlength=8)
    assert steps[0] == 0 and steps[1:].min() > 1200  # any other action: 10,000/7 = 1429, error 35
    first, second = bandit.draw_actions(rng, 1000, 1, uneven=True)
    assert set((second - first) % 8) == {4} and set(first) == set(range(8))
    first, second = bandit.draw_actions(rng, 1000, 0, uneven=True)
    found = {action: set(second[first == action]) for action in range(8)}
    assert found == {0: {1}, 7: {6}, **{action: {action - 1, action + 1} for action in range(1, 7)}}


def test_the_higher_reward_is_chosen_and_mean_losses_are_those_of_a_preference_group():
    world = bandit.World.draw([bandit.SCENARIOS["iii"]], 3)
    assert world.pairs.shape == (3, 300, 4) and world.validation.shape == (3, 2, 500, 4)
    assert (world.pairs[:, :60] @ bandit.BEST[0] > 0).all() and (world.pairs[:, 60:] @ bandit.BEST[1] > 0).all()
    losses = np.random.default_rng(0).random((3, 300))
    means = losses[:, :60].mean(1), losses[:, 60:].mean(1)
    np.testing.assert_allclose(np.einsum("rb,rbg->gr", losses, world.member), means, rtol=1e-12)


def test_a_seed_is_the_same_whatever_runs_beside_it():
    together = bandit.run([*bandit.SCENARIOS], 3, {"DPO": 30, "IPO": 5})[0]
    alone = bandit.run(["iii"], 2, {"DPO": 30, "IPO": 5})[0]
    for method, values in alone["iii"].items():
        np.testing.assert_allclose(together["iii"][method][:, :2], values, rtol=1e-9, err_msg=method)
        assert abs(values[0, 0] - values[0, 1]) > 1e-6  # seeds differ


# --- learning --------------------------------------------------------------------------------------------------------


def small_problem():
    rng = np.random.default_rng(0)
    return rng.normal(size=(1, 4, 1)), rng.normal(size=(1, 30, 4)), rng.random((1, 30, 1))


def weighted_loss(kind, theta, pairs, weights):
    return (bandit.loss_of(kind, pairs @ theta) * weights).sum()


def test_a_step_of_dpo_goes_down_the_gradient_of_the_weighted_loss():
    theta, pairs, weights = small_problem()
    step = bandit.descend(theta, pairs @ theta, pairs, weights) - theta
    for i in range(4):
        bump = 1e-6 * np.eye(4)[i][:, None]
        above, below = (weighted_loss("DPO", theta + sign * bump, pairs, weights) for sign in (1, -1))
        slope = (above - below) / 2e-6
        assert step[0, i, 0] == pytest.approx(-bandit.RATE * slope, rel=1e-6)
    assert bandit.loss_of("DPO", np.array([np.log(3)])) == pytest.approx(-np.log(3 / 4))  # sigmoid(log 3) = 3/4


def test_the_closed_form_of_ipo_has_the_least_weighted_loss():
    theta, pairs, weights = small_problem()
    found = bandit.minimise(theta, pairs @ theta, pairs, weights)
    best = weighted_loss("IPO", found, pairs, weights)
    assert bandit.loss_of("IPO", np.array([2.0])) == pytest.approx(9)  # (2 - 1/(2 * 0.1))^2
    for bump in 1e-3 * np.random.default_rng(1).normal(size=(20, 4, 1)):
        assert weighted_loss("IPO", found + bump, pairs, weights) > best


@pytest.mark.parametrize("kind", ["DPO", "IPO"])
def test_weights_are_those_of_group_weights(kind):
    world = bandit.World.draw([bandit.SCENARIOS["iii"]], 1)
    thetas = bandit.learn(world, kind, 20, range(1, 20))[2]
    paths = [np.repeat(world.start[..., None], 3, -1), *thetas.values()]
    alpha = bandit.learn(world, kind, 20)[1]
    counts = {"hard": 60, "easy": 240}
    for method, options in enumerate(bandit.WEIGHTS.values()):
        weights = GroupWeights(RobustOptions(eta=bandit.ETA[kind], **options), counts)
        for theta in paths:  # all data are one batch
            losses = bandit.loss_of(kind, world.pairs[0] @ theta[0, :, method])
            weights.update(np.array([0, 1]), [losses[:60].mean(), losses[60:].mean()], [60, 240])
        np.testing.assert_allclose(alpha[0, method], weights.alpha, rtol=1e-10)
    assert list(alpha[0, PLAIN]) == [0.2, 0.8] and list(alpha[0, IS]) == [0.5, 0.5]
    assert abs(alpha[0, GR, 0] - 0.5) > 0.01


def test_a_policy_that_knows_the_reward_makes_no_error_and_the_opposite_one_does():
    world = bandit.World.draw([bandit.SCENARIOS["iii"]], 2)
    theta = np.stack([np.stack([10 * bandit.BEST[0], -bandit.BEST[0]], 1)] * 2)  # (R, F, M)
    errors = bandit.reward_errors(world, theta)
    assert np.abs(errors[:, 0, 0]).max() < 1e-12  # preference group 0 gets its best; group 1 has another theta*
    assert errors[:, 0, 1].min() > 0.05 and errors[:, 1, 1].min() > 0.05


# --- the paper's claims ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reduced():
    """A fifth of the iterations: two seconds."""
    return bandit.run([*bandit.SCENARIOS], 20, {"DPO": 2000, "IPO": 100})


def means(measured, measure):
    index = bandit.MEASURES.index(measure)
    return {method: values[index].mean() for method, values in measured.items()}


@pytest.mark.parametrize("kind", ["DPO", "IPO"])
@pytest.mark.parametrize("measure", ["max loss", "max reward error"])
def test_group_robust_is_best_for_the_worse_preference_group(reduced, kind, measure):
    measured = {name: means(methods, measure) for name, methods in reduced[0].items()}
    assert measured["iii"]["GR-" + kind] < 0.9 * measured["iii"]["IS-" + kind] < 0.9 * measured["iii"][kind]
    # balanced: importance sampling is plain training, to the last digits
    assert measured["ii"]["GR-" + kind] < 0.9 * measured["ii"]["IS-" + kind]
    assert measured["ii"]["IS-" + kind] == pytest.approx(measured["ii"][kind], rel=1e-6)
    # equally hard: importance sampling does nearly all of it
    assert measured["i"]["GR-" + kind] < measured["i"]["IS-" + kind] < 0.8 * measured["i"][kind]


def test_gr_dpo_equalises_the_losses_of_the_preference_groups(reduced):
    hard, easy = reduced[1]["iii"]["GR-DPO"][2000]
    assert abs(hard - easy) < 0.06
    for method in ("DPO", "IS-DPO"):
        hard, easy = reduced[1]["iii"][method][2000]
        assert hard - easy > 0.3
    average = means(reduced[0]["iii"], "average loss")
    assert average["GR-DPO"] > average["DPO"] + 0.03  # which has its price


def test_the_numbers_are_near_the_reference(reduced):
    for name, methods in reduced[0].items():
        for method, values in methods.items():
            for found, text in zip(values, bandit.REFERENCE[name][method]):
                if method == "DPO" and name == "i":  # goes on rising
                    continue
                assert found.mean() == pytest.approx(float(text.partition("±")[0]), rel=0.2), (name, method, text)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_table_and_writes_the_figure(tmp_path):
    figure = tmp_path / "bandit.png"
    figure.write_text("an old figure")
    command = [sys.executable, SCRIPT, "--seeds", "2", "--iterations", "20", "--out", figure]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert out.count("scenario") == 3 and out.count("GR-IPO") == 3 and ".468±.011" in out
    assert "nan" not in out and max(map(len, out.splitlines())) <= 119
    assert figure.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [figure]


def test_no_iteration_at_all_is_refused(capsys):
    with pytest.raises(SystemExit):
        bandit.main(["--iterations", "0"])
    assert "--iterations needs at least 1, got 0" in capsys.readouterr().err
