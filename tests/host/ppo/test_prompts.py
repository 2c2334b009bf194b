"""How preference group and user travel from a dataset column to the prompt."""

import json
import pickle
import time
from types import SimpleNamespace

import pyarrow as pa
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
    with pytest.raises(ValueError, match=r"name in 'who' \(--data.user_key\), got .* in row 1 of .*: fill it"):
        rows = [ROWS[0], {**ROWS[1], "who": value}]
        load(rows, "--advantage_estimator", "pgrpo_global", "--data.user_key", "who")


@pytest.mark.parametrize("value", [None, ""])
def test_a_row_without_its_group_is_named(load, value):
    with pytest.raises(
        ValueError, match=r"name in 'persona' \(--data.pref_group_key\), got .* in row 1 of .*: fill it"
    ):
        load([ROWS[0], {**ROWS[1], "persona": value}], "--data.pref_group_key", "persona")


def test_a_struct_label_without_its_group_is_named(load):
    rows = [{"input": "q", "answer": {"persona": "ann", "x": 1}}, {"input": "q", "answer": {"x": 1}}]
    with pytest.raises(ValueError, match="got null in row 1"):
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


def test_an_evaluation_may_be_another_split_of_the_same_data(host_args, tmp_path):
    from datasets import Dataset, DatasetDict
    from openrlhf.datasets.utils import blending_datasets

    rows = {"train": ROWS, "test": [{"input": "q", "answer": "x"}]}
    columns = {"input": [], "answer": [], "persona": [], "who": []}
    parts = {
        name: Dataset.from_dict({key: [row.get(key) for row in part] for key in columns})
        for name, part in rows.items()
    }
    DatasetDict(parts).save_to_disk(tmp_path / "both")
    words = ("--data.prompt_dataset", str(tmp_path / "both"), "--data.pref_group_key", "persona")
    args = host_args("--advantage_estimator", "pgrpo", "--data.label_key", "answer", *words)
    found = blending_datasets(str(tmp_path / "both"), None, strategy(args), 42, dataset_split="test")
    assert found["input"][:] == ["q"]


@pytest.mark.parametrize("value", [float("nan"), {"id": 1}, ["ann"], "  "])
def test_a7_a_name_that_is_none_is_refused(load, value):
    """NaN was the preference group 'nan', a struct its printed form."""
    rows = [{**row, "persona": value} for row in ROWS]
    with pytest.raises(ValueError, match=r"name in 'persona' .*, got .* in row 0 of '.*prompts.jsonl'"):
        load(rows, "--data.pref_group_key", "persona")


# ---- what is a prompt -----------------------------------------------------------------------------------------------


def user(text):
    return {"role": "user", "content": text}


CHAT = [user("why?")]
REPLY = {"role": "assistant", "content": "so"}
NOT_PLAIN = {
    "a list of messages in row 1 of '.*prompts.jsonl': pass --data.apply_chat_template": CHAT,
    "null in row 1 of .*: fill it in or drop the row": None,
    "int 3 in row 1 of .*: write it as a text": 3,
    "an empty text in row 1": "",
    r"a blank text, ' \\n' in row 1": " \n",
    "a struct with the keys 'text' in row 1": {"text": "why?"},
    "a list, .'why.'. in row 1": ["why?"],
}
NO_CHAT = {
    "null in row 1 of .*: fill it in or drop the row": None,
    "a struct with the keys 'role', 'content' in row 1": user("why?"),
    "a struct with the keys 'from', 'value' as message 0 in row 1 of .*: write messages as": [
        {"from": "a", "value": "b"}
    ],
    "null as the content of message 0 in row 1": [user(None)],
    "int 3 as the content of message 0 in row 1": [user(3)],
    "null as the role of message 0 in row 1": [{"role": None, "content": "why?"}],
    "a last message of the assistant in row 1 of .*: drop it": [*CHAT, REPLY],
    "an empty text as the content of the last message": [user("")],
    "a blank text, '.u200b' as the content of the last message": [user("\u200b")],
    "parts that show nothing as the content of the last message": [user([{"type": "text", "text": ""}])],
    "an empty text as the content of message 0": [user(""), REPLY, *CHAT],
    "a last message of the role 'gpt', an assistant's in row 1": [*CHAT, {"role": "gpt", "content": "so"}],
    "messages of the role 'system' alone": [{"role": "system", "content": "be kind"}],
    "a list, .. in row 1": [],
    "'why.' as message 0 in row 1": ["why?"],
    "an empty text in row 1": "",
}


@pytest.fixture
def check(host_args):
    """The check of rows whose prompts are `given`, as the look before a run calls it."""
    from openrlhf_pgrpo.host.ppo import prompts

    def check(given, *argv, training=True, **columns):
        dataset = Dataset(pa.table({"input": given, **columns}))
        return prompts.check(dataset, host_args(*argv), "'p.jsonl'", training)

    return check


@pytest.mark.parametrize("message", NOT_PLAIN)
def test_a6_a_prompt_that_is_no_text_is_refused(load, message):
    """It would train on the text "[{'role': 'user', ...}]", on 'None' or on '3'."""
    rows = [{"input": "q", "answer": "x", "g": "a"}, {"input": NOT_PLAIN[message], "answer": "x", "g": "a"}]
    with pytest.raises(ValueError, match=f"every row needs a text in 'input' .--data.input_key., got {message}"):
        load(rows, "--data.pref_group_key", "g")


@pytest.mark.parametrize("message", NO_CHAT)
def test_a6_a_prompt_that_is_no_conversation_is_refused(load, message):
    rows = [{"input": CHAT, "answer": "x", "g": "a"}, {"input": NO_CHAT[message], "answer": "x", "g": "a"}]
    with pytest.raises(ValueError, match=f"every row needs a .*messages.* in 'input' .*, got {message}"):
        load(rows, "--data.pref_group_key", "g", "--data.apply_chat_template")


def test_a6_all_rows_that_are_wrong_are_counted_at_once(check):
    with pytest.raises(
        ValueError, match=r"got null in row 1 of 'p.jsonl' \(and 6 more: row 2, 3, 4, 5, ...\): fill it in"
    ):
        check(["q", *[None] * 7])


def test_a6_prompts_of_an_evaluation_are_checked_too(load):
    with pytest.raises(ValueError, match="got a list of messages in row 0 of '.*prompts.jsonl': pass --data.apply"):
        load([{"input": CHAT, "answer": "x"}], "--data.pref_group_key", "persona", source="another.jsonl")


def test_a6_conversations_and_texts_are_fine_with_a_template(check):
    parts = [{"role": "user", "content": [{"type": "text", "text": "why?"}]}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    flag = "--data.apply_chat_template"
    assert check(["why?", "how?"], flag) == []
    assert check([CHAT, [user("a"), REPLY, user("b")]], flag) == []
    assert check([parts], flag) == [] and check([[user("a"), call, {"role": "tool", "content": "noon"}]], flag) == []


def test_a6_other_columns_that_the_flags_name_have_to_be_there(check):
    with pytest.raises(ValueError, match="--data.input_key needs a column of 'p.jsonl', got 'text'; columns are"):
        check(["q"], "--data.input_key", "text")
    with pytest.raises(ValueError, match="--data.label_key needs a column of 'p.jsonl', got 'truth'; columns are"):
        check(["q"], "--data.label_key", "truth")
    with pytest.raises(ValueError, match="--data.max_images_per_prompt 2 needs a column of images .*, got 'images'"):
        check(["q"], "--data.max_images_per_prompt", "2", "--actor.freeze_visual_encoder")


def test_a6_what_only_looks_wrong_is_said(check):
    (said,) = check(["q"] * 3, "--data.label_key", "y", y=[None, "a", None])
    assert (
        "no label in 'y' (--data.label_key) in row 0 of 'p.jsonl' (and 1 more: row 2)" in said and "gets None" in said
    )
    (said,) = check(["q"], images=["a.png"])
    assert "images in 'images' of 'p.jsonl' are not read without --data.max_images_per_prompt" in said
    (said,) = check(["q"], "--data.apply_chat_template", "--data.input_template", "Q: {}")
    assert "--data.input_template does nothing" in said
    (said,) = check(["q"] * 2, "--data.pref_group_key", "g", g=["a", " A"])
    assert "differ only in case, white space or characters without a width" in said


def test_a6_a_template_that_no_prompt_fits_is_refused(check):
    with pytest.raises(ValueError, match="--data.input_template needs one {}, .* got 'Q: {} {json}': double them"):
        check(["q"], "--data.input_template", "Q: {} {json}")


def test_a6_a_check_of_many_rows_takes_a_moment(check):
    """At most a second for 1e5 rows; here a tenth of them, in processor time."""
    rows = 10_000
    start = time.process_time()
    check(["once upon a time " * 20] * rows, "--data.pref_group_key", "g", g=[f"u{i}" for i in range(rows)])
    assert time.process_time() - start < 1
