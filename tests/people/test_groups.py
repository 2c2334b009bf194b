"""Preference groups: found where they are, one where there is one, and chances that follow Bayes' rule."""

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import multivariate_normal

from openrlhf_pgrpo.core.posterior import Prior, log_evidence
from openrlhf_pgrpo.models.profiles import Answer, Profile
from openrlhf_pgrpo.models.tables import Table
from openrlhf_pgrpo.people.groups import assign, chances_of, cluster, describe_choice, describe_new, name_users

pytestmark = pytest.mark.core

CENTRES = np.array([[4.0, 0.0], [-3.0, 3.0], [0.0, -4.0]])


def crowd(sizes=(60, 30, 15), scale=1.0, seed=0):
    """Users around the centres, mixed, and which centre each is from."""
    rng = np.random.default_rng(seed)
    which = rng.permutation(np.repeat(range(len(sizes)), sizes))
    return scale * (CENTRES[which] + rng.normal(0, 0.7, (len(which), 2))), which


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_three_kinds_of_people_are_found_at_any_scale(scale):
    coefficients, which = crowd(scale=scale)
    found = cluster(coefficients)
    assert found.names == ["group-1", "group-2", "group-3"]  # the largest first
    assert (found.of_users.argmax(1) == which).all()
    assert found.shares == pytest.approx([60 / 105, 30 / 105, 15 / 105], abs=0.01)
    assert found.means / scale == pytest.approx(CENTRES, abs=0.5)
    assert found.covariance / scale**2 == pytest.approx(0.49 * np.eye(2), abs=0.15)
    assert min(found.criteria, key=found.criteria.get) == 3 and set(found.criteria) == set(range(1, 11))


def test_people_who_differ_by_degrees_are_one_preference_group_unless_told():
    coefficients = np.random.default_rng(1).normal(0, 1, (200, 3))
    assert len(cluster(coefficients).shares) == 1
    assert len(cluster(coefficients, 4).shares) == 4


def test_d17_what_was_not_tried_is_not_claimed():
    """Eight users in two clear camps: too few for the choice, and that is what is said."""
    camps = np.repeat([[3.0, 0.0], [-3.0, 0.0]], 4, 0) + np.random.default_rng(0).normal(0, 0.1, (8, 2))
    (line,) = describe_choice(cluster(camps), 8)
    assert line.startswith("only one preference group was tried: 8 users are too few to choose more, 5 for each")
    assert "by degrees" in describe_choice(cluster(np.random.default_rng(1).normal(0, 1, (200, 3))), 200)[1]


def camps(*scales, shift=0.0, sizes=(50, 50)):
    """Users of two camps, ±1 with a standard deviation of .1 in the last column, and who is where. Each other column
    has a standard deviation of `scales` around `shift`."""
    rng, which = np.random.default_rng(0), np.repeat([0, 1], sizes)
    others = [shift + scale * rng.normal(size=len(which)) for scale in scales]
    return np.stack([*others, 1 - 2.0 * which + 0.1 * rng.normal(size=len(which))], 1), which


@pytest.mark.parametrize(
    "scales, shift",
    [((3,), 0), ((3, 0.2, 30), 0), ((1e3,), 0), ((0,), 3000), ((0, 1), 3000), ((0, 0), 0)],
)
def test_two_camps_are_found_whatever_else_users_differ_in(scales, shift):
    """k-means on coefficients as they are splits the column that varies most."""
    coefficients, which = camps(*scales, shift=shift)
    for found in (cluster(coefficients), cluster(coefficients, 2)):
        assert found.shares == pytest.approx([0.5, 0.5], abs=1e-6)
        first = found.of_users.argmax(1)
        assert (first == which).all() or (first == 1 - which).all()
        assert np.sort(found.means[:, -1]) == pytest.approx([-1, 1], abs=0.1)
        assert found.covariance[-1, -1] == pytest.approx(0.01, rel=0.5)


def test_camps_that_overlap_among_eight_base_rewards_are_found():
    """Starts from more views of so few users would find mixtures that are likelier and wrong."""
    right = []
    for seed in range(8):
        rng, which = np.random.default_rng(seed), np.repeat([0, 1], 30)
        apart = rng.normal(size=8)
        coefficients = rng.normal(size=(60, 8)) + np.outer(which - 0.5, 4 * apart / np.linalg.norm(apart))
        same = (cluster(coefficients, 2).of_users.argmax(1) == which).mean()
        right.append(max(same, 1 - same))
    assert np.mean(right) > 0.9


def test_the_units_of_base_rewards_change_nothing():
    """Means and covariance have these units; shares, chances and BIC stay."""
    coefficients, _ = camps(1.0, 1.0, sizes=(60, 30))
    units, shift = np.array([1e3, 1e-2, 30]), np.array([5e4, -1, 7])
    plain, changed = cluster(coefficients), cluster(coefficients * units + shift)
    assert len(plain.shares) == 2
    assert changed.shares == pytest.approx(plain.shares, rel=1e-6)
    assert changed.of_users == pytest.approx(plain.of_users, abs=1e-6)
    assert changed.means == pytest.approx(plain.means * units + shift, rel=1e-6)
    assert changed.covariance == pytest.approx(plain.covariance * np.outer(units, units), rel=1e-4)
    assert [*changed.criteria.values()] == pytest.approx([*plain.criteria.values()], rel=1e-4)
    # features go the other way, so that all logits stay
    features = np.random.default_rng(1).normal(size=(6, 3))
    here, there = (
        [Answer(str(i), tuple(v), i % 2.0) for i, v in enumerate(rows)] for rows in (features, features / units)
    )
    chances = plain.of_answers(here)
    assert cluster(coefficients * units).of_answers(there) == pytest.approx(chances, abs=1e-6)
    assert abs(chances - plain.shares).max() > 0.05


def test_the_order_of_users_changes_no_bit():
    coefficients, _ = camps(3.0, 1.0)
    order = np.random.default_rng(5).permutation(len(coefficients))
    one, other = cluster(coefficients, 4), cluster(coefficients[order], 4)
    assert np.array_equal(one.of_users[order], other.of_users) and one.criteria == other.criteria
    assert np.array_equal(one.means, other.means) and np.array_equal(one.covariance, other.covariance)


def test_users_are_counted_and_not_their_differences():
    """Two camps of fifty who answer alike have two different coefficients: no reason to try one group alone."""
    coefficients = np.repeat([[2.0, 1.0, 0.0], [-2.0, 1.0, 0.0]], 50, 0)
    found = cluster(coefficients)
    assert list(found.criteria) == [1, 2] and found.shares == pytest.approx([0.5, 0.5])
    (line,) = describe_choice(found, 100)
    assert line.startswith("2 preference groups have the lowest BIC (1: ")
    # a new user may be asked, although nobody in a group varies
    likes = [Answer(str(i), (3.0, 0.0, 1.0), 1.0) for i in range(3)]
    assert found.of_answers(likes)[found.means[:, 0].argmax()] > 0.99
    nine = np.repeat(np.random.default_rng(0).normal(0, 3, (9, 2)), 25, 0)
    assert cluster(nine).shares == pytest.approx(1 / 9)


def test_users_who_are_all_alike_are_not_called_too_few():
    for users in (8, 100):
        (line,) = describe_choice(cluster(np.repeat([[1.0, 2.0]], users, 0)), users)
        assert line == f"one preference group, which is no use to P-GRPO: all {users} users have the same coefficients"


@pytest.mark.parametrize("step", [1e-9, 1e-3])
def test_users_who_hardly_differ_are_split_only_if_told(step):
    """Differences that float32 cannot hold, beside another column or alone."""
    for beside in (np.ones(6), np.arange(6.0)):
        coefficients = np.stack([beside, 1 + step * np.arange(6)], 1)
        found = cluster(coefficients, 6)
        assert len(found.shares) == 6 and np.isfinite(found.of_users).all() and found.shares.sum() == pytest.approx(1)
        assert np.isfinite(found.of_answers([Answer("x", (1.0, -1.0), 1.0)])).all()


def table(*rows):
    """Rows from line 3 of data.jsonl on."""
    return Table("data.jsonl", list(rows), list(range(3, 3 + len(rows))), "line")


@pytest.mark.parametrize("user", [None, "", " ", float("nan"), {"id": 1}, ["ann"]])
def test_a7_a_row_without_a_user_is_refused_with_its_line(user):
    assert name_users(table({"user": 7, "x": 1}), "user").rows == [{"user": "7", "x": 1}]
    with pytest.raises(ValueError, match="line 3 of data.jsonl needs a user in 'user', a text or a number, got "):
        name_users(table({"user": user}), "user")
    with pytest.raises(ValueError, match="line 3 of data.jsonl needs the column 'user', got 'who'"):
        name_users(table({"who": "ann"}), "user")


def test_the_same_people_give_the_same_preference_groups():
    coefficients, _ = crowd()
    one, again = cluster(coefficients), cluster(coefficients)
    assert np.array_equal(one.of_users, again.of_users)
    order = np.random.default_rng(2).permutation(len(coefficients))
    assert (cluster(coefficients[order]).of_users.argmax(1) == one.of_users.argmax(1)[order]).all()


def test_chances_of_users_are_bayes_rule():
    coefficients, _ = crowd(sizes=(30, 20, 10), seed=3)
    found = cluster(coefficients, 3)
    density = np.stack([multivariate_normal(mean, found.covariance).pdf(coefficients) for mean in found.means], 1)
    joint = density * found.shares
    assert found.of_users == pytest.approx(joint / joint.sum(1, keepdims=True), abs=1e-6)


def test_a_new_user_without_answers_has_the_shares_and_answers_decide():
    found = cluster(crowd()[0])
    assert found.of_answers([]) == pytest.approx(found.shares)
    features = np.random.default_rng(0).normal(0, 1, (12, 2))
    for group, centre in enumerate(CENTRES):
        answers = [Answer(str(i), tuple(v), float(v @ centre > 0)) for i, v in enumerate(features)]
        chances = [found.of_answers(answers[:n])[group] for n in (0, 4, 12)]
        assert chances[0] < chances[1] < chances[2] and chances[2] > 0.9


def test_the_evidence_by_numerical_integration():
    prior, rng = Prior(np.array([0.5, -1.0]), np.array([[1.0, 0.3], [0.3, 0.6]])), np.random.default_rng(0)
    features, answers = rng.normal(0, 1, (6, 2)), np.array([1, 0, 0.5, 1, 0, 0.9])
    axis = np.linspace(-7, 7, 401)
    grid = np.stack([side.ravel() for side in np.meshgrid(axis, axis)], 1)
    chance = expit(grid @ features.T)
    likelihood = np.prod(chance**answers * (1 - chance) ** (1 - answers), 1)
    exact = np.log((likelihood * multivariate_normal(*prior).pdf(grid)).sum() * (axis[1] - axis[0]) ** 2)
    assert log_evidence(features, answers, prior) == pytest.approx(exact, abs=0.05)  # Laplace's, not exact
    assert log_evidence(features[:0], [], prior) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    "coefficients, groups, message",
    [
        (np.ones((1, 2)), None, "at least two users, got 1"),
        (np.repeat([[1.0, 2.0], [3.0, 4.0]], 5, 0), 3, "a number from 1 to 2, the users who differ, got 3"),
        (np.eye(3), 0, "from 1 to 3, the users who differ, got 0"),
    ],
)
def test_preference_groups_that_cannot_be_are_refused(coefficients, groups, message):
    with pytest.raises(ValueError, match=message):
        cluster(coefficients, groups)


def test_users_who_are_all_equal_are_one_preference_group():
    found = cluster(np.ones((12, 3)))
    assert found.names == ["group-1"] and found.of_users == pytest.approx(1)


def test_rows_get_their_columns_and_keep_the_rest():
    chances = {"ann": np.array([0.9, 0.1]), "bob": np.array([0.2, 0.8])}
    rows = {"who": "bob", "x": [1]}, {"who": "ann"}
    assert assign(table(*rows), chances, ["group-1", "group-2"], "who", "g") == [
        {"who": "bob", "x": [1], "g": "group-2", "g_probability": 0.8},
        {"who": "ann", "g": "group-1", "g_probability": 0.9},
    ]
    for taken in ("g", "g_probability"):
        with pytest.raises(ValueError, match=f"line 3 of data.jsonl needs a new column .*, got '{taken}', which it"):
            assign(table({"who": "ann", taken: 0}), chances, ["group-1", "group-2"], "who", "g")


def test_e5_answers_out_of_all_proportion_name_their_user():
    """A profile may be whole and still say what no posterior follows from."""
    found = cluster(crowd()[0])
    profile = Profile("eve", "f00d", np.ones(2), np.eye(2), (Answer("x", (1e99, -1e99), 1.0),))
    with pytest.raises(ValueError, match="the profile of 'eve' needs answers that fit the model, got .*ask again"):
        chances_of(profile, found)


def test_many_new_users_are_counted_and_not_listed():
    chances = {f"u{row}": np.array([0.9, 0.1]) if row % 3 else np.array([0.2, 0.8]) for row in range(21)}
    assert describe_new(chances, ["group-1", "group-2"]) == ["21 new users: 14 in group-1, 7 in group-2"]
    del chances["u0"]
    lines = describe_new(chances, ["group-1", "group-2"])
    assert len(lines) == 20 and lines[0] == "u1: group-1, with a probability of 0.90"
