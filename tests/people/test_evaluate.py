"""The evaluation of a model in a world where everybody's coefficients are known."""

import numpy as np
import pytest

from openrlhf_pgrpo.core.annotations import Annotations
from openrlhf_pgrpo.core.asking import coefficients_after
from openrlhf_pgrpo.core.names import Names
from openrlhf_pgrpo.models.factorize import in_order
from openrlhf_pgrpo.people import evaluate
from openrlhf_pgrpo.people.evaluate import (
    CHOSEN,
    MAJORITY,
    OWN,
    RANDOM,
    SHARED,
    Predictions,
    Said,
    notes,
)
from openrlhf_pgrpo.people.evaluation_tables import lines, tables

pytestmark = pytest.mark.core

PAIRS = [("p", f"{number:03}", f"{number:03}b") for number in range(120)]
TEXTS = np.arange(2 * len(PAIRS)).reshape(-1, 2)


class World:
    """40 people whom the model knows and 30 new ones, half of them with the opposite taste; 60 answers each."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.v = rng.normal(size=(len(PAIRS), 2))
        taste = np.where(np.arange(70) % 2, -1.0, 1.0)
        self.coefficients = np.stack([3 * taste, rng.normal(0, 1, 70)], 1)
        self.user = np.repeat(np.arange(70), 60)
        self.pair = np.concatenate([rng.choice(len(PAIRS), 60, replace=False) for _ in range(70)])
        z = np.einsum("nd,nd->n", self.v[self.pair], self.coefficients[self.user])
        self.preference = (rng.random(len(z)) < 1 / (1 + np.exp(-z))).astype(float)
        self.preference[rng.random(len(z)) < 0.05] = 0.5
        self.group = [("left", "right")[number % 2] for number in self.user]

    def predictions(self, rows=slice(None), swap=None, group=True) -> Predictions:
        """Of some rows in that order; where `swap` (P,), the second answer of a pair is taken for the first."""
        swap = np.zeros(len(PAIRS), bool) if swap is None else swap
        pair, preference = self.pair[rows], self.preference[rows]
        preference = np.where(swap[pair], 1 - preference, preference)
        first = list(dict.fromkeys(pair.tolist()))  # as `annotate` numbers pairs
        place = {number: row for row, number in enumerate(first)}
        users = [f"u{number:02}" for number in self.user[rows]]
        said = Annotations.of(users, np.array([place[number] for number in pair]), preference)
        pairs, said, order = in_order([PAIRS[number] for number in first], said)
        groups = np.array(self.group, object)[rows][order] if group else None
        said_ = Said(said.user, said.pair, said.preference, groups)
        numbers = np.array([PAIRS.index(pair) for pair in pairs])
        v = np.where(swap[:, None], -self.v, self.v)[numbers]
        known = Names([f"u{number:02}" for number in range(40)])
        return Predictions(v, said_, said.users, self.coefficients[:40], known, TEXTS[numbers])


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def known(world):
    return world.predictions().known_people()


@pytest.fixture(scope="module")
def new(world):
    return world.predictions().new_people()


def test_own_coefficients_beat_one_reward_for_all_where_tastes_are_opposite(known):
    own, shared = known[OWN]["all"], known[SHARED]["all"]
    assert own["accuracy"]["value"] > 0.8 > 0.65 > shared["accuracy"]["value"]
    assert own["log_loss"]["value"] < 0.5 < shared["log_loss"]["value"]
    change = own["accuracy"]["change"]
    assert change["value"] == pytest.approx(own["accuracy"]["value"] - shared["accuracy"]["value"])
    assert 0 < change["error"] < change["value"] / 5
    assert own["calibration_error"]["value"] < 0.05  # these are the true chances
    assert known["better off than with one reward for all"]["value"] > 0.95
    assert own["people"] == 40 and own["answers"] == 2400 and len(known["each"]) == 40
    assert shared["accuracy"]["change"] == {"value": None, "error": None}
    assert known[MAJORITY]["all"]["accuracy"]["value"] < own["accuracy"]["value"]


def test_groups_and_the_worst_of_them(known):
    groups = known[OWN]["groups"]
    assert {name: its["people"] for name, its in groups.items()} == {"left": 20, "right": 20}
    accuracies = {name: its["accuracy"]["value"] for name, its in groups.items()}
    assert known[OWN]["worst group"] == min(accuracies, key=accuracies.get)


def test_quantiles_are_those_of_each_person(known):
    accuracies = sorted(its["accuracy"] for its in known["each"].values())
    assert known["quantiles"]["0.5"]["accuracy"]["value"] == accuracies[19]
    assert known["quantiles"]["0.1"]["accuracy"]["value"] == accuracies[3]


def test_new_people_are_better_predicted_with_every_answer(new):
    by = {how: [at[how]["all"]["log_loss"]["value"] for at in new["after"] if how in at] for how in (CHOSEN, RANDOM)}
    assert [at["answers"] for at in new["after"]] == [0, 1, 3, 5, 10, 20]
    assert all(later < earlier for earlier, later in zip(by[CHOSEN], by[CHOSEN][1:]))
    assert by[CHOSEN][3] < by[RANDOM][2]  # after five answers; at random there is no row for none
    assert new["after"][0][CHOSEN]["all"]["accuracy"]["value"] < 0.65
    assert new["after"][-1][CHOSEN]["all"]["accuracy"]["value"] > 0.8
    assert {at["people"] for at in new["after"]} == {30} and new["people"] == 30


def test_a_person_of_many_pairs_does_not_pad_everybody(world, monkeypatch):
    """256 people had pools of the size of the largest: gigabytes for one person with all pairs."""
    rows = np.concatenate([np.flatnonzero(world.user == user)[: 60 if user == 50 else 9] for user in range(40, 70)])
    whole, cells = world.predictions(rows).new_people(), []

    def counting(features, *given):
        cells.append(features.shape[0] * features.shape[1])
        return coefficients_after(features, *given)

    monkeypatch.setattr(evaluate, "coefficients_after", counting)
    monkeypatch.setattr(evaluate, "CELLS_AT_ONCE", 50)
    parts = world.predictions(rows).new_people()
    assert max(cells) <= 50 and sum(cells) < 6 * 2 * len(rows)  # asked in six orders
    for part, of_whole in zip(parts["after"], whole["after"]):
        assert flat(part.get(CHOSEN, {})) == pytest.approx(flat(of_whole.get(CHOSEN, {})))


def test_who_has_too_few_pairs_is_left_out_with_a_count(world):
    rows = (world.user < 68) | (np.arange(len(world.user)) % 60 < 9)  # of nine pairs, three are held out
    after = world.predictions(rows).new_people()["after"]
    assert [at["too few"] for at in after] == [0, 0, 0, 0, 2, 2]
    assert [at["people"] for at in after] == [30, 30, 30, 30, 28, 28]


def of_ratings(ratings, embeddings, coefficients) -> Predictions:
    """What new people's ratings (U, T) of answers to one prompt say about all pairs of them."""
    first, second = np.triu_indices(ratings.shape[1], 1)
    user, pair = np.indices((len(ratings), len(first))).reshape(2, -1)
    preference = (1 + np.sign(ratings[user, first[pair]] - ratings[user, second[pair]])) / 2
    texts, users = np.stack([first, second], 1), [f"n{number}" for number in range(len(ratings))]
    said, known = Said(user, pair, preference, None), Names([f"k{number}" for number in range(len(coefficients))])
    return Predictions(embeddings[first] - embeddings[second], said, users, coefficients, known, texts)


def test_noise_in_ratings_of_new_people_is_predicted_like_a_coin():
    """Of A > B and B > C follows A > C: asked about the same responses, it was .77 after 20 answers."""
    rng = np.random.default_rng(0)
    predictions = of_ratings(rng.integers(1, 6, (60, 12)), rng.normal(size=(12, 8)), rng.normal(size=(40, 8)))
    new = predictions.new_people()
    for at in new["after"]:
        for how in (CHOSEN, RANDOM):
            if how in at:
                accuracy, auc = (at[how]["all"][name] for name in ("accuracy", "auc"))
                assert abs(accuracy["value"] - 0.5) < 2.5 * accuracy["error"] and accuracy["error"] < 0.04
                assert abs(auc["value"] - 0.5) < 2.5 * auc["error"]
    assert new["after"][-1]["people"] == 60 and new["answers"] == 60 * 66


def test_pairs_that_mix_what_is_held_out_are_counted(world, new):
    rng = np.random.default_rng(0)
    result = whole(of_ratings(rng.normal(size=(30, 12)), rng.normal(size=(12, 2)), rng.normal(size=(9, 2))))
    found = result["new"]
    sizes = found["after"][0][CHOSEN]["all"]["answers"] / 30
    assert 6 <= sizes <= 10 and 32 * 30 <= found["neither"] <= 35 * 30
    assert [line for line in notes(result) if line.startswith(f"{found['neither']} of 1980 answers of new people are")]
    assert new["neither"] == 0 and not [line for line in notes(whole(world.predictions())) if "left out: one" in line]


def test_who_rated_too_little_of_one_prompt_is_left_out_with_a_count():
    """Of three responses, two are held out: nothing is left to ask."""
    rng = np.random.default_rng(0)
    new = of_ratings(rng.normal(size=(5, 3)), rng.normal(size=(3, 2)), rng.normal(size=(9, 2))).new_people()
    assert [at["too few"] for at in new["after"]] == [0, 5, 5, 5, 5, 5]
    assert new["after"][0][CHOSEN]["all"]["answers"] == 5 and new["neither"] == 10


def test_the_order_of_rows_does_not_matter(world, known, new):
    other = world.predictions(np.random.default_rng(1).permutation(len(world.user)))
    assert other.known_people() == known and other.new_people() == new


def test_the_order_of_answers_does_not_matter(world, known, new):
    other = world.predictions(swap=np.random.default_rng(2).random(len(PAIRS)) < 0.5)
    assert flat(other.known_people()) == pytest.approx(flat(known), abs=1e-9)
    assert flat(other.new_people()) == pytest.approx(flat(new), abs=1e-9)


def flat(part) -> list[float]:
    """All numbers of a result."""
    if isinstance(part, (dict, list, tuple)):
        return [number for one in (part.values() if isinstance(part, dict) else part) for number in flat(one)]
    return [part] if isinstance(part, (int, float)) else []


def test_repeated_answers_of_a_new_person_are_one(world):
    once = world.predictions().new_people()
    twice = world.predictions(np.concatenate([np.arange(len(world.user))] * 2)).new_people()
    measures = [of["after"][-1][CHOSEN]["all"]["accuracy"] for of in (once, twice)]
    assert measures[0] == measures[1]


def whole(predictions, **counts) -> dict:
    result = {"known": predictions.known_people(), "new": predictions.new_people()}
    said: Said = predictions.said
    ties = int((said.preference == 0.5).sum())
    return result | {"counts": {"answers": len(said.user), "ties": ties, **counts}}


def test_one_person_alone_has_values_without_errors(world):
    result = whole(world.predictions(world.user == 3))
    accuracy = result["known"][OWN]["all"]["accuracy"]
    assert accuracy["value"] > 0.6 and accuracy["error"] is None and result["new"] is None
    assert "no standard error for one person alone: it needs two people or more" in notes(result)
    result = whole(world.predictions(world.user == 45))
    assert result["known"] is None and result["new"]["after"][-1][CHOSEN]["all"]["log_loss"]["error"] is None
    assert [line for line in notes(result) if "knows nobody" in line]
    assert [line for line in notes(result) if "one new person alone" in line]
    assert tables(result)


def test_a_group_of_one_person_is_named(world):
    result = whole(world.predictions(np.isin(world.user, (0, 2, 3))))
    assert result["known"][OWN]["groups"]["right"]["accuracy"]["error"] is None
    assert "no standard error for a preference group of one person: 'right'" in notes(result)


def test_ties_have_a_log_loss_and_no_accuracy(world):
    world = World()
    world.preference[:] = 0.5
    result = whole(world.predictions())
    own = result["known"][OWN]
    assert own["all"]["accuracy"]["value"] is own["all"]["auc"]["value"] is own["worst group"] is None
    assert own["all"]["log_loss"]["value"] > np.log(2)
    assert "accuracy and AUC need answers that prefer one of two, got only ties" in notes(result)
    assert all("-" in line for table in tables(result) for line in lines(table)[3:-1])


def test_the_table_has_a_line_for_each_prediction(world):
    shown = "\n".join(line for table in tables(whole(world.predictions())) for line in lines(table))
    for label in (OWN, SHARED, MAJORITY, "left", "right", "10% of people below", "no answer", "20 answers, at random"):
        assert f"\n{label}" in shown
    assert "Preference groups of new people, after 20 answers" in shown
    assert "Preference groups" not in "".join(t.title for t in tables(whole(world.predictions(group=False))))
