"""How preference group and user travel from a dataset column to the prompt."""

import json
import pickle
from types import SimpleNamespace

import pytest
from datasets import Dataset

from openrlhf_pgrpo.host.tags import TaggedPrompt

pytestmark = pytest.mark.host

ROWS = [
    {"input": "q0", "answer": "x", "persona": "ann", "who": "u0"},
    {"input": "q1", "answer": "y", "persona": "bob", "who": "u1"},
]


def strategy(args):
    return SimpleNamespace(args=args, is_rank_0=lambda: False, print=lambda *_: None)


@pytest.fixture
def load(host_args, tmp_path):
    """A training set of `rows`, as the host loads it."""
    from openrlhf.datasets import PromptDataset
    from openrlhf.datasets.utils import blending_datasets

    def load(rows, *argv, source=None):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = ("--data.prompt_dataset", str(source or path), "--data.label_key", "answer")
        args = host_args("--advantage_estimator", "pgrpo", *keys, *argv)
        data = blending_datasets(str(path), None, strategy(args), 42, dataset_split="train")
        return PromptDataset(data, None, strategy(args))

    return load


def test_a_tagged_prompt_is_the_plain_string():
    prompt = TaggedPrompt("why?", "ann", "u0")
    assert prompt == "why?" and hash(prompt) == hash("why?") and isinstance(prompt, str)
    assert json.dumps([prompt]) == '["why?"]' and f"{prompt}" == "why?"
    assert type(prompt + " because") is str and type(str(prompt)) is str


def test_a_tagged_prompt_survives_pickling():
    copy = pickle.loads(pickle.dumps(TaggedPrompt("why?", "ann", "u0")))
    assert (copy, copy.pref_group, copy.user) == ("why?", "ann", "u0")


def test_group_and_user_come_from_columns(load):
    data = load(ROWS, "--data.pref_group_key", "persona", "--data.user_key", "who")
    assert [(p, p.pref_group, p.user) for p in data.prompts] == [("q0", "ann", "u0"), ("q1", "bob", "u1")]
    assert data.labels == ["x", "y"] and {type(label) for label in data.labels} == {str}


def test_group_and_user_come_from_a_struct_label(load):
    rows = [{"input": r["input"], "answer": {"text": r["answer"], "persona": r["persona"], "id": 7}} for r in ROWS]
    data = load(rows, "--data.pref_group_key", "persona", "--data.user_key", "id")
    assert [(p.pref_group, p.user) for p in data.prompts] == [("ann", "7"), ("bob", "7")]
    assert data.labels[0] == {"text": "x", "persona": "ann", "id": 7} and type(data.labels[0]) is dict


@pytest.mark.parametrize("labels", [[1, 2], [0.5, 1.5], [True, False], [["x"], ["y"]]])
def test_labels_of_any_type_stay_what_they_are(load, labels):
    rows = [{**row, "answer": label} for row, label in zip(ROWS, labels)]
    data = load(rows, "--data.pref_group_key", "persona")
    assert data.labels == labels and {type(label) for label in data.labels} == {type(labels[0])}
    assert [p.pref_group for p in data.prompts] == ["ann", "bob"]


def test_the_tokenizer_sees_the_same_text(load):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for prompt in load(ROWS, "--data.pref_group_key", "persona").prompts:
        assert tokenizer(text=prompt)["input_ids"] == tokenizer(text=str(prompt))["input_ids"]


def test_a_user_needs_no_preference_group(load):
    data = load(ROWS, "--advantage_estimator", "pgrpo_global", "--data.user_key", "who")
    assert [(p, p.pref_group, p.user) for p in data.prompts] == [("q0", None, "u0"), ("q1", None, "u1")]


@pytest.mark.parametrize("value", [None, ""])
def test_a_row_without_its_user_is_named(load, value):
    with pytest.raises(ValueError, match=r"value in 'who' \(--data.user_key\), got .* in row 1 of .*: fill it"):
        rows = [ROWS[0], {**ROWS[1], "who": value}]
        load(rows, "--advantage_estimator", "pgrpo_global", "--data.user_key", "who")


@pytest.mark.parametrize("value", [None, ""])
def test_a_row_without_its_group_is_named(load, value):
    with pytest.raises(
        ValueError, match=r"value in 'persona' \(--data.pref_group_key\), got .* in row 1 of .*: fill it"
    ):
        load([ROWS[0], {**ROWS[1], "persona": value}], "--data.pref_group_key", "persona")


def test_a_struct_label_without_its_group_is_named(load):
    rows = [{"input": "q", "answer": {"persona": "ann", "x": 1}}, {"input": "q", "answer": {"x": 1}}]
    with pytest.raises(ValueError, match="got None in row 1"):
        load(rows, "--data.pref_group_key", "persona")


@pytest.mark.parametrize("flag", ["data.pref_group_key", "data.user_key"])
def test_a_key_that_no_column_has_lists_the_columns(load, flag):
    keys = {"data.pref_group_key": "persona", "data.user_key": "who", flag: "tribe"}
    with pytest.raises(ValueError, match=rf"--{flag} needs a column .* got 'tribe'.*'answer', 'input', 'per"):
        load(ROWS, *(word for key, value in keys.items() for word in (f"--{key}", value)))


def test_an_empty_file_is_refused(load):
    with pytest.raises(ValueError, match="at least one row, got an empty file '.*prompts.jsonl'"):
        load([], "--data.pref_group_key", "persona")


def test_an_empty_split_is_refused(host_args, monkeypatch):
    from openrlhf.datasets import utils

    monkeypatch.setattr(utils, "load_dataset", lambda *_, **__: {"train": Dataset.from_list(ROWS).select([])})
    flags = {"--advantage_estimator": "pgrpo", "--data.pref_group_key": "persona", "--data.prompt_dataset": "x.jsonl"}
    args = host_args(*(word for pair in flags.items() for word in pair))
    with pytest.raises(ValueError, match="at least one prompt, got an empty dataset 'x.jsonl'"):
        utils.blending_datasets("x.jsonl", None, strategy(args), 42)


def test_an_evaluation_set_needs_no_groups(load):
    data = load([{"input": "q", "answer": "x"}], "--data.pref_group_key", "persona", source="another.jsonl")
    assert data.prompts == ["q"] and type(data.prompts[0]) is str
