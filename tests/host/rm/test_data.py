"""Pairs of many users from a dataset to a batch, and that nothing of their form tells the chosen one."""

import copy
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openrlhf_pgrpo.host.rm import data as rm_data

pytestmark = pytest.mark.host


@pytest.fixture
def reward_dataset(fresh):
    """The host's module, with our hook."""
    module = fresh("openrlhf.datasets.reward_dataset")
    module.host_item = module.RewardDataset.__getitem__
    rm_data.install(module)
    return module


@pytest.fixture
def new_strategy(tiny):
    """What the host's script hands to each of its datasets."""

    def new_strategy(factors=2, start=tiny / "model", **data):
        keys = dict(prompt_key="prompt", chosen_key="chosen", rejected_key="rejected", user_key="user")
        data = SimpleNamespace(**{**keys, "preference_key": None, **data})
        options = dict(reward=SimpleNamespace(factors=factors), model=SimpleNamespace(model_name_or_path=str(start)))
        return SimpleNamespace(args=SimpleNamespace(data=data, **options))

    return new_strategy


@pytest.fixture
def dataset_of(reward_dataset, new_strategy, tiny):
    """The host's dataset of `rows`, for training with users, or as the host alone would have it."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")

    def make(rows, strategy=None, **settings):
        strategy = strategy or new_strategy(**settings)
        return reward_dataset.RewardDataset(Dataset.from_list(rows), tokenizer, 30, strategy, num_processors=1)

    return make


def pair(user="ana", chosen="yes", rejected="no", **more):
    return {"prompt": "p ", "user": user, "chosen": chosen, "rejected": rejected, **more}


def test_a_pair_carries_its_user_and_its_preference_on_its_margin(dataset_of):
    rows = [pair("bob", share=1.0), pair("ana", share=0.5), pair("bob", share=0.75)]
    dataset = dataset_of(rows, preference_key="share")
    batch = dataset.collate_fn([dataset[i] for i in range(3)])
    for margins in (batch[-1], copy.deepcopy(batch[-1]), pickle.loads(pickle.dumps(batch[-1]))):
        assert margins == [0.0, 0.0, 0.0]  # to the host they are what they were
        assert [(margin.user, margin.preference) for margin in margins] == [(1, 1.0), (0, 0.5), (1, 0.75)]
    assert [margin.preference for margin in dataset_of(rows).extras] == [1.0, 1.0, 1.0]


def test_the_preferred_response_is_where_the_host_expects_it(dataset_of):
    dataset = dataset_of([pair(share=0.25)], preference_key="share")
    assert (dataset.chosens[0], dataset.rejects[0], dataset.extras[0].preference) == ("no", "yes", 0.75)


TEXTS = ["yes", "no\n", "a<eos>", "", "x" * 50, "tail\n\n"]


def test_texts_and_tokens_are_the_hosts(dataset_of, reward_dataset):
    rows = [pair(chosen=chosen, rejected=rejected) for chosen in TEXTS for rejected in TEXTS]
    dataset = dataset_of(rows)
    for index in range(len(rows)):
        for ours, host in zip(dataset[index][:4], reward_dataset.host_item(dataset, index)[:4], strict=True):
            assert torch.equal(ours, host) and ours.dtype == host.dtype


def test_without_factors_the_dataset_is_the_hosts(dataset_of, reward_dataset):
    dataset = dataset_of([pair(margin=0.3)], factors=None)
    assert dataset.extras[0] == 0.3 and type(dataset.extras[0]) is float
    assert torch.equal(dataset[0][0], reward_dataset.host_item(dataset, 0)[0])


def test_swapped_responses_are_swapped_tokens(dataset_of):
    rows = [pair(chosen=chosen, rejected=rejected) for chosen in TEXTS for rejected in TEXTS]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    for one, other in zip(dataset_of(rows), dataset_of(swapped), strict=True):
        for here, there in ((0, 2), (1, 3), (2, 0), (3, 1)):
            assert torch.equal(one[here], other[there])


@pytest.mark.parametrize(
    "rows, settings, message",
    [
        ([pair(None), pair("ana")], {}, r"a value in 'user' \(--data.user_key\), got None in row 0"),
        ([pair("ana"), pair("")], {}, "got '' in row 1"),
        ([pair()], dict(user_key="who"), "--data.user_key needs a column of the pairs, got 'who'; columns are"),
        (
            [pair()],
            dict(preference_key="share"),
            "--data.preference_key needs a column of .*, got 'share'; columns are",
        ),
        (
            [pair(share=1.5)],
            dict(preference_key="share"),
            r"a number from 0 to 1 in 'share' \(--data.preference_key\), got 1.5 in row 0",
        ),
        ([pair(share=float("nan"))], dict(preference_key="share"), "got nan in row 0"),
        ([pair(share="1")], dict(preference_key="share"), "got '1' in row 0"),
        ([pair(rejected=["no"])], {}, "'chosen' and 'rejected' need the same form, got .*: give both one form"),
    ],
)
def test_data_that_does_not_fit_is_refused(dataset_of, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        dataset_of(rows, **settings)


# ---- who has a row --------------------------------------------------------------------------------------------------


def users_of(dataset) -> list[int]:
    return [margin.user for margin in dataset.extras]


def test_users_are_those_of_the_training_data(dataset_of, new_strategy):
    strategy = new_strategy()
    assert users_of(dataset_of([pair("bob"), pair("ana"), pair("bob")], strategy)) == [1, 0, 1]
    assert list(strategy.reward_users) == ["ana", "bob"]
    assert users_of(dataset_of([pair("bob")], strategy)) == [1]  # the pairs to evaluate on come second
    with pytest.raises(ValueError, match="every pair needs a user of the training data, got 'eve': drop their pairs"):
        dataset_of([pair("eve"), pair("ana")], strategy)


def test_two_trainings_in_one_process_have_their_own_users(dataset_of, new_strategy):
    one, other = new_strategy(factors=2), new_strategy(factors=3)
    assert users_of(dataset_of([pair("bob"), pair("ana")], one)) == [1, 0]
    assert users_of(dataset_of([pair("eve"), pair("bob")], other)) == [1, 0]
    assert (list(one.reward_users), list(other.reward_users)) == (["ana", "bob"], ["bob", "eve"])
    assert users_of(dataset_of([pair("bob")], one)) == [1]


def test_users_are_those_of_a_factorized_model_to_start_from(dataset_of, new_strategy, factorized):
    strategy = new_strategy(start=factorized)
    assert users_of(dataset_of([pair("cleo"), pair("ana")], strategy)) == [2, 0]
    assert list(strategy.reward_users) == ["ana", "bob", "cleo"]
    with pytest.raises(ValueError, match="every pair needs a user of the model .*, got 'eve': drop their pairs"):
        dataset_of([pair("eve"), pair("ana")], new_strategy(start=factorized))


# ---- nothing of the form tells the chosen one -----------------------------------------------------------------------


def accuracy_of_the_form(dataset) -> float:
    """How often held-out pairs are decided by a regression on counts of tokens, which sees all that a form can say."""
    from sklearn.linear_model import LogisticRegression

    def counts(ids):
        return np.bincount(ids[0].numpy(), minlength=300)

    differences = np.array([counts(item[0]) - counts(item[2]) for item in dataset])
    signs = np.where(np.arange(len(differences)) % 2, 1, -1)  # as many labels of each kind
    half = len(differences) // 2
    fitted = LogisticRegression(C=0.01).fit(differences[:half] * signs[:half, None], signs[:half])
    return fitted.score(differences[half:] * signs[half:, None], signs[half:])


def test_shuffled_labels_cannot_be_learned(dataset_of):
    """Which of two random responses is called the chosen one is a throw of a coin, so 0.5 +- 0.05 is all there is."""
    coin = random.Random(0)
    words = ["".join(coin.choices("abcdefgh\n ", k=coin.randint(1, 8))) for _ in range(800)]
    rows = [pair(chosen=chosen, rejected=rejected) for chosen, rejected in zip(words[::2], words[1::2])]
    assert accuracy_of_the_form(dataset_of(rows)) == pytest.approx(0.5, abs=0.15)  # three standard errors of 200
    # The published trap, one side printed as a list, is seen by the same measure.
    leaking = [{**row, "rejected": str([row["rejected"]])} for row in rows]
    assert accuracy_of_the_form(dataset_of(leaking)) > 0.95
