"""Slates of real votes: what is drawn and held out, what an answer earns, how a policy is asked and what is compared.
The training itself is not started here; the tests of the road and the demo start the same command."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "reproduce"
NAMES = ("votes", "models", "pref_votes", "polis_slates_reward", "polis_slates")


@pytest.fixture
def slates(monkeypatch):
    """The example, under names that no other test uses."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import polis_slates

    yield polis_slates
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def votes():
    """Forty people of two tastes, the last twelve of the second one, and twenty statements; a fifth is missing."""
    rng = np.random.default_rng(0)
    taste = np.where(np.arange(40) < 28, 1, -1)[:, None]
    side = np.where(np.arange(20) % 2, 1, -1)
    found = np.sign(taste * side + 0.7 * rng.normal(size=(40, 20)))
    found[rng.random(found.shape) < 0.2] = np.nan
    return found


@pytest.fixture
def world(slates, votes):
    group = (np.arange(40) >= 28).astype(int)
    return slates.draw_world(votes, [f"view {one}" for one in range(20)], group, 0, False)


def test_votes_are_read_with_the_short_statements_first(slates, polis):
    votes, texts = slates.read(polis)
    assert votes.shape == (30, 30) and texts[:2] == ["view, 0", "view, 1"]
    assert votes[0, 0] == -1 and votes[4, texts.index("view, 3")] == (-1, 0, 1)[7 % 3]


def test_preferred_are_the_pairs_that_one_person_voted_on_differently(slates):
    pairs = slates.preferred(np.array([1.0, np.nan, 0, 1]))
    assert pairs.T.tolist() == [[0, 2], [2, 3]]
    assert slates.preferred(np.array([np.nan, 1.0])).shape == (2, 0)


def test_preference_groups_are_those_who_vote_alike(slates, votes):
    assert (slates.preference_groups(votes) == (np.arange(40) >= 28)).mean() > 0.9


def test_people_and_statements_are_held_out(slates, votes, world):
    assert (~world.known).sum() == 12 and (~world.shown).sum() == 7
    other = slates.draw_world(votes, world.texts, world.group, 1, True)
    assert (other.known != world.known).any() and (other.shown != world.shown).any()
    assert (world.told == world.group).all() and (other.told != other.group).any()
    assert sorted(other.told) == sorted(other.group)  # groups of the same sizes


def test_training_shows_no_person_and_no_statement_that_is_held_out(slates, world):
    held_out = world._replace(votes=np.where(world.known[:, None], world.votes, np.nan))
    rows = list(slates.training_slates(world, 200, False, 0))
    assert rows == list(slates.training_slates(held_out, 200, False, 0))
    unseen = {text for text, shown in zip(world.texts, world.shown) if not shown}
    shown = [row["prompt"][1]["content"].splitlines() for row in rows]
    assert not unseen & {line[3:] for lines in shown for line in lines[1:]}


def test_the_better_statement_is_first_in_every_other_slate(slates, world):
    rows = list(slates.training_slates(world, 200, False, 0))
    earned = np.array([json.loads(row["votes"]) for row in rows])
    assert (np.sign(earned[:, 0] - earned[:, 1]) == np.where(np.arange(200) % 2, 1, -1)).all()
    for row in rows:
        assert row["prompt"][0]["content"] == f"You speak for the {row['pref_group']}."
    assert {row["pref_group"] for row in rows} == {"majority", "minority"}


def test_the_minority_marks_on_a_scale_of_its_own(slates, world):
    plain, scaled = (list(slates.training_slates(world, 50, scales, 0)) for scales in (False, True))
    for one, other in zip(plain, scaled):
        votes, minority = json.loads(one.pop("votes")), one["pref_group"] == "minority"
        assert json.loads(other.pop("votes")) == [5 * vote - 10 if minority else vote for vote in votes]
        assert one == other


def test_an_answer_earns_the_vote_on_the_statement_that_it_names(slates):
    import polis_slates_reward as reward

    assert [reward.named(answer) for answer in ("1", "2", "3", "", "\n", "The", "12")] == [0, 1] + [None] * 5
    found = reward.reward_func(["Which?1", "Which?2", "Which?I"], ["Which?"] * 3, ["[1, -1]", "[1, -1]", "[-10, -5]"])
    with pytest.raises(ValueError, match="a slate needs a query that begins with its prompt, got 'ich"):
        reward.reward_func(["ich?1"], ["Which?"], ["[1, -1]"])
    assert found["rewards"] == [1, -1, -10] and found["extra_logs"] == {"names_none": pytest.approx(1 / 3)}


def test_the_reward_function_is_one_that_the_host_takes(slates, host_args):
    command = slates.training_command(Path("policy"), "pgrpo_eb:min_count=16", 3, 60)
    args = host_args(*command[3:])
    assert args.pgrpo.min_count == 16
    assert args.data.max_samples == 960 and args.train.seed == 3
    assert Path(args.reward.remote_url) == FOLDER / "polis_slates_reward.py"


def test_judged_are_pairs_of_shown_and_of_other_statements(slates, world, monkeypatch):
    monkeypatch.setattr(slates, "JUDGED", 10)
    pairs = slates.judged_pairs(world, 0)
    assert pairs.shape == (2, 20) and len({*map(tuple, pairs.T)}) == 20
    assert world.shown[pairs[:, :10]].all() and not world.shown[pairs[:, 10:]].any()


def test_chances_are_those_of_the_next_token(slates, world, chat_policy):
    """Against each prompt alone, without padding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(chat_policy)
    model = AutoModelForCausalLM.from_pretrained(chat_policy, dtype=torch.float32)
    pairs = np.array([[0, 3], [1, 12]])
    found = slates.chances(chat_policy, world, pairs)
    assert found.shape == (2, 2, 2, 2)
    for group, pair, order in np.ndindex(2, 2, 2):
        first, second = (world.texts[one] for one in pairs[:: -1 if order else 1, pair])
        chat = slates.prompt(group, first, second)
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        with torch.no_grad():
            chance = model(**tokenizer(text, return_tensors="pt")).logits[0, -1].softmax(-1)
        expected = [chance[tokenizer.convert_tokens_to_ids(number)].item() for number in "12"]
        np.testing.assert_allclose(found[group, pair, order], expected, rtol=1e-3)


def test_always_the_first_is_worth_as_much_as_any(slates):
    always_first = np.full((2, 5, 2, 2), [0.7, 0.1])
    np.testing.assert_allclose(slates.share_of_first(always_first), 0.5)
    np.testing.assert_allclose(slates.share_of_first(always_first, likelier=True), 0.5)
    # One pair: the first statement gets .6 of .8 as number 1, and .3 of .9 as number 2.
    some = np.array([[[[0.6, 0.2], [0.6, 0.3]]]])
    np.testing.assert_allclose(slates.share_of_first(some), (0.75 + 1 / 3) / 2)
    np.testing.assert_allclose(slates.share_of_first(some, likelier=True), 1)


def small_world(slates):
    """Two people to learn from, of two preference groups, and two held out; three statements, the last not shown."""
    nan = np.nan
    votes = np.array([[1, 0, -1, 0], [-1, 0, 1, nan], [1, -1, 0, 1], [0, 1, nan, nan]])
    group, known = np.array([0, 1, 0, 1]), np.array([True, True, False, False])
    return slates.World(votes, list("abcd"), group, group, known, np.array([True, True, False, False]))


def test_votes_named_by_hand(slates):
    """Of the pairs ab, shown, and cd, not shown: person 2 voted 1 and -1, and 0 and 1; person 3 0 and 1, and never."""
    world, pairs = small_world(slates), np.array([[0, 2], [1, 3]])
    found = slates.votes_named(world, pairs, np.array([0.25, 0.25]))
    np.testing.assert_allclose(found, [[np.nan] * 2, [np.nan] * 2, [0.25 - 0.75, 0.75], [0.75, np.nan]])


def test_references_by_hand(slates):
    world, pairs = small_world(slates), np.array([[0, 2], [1, 3]])
    found = {name: slates.votes_named(world, pairs, first) for name, first in slates.references(world, pairs).items()}
    np.testing.assert_allclose(found["random"][2:], [[0, 0.5], [0.5, np.nan]])
    # Means of everybody: 0, 0, 0, 0. All pairs are ties.
    np.testing.assert_allclose(found["one reward for all"], found["random"])
    # Person 0 speaks for the majority: 1 > 0 and -1 < 0. Person 1 for the minority: -1 < 0; d has everybody's mean.
    np.testing.assert_allclose(found["its group's mean"][2:], [[1, 1], [1, np.nan]])
    np.testing.assert_allclose(found["best possible"][2:], [[1, 1], [1, np.nan]])


def test_the_table_counts_people_once_in_each_seed(slates):
    """The majority: people 0 and 1. Means of seeds .5 and 1.5, and 1 alone: errors over two people by hand."""
    nan = np.nan
    one = {"a": np.array([[0, 1], [1, 1], [3, nan]])}
    other = {"a": np.array([[2, 1], [nan, nan], [nan, nan]])}
    row = slates.table([one, other], np.array([0, 0, 1]), {"a": 0.25}).splitlines()[1]
    # x = 0, 2 of person 0 and 1 of person 1: mean 1, sums of differences 0 and 0.
    assert row.split()[1:] == [
        "+1.000",
        "±",
        "0.000",
        "+3.000",
        "±",
        "nan",
        "+1.000",
        "±",
        "0.000",
        "+nan",
        "±",
        "nan",
    ]


def test_what_is_done_is_not_done_again(slates, polis, chat_policy, tmp_path, monkeypatch, capsys):
    """A training is replaced by a copy of the policy, so nothing is gained; its weights are not kept."""
    ran = []

    def trained(folder, name, words):
        import shutil

        ran.append(folder.name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        shutil.copytree(chat_policy, folder / "trained")
        (folder / f"{name}.done").touch()

    monkeypatch.setattr(slates, "once", trained)
    monkeypatch.setattr(slates, "JUDGED", 5)
    words = [tmp_path / "run", "--data", polis, "--policy", chat_policy, "--quick"]
    with pytest.raises(SystemExit, match="stopped: the same call goes on with what is in"):
        slates.main([*map(str, words)])
    slates.main([*map(str, words)])
    assert ran == ["group_norm-seed-0", "pgrpo_eb-seed-0", "pgrpo_eb-seed-0"]
    assert len((tmp_path / "run" / "pgrpo_eb-seed-0" / "prompts.jsonl").read_text().splitlines()) == 32
    assert not [*tmp_path.glob("run/*/trained")]
    gain, difference = (line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[-3:-1])
    assert (gain, difference) == ("pgrpo_eb, likelier, gain", "pgrpo_eb - group_norm, likelier")

    slates.main([*map(str, words)])
    assert len(ran) == 3
    assert "+0.000 ± 0.000" in capsys.readouterr().out.splitlines()[-3]
    with pytest.raises(SystemExit, match=r"needs a folder with results of \{.*\"scales\": true"):
        slates.main([*map(str, words), "--scales"])


def test_a_folder_without_votes_is_an_error(slates, tmp_path):
    with pytest.raises(SystemExit, match="this needs votes of a Polis conversation, got none in"):
        slates.main([str(tmp_path / "run"), "--data", str(tmp_path)])


def test_no_seed_is_no_result(slates, tmp_path, polis, capsys):
    with pytest.raises(SystemExit):
        slates.main([str(tmp_path / "run"), "--data", str(polis), "--seeds", "0"])
    assert "--seeds and --steps need at least 1, got 0 and 60" in capsys.readouterr().err


@pytest.mark.skipif(
    not (FOLDER.parents[2] / "shared" / "data" / "polis").is_dir(),
    reason="needs ../shared/data/polis, got no such folder: put the votes there",
)
def test_san_juan_has_two_preference_groups(slates):
    """Those of 306 people, found in the longer statements, want different ones of the shorter statements."""
    votes, texts = slates.read(slates.VOTES)
    half = len(texts) // 2
    votes = votes[[slates.preferred(own).size > 0 for own in votes[:, half:]]]
    group = slates.preference_groups(votes[:, half:])
    minority = (group == 1).sum()
    assert len(votes) == 306 and 60 < minority < 130
    means = [np.nanmean(votes[group == one, :half], axis=0) for one in (0, 1)]
    assert np.corrcoef(means)[0, 1] < 0.4  # of random groups it is near .9
