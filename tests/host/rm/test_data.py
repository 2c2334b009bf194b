"""Pairs of many users from a dataset to a batch, and that nothing of their form tells the chosen one."""

import copy
import json
import pickle
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from openrlhf_pgrpo.host import doors, pair_texts
from openrlhf_pgrpo.host.rm import data as rm_data
from openrlhf_pgrpo.models.form import Form, Writer
from openrlhf_pgrpo.models.texts import Texts

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

    def new_strategy(factors=2, start=tiny / "model", margin_loss=False, **data):
        keys = dict(prompt_key="prompt", chosen_key="chosen", rejected_key="rejected", user_key="user")
        settings = dict(preference_key=None, apply_chat_template=False, input_template=None)
        data = SimpleNamespace(**{**keys, **settings, **data})
        model = SimpleNamespace(model_name_or_path=str(start), margin_loss_enable=margin_loss)
        args = SimpleNamespace(data=data, reward=SimpleNamespace(factors=factors), model=model)
        printed = []
        return SimpleNamespace(args=args, printed=printed, print=printed.append)

    return new_strategy


@pytest.fixture
def dataset_of(reward_dataset, new_strategy, tiny):
    """The host's dataset of `rows`, for training with users, or as the host alone would have it."""
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(tiny / "model")

    def make(rows, strategy=None, max_len=30, tokenizer=plain, **settings):
        strategy = strategy or new_strategy(**settings)
        return reward_dataset.RewardDataset(Dataset.from_list(rows), tokenizer, max_len, strategy, num_processors=1)

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


TEXTS = ["yes", "no\n", "b<eos>", "x" * 20, "tail\n\n"]
PAIRS = [pair(chosen=one, rejected=other) for one in TEXTS for other in TEXTS if one != other]


def test_tokens_are_those_of_scoring(dataset_of):
    """The prompt's tokens, the response's and one end: what `base_rewards`, the server and a rollout see."""
    dataset = dataset_of(PAIRS)
    for row, item in zip(PAIRS, dataset):
        found = Texts(dataset.tokenizer, 30).tokens(["p "] * 2, [row["chosen"], row["rejected"]]).ids
        assert [item[0].tolist(), item[2].tolist()] == [[found[0]], [found[1]]]
        assert item[1].all() and item[3].all() and item[0].dtype == item[1].dtype == torch.long


def test_without_factors_the_dataset_is_the_hosts(dataset_of, reward_dataset):
    dataset = dataset_of([pair(margin=0.3)], factors=None)
    assert dataset.extras[0] == 0.3 and type(dataset.extras[0]) is float
    assert torch.equal(dataset[0][0], reward_dataset.host_item(dataset, 0)[0])


def test_swapped_responses_are_swapped_tokens(dataset_of):
    rows = PAIRS
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    for one, other in zip(dataset_of(rows), dataset_of(swapped), strict=True):
        for here, there in ((0, 2), (1, 3), (2, 0), (3, 1)):
            assert torch.equal(one[here], other[there])


@pytest.mark.parametrize(
    "rows, settings, message",
    [
        ([pair(None), pair("ana")], {}, r"a name in 'user' \(--data.user_key\), got null in row 0"),
        ([pair("ana"), pair("")], {}, "got an empty text in row 1"),
        ([pair()], dict(user_key="who"), "--data.user_key needs a column of the pairs, got 'who'; columns are"),
        (
            [pair()],
            dict(preference_key="share"),
            "--data.preference_key needs a column of .*, got 'share'; columns are",
        ),
        (
            [pair(share=1.5)],
            dict(preference_key="share"),
            r"a number from 0 .rejected. to 1 .chosen. in 'share' \(--data.preference_key\), got float 1.5 in row 0",
        ),
        ([pair(share=float("nan"))], dict(preference_key="share"), "got float nan in row 0"),
        ([pair(share="1")], dict(preference_key="share"), "got '1' in row 0"),
        (
            [pair(rejected=["no"])],
            {},
            "a text in 'rejected' .*, got a list, .'no'. in row 0 of the pairs: write it as",
        ),
    ],
)
def test_data_that_does_not_fit_is_refused(dataset_of, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        dataset_of(rows, **settings)


# ---- rows that would teach nothing, or the wrong thing --------------------------------------------------------------


def test_a1_the_column_preference_is_read_as_factorize_reads_it(dataset_of):
    """Without a flag it was ignored: three rows in four said 0, and training learned the reverse."""
    dataset = dataset_of([pair("bob", preference=0), pair("ana", preference=0.5), pair("bob", preference=1)])
    assert [margin.preference for margin in dataset.extras] == [1.0, 0.5, 1.0]
    assert list(dataset.chosens) == ["no", "yes", "yes"]


@pytest.mark.parametrize(
    "value, said", [(None, "null"), ("0", "'0'"), (True, "bool True"), (-1, "int -1"), ([1], "a list")]
)
def test_a1_a_preference_that_is_none_is_refused(dataset_of, value, said):
    with pytest.raises(ValueError, match=f"a number from 0 .* in 'preference' .*, got {said}.* in row 0 of the pairs"):
        dataset_of([pair(preference=value)])


@pytest.mark.parametrize("value", [0, 0.5, 0.9, False])
def test_a1_the_hosts_own_training_refuses_preferences_that_it_does_not_read(dataset_of, value):
    """It would take every chosen response as preferred: the reverse of what was said, and ties as wins."""
    with pytest.raises(ValueError, match=f"preferred answers as chosen ones, got {value} in 'preference' in row 1 of"):
        dataset_of([pair(preference=type(value)(1)), pair(preference=value)], factors=None)


def test_a1_one_broken_value_does_not_switch_the_check_off(dataset_of):
    for value in (float("nan"), None, 2, "0"):
        rows = [pair(preference=0), pair(preference=value)] if value != "0" else [pair(preference="0")] * 2
        with pytest.raises(ValueError, match="preferred answers as chosen ones, got 0.* in 'preference' in row 0 of"):
            dataset_of(rows, factors=None)


def test_a_margin_that_is_not_there_is_refused(new_strategy):
    args = new_strategy(factors=None).args
    args.model.margin_loss_enable = True
    with pytest.raises(ValueError, match="--model.margin_loss_enable needs a column 'margin' in 'x.jsonl', got none"):
        rm_data.check(Dataset.from_list([pair()]), args, "'x.jsonl'")


def test_a1_ties_alone_train_nothing(dataset_of):
    with pytest.raises(ValueError, match="at least one answer that is preferred, got only ties in 'preference'"):
        dataset_of([pair(preference=0.5)] * 2)


def test_an_evaluation_may_be_of_ties_or_of_pairs_that_teach_nothing(dataset_of, new_strategy):
    strategy = new_strategy()
    dataset_of([pair()], strategy)
    dataset_of([pair(preference=0.5)], strategy)  # of 100 pairs, one is the host's evaluation
    strategy = new_strategy(factors=None)
    dataset_of([pair()], strategy)
    dataset_of([{**pair(), "prompt": "once " * 20}], strategy)
    assert "1 of 1 pairs teach nothing" in strategy.printed[-1]


def test_a1_a_column_that_only_bears_the_name_is_said(reward_dataset, new_strategy):
    args = new_strategy(factors=None).args
    (said,) = rm_data.check(Dataset.from_list([pair(preference="safe")]), args, "'x.jsonl'")
    assert said == "warning: the column 'preference' of 'x.jsonl' is not read: 'chosen' counts as preferred"
    assert rm_data.check(Dataset.from_list([pair(preference=1)]), args, "'x.jsonl'") == []


@pytest.mark.parametrize("factors", [2, None])
@pytest.mark.parametrize("key", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize(
    "value, said",
    [
        (None, "null"),
        ("", "an empty text"),
        (" \n", "a blank text"),
        (3, "int 3"),
        ([{"a": "b"}], "a list of messages"),
    ],
)
def test_b5_a_missing_text_is_refused_before_the_first_step(new_strategy, factors, key, value, said):
    """One null among thousands ended the training in the middle of an epoch, without a model."""
    rows = Dataset.from_list([{**pair(), key: value}, {**pair(), key: None}])
    with pytest.raises(ValueError, match=f"a text in '{key}' .--data.{key}_key., got {said}.* in row 0 of 'x.jsonl'"):
        rm_data.check(rows, new_strategy(factors=factors).args, "'x.jsonl'")


def test_b5_a_margin_that_is_no_number_is_refused(new_strategy):
    def said(value, **settings):
        return rm_data.check(Dataset.from_list([pair(margin=value)]), new_strategy(**settings).args, "'x.jsonl'")

    for value in (float("nan"), "a", [1.0]):
        with pytest.raises(ValueError, match="a finite number in 'margin', got .* in row 0 of 'x.jsonl'"):
            said(value, factors=None)
    with pytest.raises(ValueError, match="got null in row 0"):  # the host would take it as 0
        said(None, factors=None, margin_loss=True)
    assert said(None, factors=None) == said("a") == []  # a training with users reads none


def test_a4_prompts_are_cut_from_the_left_and_counted(dataset_of, new_strategy):
    strategy = new_strategy()
    rows = [pair(), {**pair(chosen="yes!", rejected="no!"), "prompt": "once " * 20}]
    dataset = dataset_of(rows, strategy)
    assert strategy.printed == [
        "[pgrpo] 1 of 2 prompts are cut from the left, to fit with their responses into 30 tokens (--data.max_len)"
    ]
    chosen, _, rejected, *_ = dataset[1]
    assert chosen.shape == rejected.shape[:1] + (30,) and not torch.equal(chosen, rejected)
    assert dataset.tokenizer.decode(chosen[0]).endswith("yes!<eos>")


@pytest.mark.parametrize("prompted", [True, False])
def test_messages_become_the_tokens_that_every_command_makes_of_their_words(prompted, dataset_of, tiny, tmp_path):
    """The template closes a turn with a mark of its own, and writes an empty thought before it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ '<think></think>' if m['role'] == 'assistant' }}{{ m['content'] }}"
        "<end>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(shutil.copytree(tiny / "model", tmp_path / "chat"))
    asked = [{"role": "user", "content": "why?"}]
    said = {side: [{"role": "assistant", "content": words}] for side, words in (("chosen", "yes"), ("rejected", "no"))}
    row = {"prompt": asked, **said} if prompted else {side: asked + turn for side, turn in said.items()}
    settings = dict(apply_chat_template=True, start=tmp_path / "chat", tokenizer=tokenizer)
    dataset = dataset_of([{"user": "ana", **row}], max_len=50, prompt_key="prompt" if prompted else None, **settings)
    chosen, _, rejected, *_ = dataset[0]
    writer = Writer(Form.of_tokenizer(tokenizer, "chat"), tokenizer)
    found = Texts(tokenizer, 50, writer.ends).tokens([writer.prompt("why?")] * 2, ["yes", "no<end>\n"])
    assert [chosen[0].tolist(), rejected[0].tolist()] == found.ids
    said["chosen"][0]["content"] = "<end>"
    row = {"prompt": asked, **said} if prompted else {side: asked + turn for side, turn in said.items()}
    with pytest.raises(ValueError, match="words before its end token"):
        dataset_of([{"user": "ana", **row}], max_len=50, prompt_key="prompt" if prompted else None, **settings)


def test_keys_that_arrow_adds_to_messages_are_not_the_templates(dataset_of, tiny, tmp_path):
    """In a column of messages of which one has a name, all have one, and it is None."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}{{ ' ' + m['name'] if 'name' in m }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(shutil.copytree(tiny / "model", tmp_path / "chat"))
    said = {side: [{"role": "assistant", "content": words}] for side, words in (("chosen", "yes"), ("rejected", "no"))}
    rows = [
        {"user": "ana", "prompt": [{"role": "user", "content": "why?", **named}], **said}
        for named in ({}, {"name": "bo"})
    ]
    settings = dict(apply_chat_template=True, start=tmp_path / "chat", tokenizer=tokenizer)
    prompts = dataset_of(rows, max_len=60, **settings).prompts
    assert prompts[:] == ["<user>why?<assistant>", "<user bo>why?<assistant>"]


def test_a4_a_response_that_does_not_fit_is_refused(dataset_of):
    with pytest.raises(ValueError, match="room in 30 tokens .--data.max_len., got one of 41 tokens in row 1 of"):
        dataset_of([pair(), pair(rejected="n" * 40)])


@pytest.mark.parametrize("other", ["yes", "yes<eos>"])
def test_a5_equal_responses_are_refused(dataset_of, other):
    """They teach nothing, and as tokens an end that the text brings along is no difference."""
    with pytest.raises(
        ValueError, match="need different texts, got equal ones in row 1 of the pairs.* .and 1 more: row 3.: drop"
    ):
        dataset_of([pair(), pair(rejected=other), pair(), pair(rejected=other)])


def test_a5_the_hosts_own_training_says_how_many_pairs_it_cuts_to_equal_texts(dataset_of, new_strategy):
    strategy, long = new_strategy(factors=None), {**pair(), "prompt": "once " * 20}
    dataset_of([pair(), long, pair(rejected="yes")], strategy)
    (said,) = strategy.printed
    assert "2 of 3 pairs teach nothing, because they are equal in their first 30 tokens (--data.max_len)" in said
    with pytest.raises(ValueError, match="pairs whose responses differ in their first 30 tokens .*, got none among 1"):
        dataset_of([long], factors=None)


def test_the_doctor_counts_as_the_training_does(parse, reward_dataset, tmp_path):
    """What only tokens show was said by the run alone, after its model was loaded."""
    file = tmp_path / "pairs.jsonl"

    def said(rows, *words):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = ("--data.dataset", file, "--eval.dataset", file, "--data.prompt_key", "prompt", "--data.max_len", 30)
        sizes = ("--train.batch_size", 2, "--train.micro_batch_size", 2, "--ckpt.output_dir", tmp_path / "out")
        return doors.RM.look(parse(*data, *sizes, *words), tokens=True)

    users = ("--reward.factors", 2, "--data.user_key", "user")
    long = {**pair(), "prompt": "once " * 20}
    assert "2 of 4 prompts are cut from the left, to fit with" in "\n".join(said([pair(), long] * 2, *users))
    assert "2 of 4 pairs teach nothing, because they are equal in" in "\n".join(said([pair(), long] * 2))
    with pytest.raises(ValueError, match="differ in their first 30 tokens .*, got none among 2"):
        said([long] * 2)
    with pytest.raises(
        ValueError, match="different texts, got equal ones in row 1 of the pairs, once they are tokens"
    ):
        said([pair(), pair(rejected="yes<eos>")], *users)


def test_a4_the_longer_response_is_the_one_with_more_bytes(dataset_of):
    """It was the one with more characters, so the other passed and was cut in training."""
    with pytest.raises(ValueError, match="room in 30 tokens .--data.max_len., got one of 34 tokens in row 0 of"):
        dataset_of([pair(chosen="y" * 18, rejected="猫" * 11)])


@pytest.mark.parametrize("factors", [2, None])
@pytest.mark.parametrize("silent", ["<eos>", " <eos>\n", "\u200b<eos>"])
def test_a13_an_answer_that_is_nothing_but_its_end_is_refused(dataset_of, factors, silent):
    """`factorize` refused it; the trainer learned a reward for saying nothing."""
    with pytest.raises(ValueError, match="words before its end token, got one that is .* in row 1 of the pairs: fill"):
        dataset_of([pair(), pair(rejected=silent)], factors=factors)


def test_prompts_are_counted_only_where_their_bytes_say_too_little(dataset_of):
    dataset = dataset_of([pair(), {**pair(), "prompt": "once " * 20}, {**pair(), "prompt": "q" * 10}])
    assert pair_texts.most_tokens(dataset) == [2, 100, 10]


def test_d14_an_evaluation_without_pairs_says_what_is_needed(dataset_of):
    """Under 100 pairs the host takes none of them for its evaluation: "Column 'prompt' doesn't exist"."""
    with pytest.raises(
        ValueError, match="needs at least one pair, got none: give --eval.dataset, or at least 100 pairs"
    ):
        dataset_of([])


def test_prompts_that_no_flag_names_are_refused_or_said(new_strategy):
    """`factorize` reads the column `prompt`; without --data.prompt_key the trainer would see answers alone."""
    whole = Dataset.from_list([{**pair(), "chosen": "p yes", "rejected": "p no"}])
    apart = Dataset.from_list([pair()])
    for factors in (2, None):
        assert rm_data.check(whole, new_strategy(factors=factors, prompt_key=None).args, "'x.jsonl'") == []
    with pytest.raises(
        ValueError, match="--data.prompt_key needs the column of prompts, got none, .* row 0 of 'x.jsonl'"
    ):
        rm_data.check(apart, new_strategy(prompt_key=None).args, "'x.jsonl'")
    (said,) = rm_data.check(apart, new_strategy(factors=None, prompt_key=None).args, "'x.jsonl'")
    assert said.startswith("warning: --data.prompt_key needs the column of prompts")


def test_a7_users_are_named_alike_in_every_kind_of_file(dataset_of, new_strategy):
    strategy = new_strategy()
    assert users_of(dataset_of([pair(7), pair(8)], strategy)) == [0, 1]
    assert users_of(dataset_of([pair(8.0), pair(7.0)], strategy)) == [1, 0]
    (said,) = rm_data.check(Dataset.from_list([pair("ana"), pair(" ana")]), strategy.args, "'x.jsonl'")
    assert "differ only in case, white space or characters without a width" in said


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
    rows = [
        pair(chosen=one + "a", rejected=other + "a") for one, other in zip(words[::2], words[1::2]) if one != other
    ]
    assert accuracy_of_the_form(dataset_of(rows)) == pytest.approx(0.5, abs=0.15)  # three standard errors of 200
    # The published trap, one side printed as a list, is seen by the same measure.
    leaking = [{**row, "rejected": str([row["rejected"]])} for row in rows]
    assert accuracy_of_the_form(dataset_of([rows[0], *leaking])) > 0.95
    with pytest.raises(ValueError, match="one form, got a printed list as the rejected answer of every pair of"):
        dataset_of(leaking)
    dataset_of([{**row, "preference": number % 2} for number, row in enumerate(leaking)])
