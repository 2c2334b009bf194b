"""Best of n for a user: in which order, and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from common import CHAT
from transformers import AutoTokenizer

from openrlhf_pgrpo.models.form import PLAIN, Form
from openrlhf_pgrpo.models.users import coefficients_for
from openrlhf_pgrpo.people import generation
from openrlhf_pgrpo.people.generation import Sampling, prompt_ids, written
from openrlhf_pgrpo.people.rerank import (
    check_length,
    check_texts,
    generate,
    leave_out,
    prompt_writer,
    rank_responses,
    read_candidates,
    read_prompts,
)

pytestmark = pytest.mark.core

TEXTS = ["Calm and rather long, I would say.", "Loud!", "Loud!!!"]


def test_each_user_gets_their_own_order(model):
    asked = ["p", "q"], [TEXTS, ["only"]]
    ann, bob = (rank_responses(model, *asked, coefficients_for(model, user, None)) for user in ("ann", "bob"))
    # base rewards (exclamation marks, letters / 10) are (0, 3.4), (1, .5), (3, .7); ann (2, -1), bob (-2, 1)
    assert ann[0]["rewards"] == pytest.approx([-3.4, 1.5, 5.3])
    assert bob[0]["rewards"] == pytest.approx([3.4, -1.5, -5.3])
    assert ann[0]["order"] == [2, 1, 0] and bob[0]["order"] == [0, 1, 2]
    assert ann[0]["best"] == "Loud!!!" and bob[0]["best"] == TEXTS[0]
    assert ann[1]["order"] == [0] and ann[1]["best"] == "only" and ann[1]["rewards"] == pytest.approx([-0.4])


def test_equal_rewards_keep_their_order(model):
    (row,) = rank_responses(model, ["p"], [["aa", "bb", "cc"]], np.ones(2))
    assert row["order"] == [0, 1, 2]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "p", "responses": []}, "line 2 of .* at least one text as 'responses', got an empty list"),
        ({"prompt": "p"}, "line 2 of .* needs the column 'responses'"),
        (
            {"prompt": "p", "responses": "xy"},
            "line 2 of .* needs a list of at least one text as 'responses', got 'xy'; CSV has no lists, JSONL and Par",
        ),
        ({"prompt": " ", "responses": ["x"]}, "line 2 of .* needs a text or messages as 'prompt', got a blank text"),
        ({"prompt": "p", "responses": [{"role": "a", "content": "x"}]}, "line 2 of .* got a struct with the keys"),
        ({"prompt": [{"role": "user"}], "responses": ["x"]}, "line 2 .* as 'prompt', got a struct .* as message 0"),
        ({"prompt": "p", "responses": ["x", None]}, "line 2 of .* needs texts or messages as 'responses', got null"),
        (
            {"prompt": "p", "responses": ["x", " "]},
            "line 2 of .* needs texts or messages as 'responses', got a blank text, ' '",
        ),
        *[
            ({"prompt": "p", "responses": ["x"], taken: 0}, f"line 2 of .* needs new columns .*, got '{taken}'")
            for taken in ("rewards", "order", "best")  # case A16
        ],
    ],
)
def test_bad_candidates_are_refused_by_their_line(jsonl, row, message):
    with pytest.raises(ValueError, match=message):
        read_candidates(jsonl("c.jsonl", [{"prompt": "p", "responses": ["x"]}, row]))


class Letters:
    """A model that reads six small letters, in the shape of `models.folder.Folder`."""

    name, max_length = "rm", 6

    def tokens(self, prompts, responses):
        texts = [(prompt + response).lower() for prompt, response in zip(prompts, responses)]
        sizes = np.array([*map(len, responses)])
        cut = np.array([len(text) > 6 for text in texts])
        empty = np.array([not response.strip() for response in responses])
        ids = [list(text[-6:]) for text in texts]
        return SimpleNamespace(ids=ids, cut=cut, too_long=sizes > 6, answers=sizes, empty=empty)


LETTERS = Letters()


def checked(*rows):
    """What is said about rows of (prompt, responses) on the lines 1, 3, 5 ... of c.jsonl."""
    return check_texts(LETTERS, *zip(*rows), lambda number: f"line {1 + 2 * number} of c.jsonl")


def test_a4_what_the_model_cannot_read_is_said_or_refused():
    assert checked(("p", ["x", "y"])) == []
    assert checked(("p", ["x", "y"]), ("a long one", ["x", "ex"])) == [
        "1 of 2 prompts are longer than the model reads: their beginnings were cut away"
    ]
    with pytest.raises(
        ValueError, match="line 1 of c.jsonl needs responses of at most 6 tokens, got 7 in response 1: drop"
    ):
        checked(("p", ["x", "seven.."]))


def test_a4_responses_that_are_equal_by_cutting_are_refused_with_line_and_number():
    """`xxxxx` and `xxxxxx` differ, and so do their texts, but not in the last six letters."""
    equal = ("ex", ["y", "xxxxx", "xxxxxx"])
    with pytest.raises(ValueError, match="^line 3 of c.jsonl needs .* 6 tokens .*, in 2 of 4 rows: shorten "):
        checked(("p", ["x", "y"]), equal, ("q", ["x"]), equal)


def test_a4_candidates_that_are_equal_by_themselves_are_no_fault():
    """People do sample the same answer twice, also to a prompt that is cut; some models read no capitals."""
    assert checked(("p", ["x", "x"])) == []
    assert checked(("a long one", ["x", "x", "y"]))[1:] == []
    assert checked(("p", ["x", "X", "y"]), ("a long one", ["ex", "Ex"])) == [
        "1 of 2 prompts are longer than the model reads: their beginnings were cut away",
        "2 of 2 prompts have responses that are the same to the model: they rank alike",
    ]


def test_rewards_that_are_not_finite_are_refused(model):
    model.base_rewards = lambda prompts, responses, batch_size: np.array([[1.0, np.nan]] * len(responses))
    with pytest.raises(ValueError, match="finite rewards, got nan or inf for 'x'"):
        rank_responses(model, ["p"], [["x"]], np.ones(2))


def test_candidates_from_vllm(jsonl, monkeypatch):
    def answers(policy, ids, sampling):
        assert policy == "policy" and sampling == Sampling(0.7, 99)
        assert [*ids.values()] == [
            [1],
            [1],
            [2, 3],
            [2, 3],
        ]  # equal ones together, for the cache
        for number in reversed(ids):  # as they are finished
            yield generation.Answer(number, f"{ids[number]} {number}", False)

    monkeypatch.setattr(generation, "generate", answers)
    responses = [["[1] 0", "[1] 2"], ["[2, 3] 1", "[2, 3] 3"]]
    assert generate([[1], [2, 3]], "policy", 2, Sampling(0.7, 99)) == responses
    with pytest.raises(ValueError, match="needs the column 'prompt'"):
        read_prompts(jsonl("p.jsonl", [{"text": "p"}]))


def test_a3_responses_that_are_nothing_but_their_end_are_refused_with_their_line(reader_of):
    """`rerank` on the responses `<eos>` and `ok` called `<eos>` the best."""
    reader = reader_of(PLAIN)
    for nothing in ("<eos>", "<eos>\n", " <eos>"):
        with pytest.raises(ValueError, match="line 7 of c.jsonl needs responses with words, got .*: drop it"):
            check_texts(reader, ["p"], [["ok", nothing]], lambda number: "line 7 of c.jsonl")


def test_b4_generated_responses_that_are_blank_or_too_long_are_left_out_and_counted():
    sampled = [["", "x", "seven.."], [" ", "", "seven.."]]
    left, said = leave_out(LETTERS, ["p", "q"], sampled, Path("o.jsonl"))
    assert left == [["x"], []]
    assert said == [
        "3 of 6 responses are blank: they are left out",
        "2 of 6 responses are longer than the 6 tokens that the reward model reads: they are left out",
        "1 of 2 prompts have no response left: their best is null",
    ]
    assert leave_out(LETTERS, ["p"], left[:1], Path("o.jsonl")) == (left[:1], [])
    with pytest.raises(
        ValueError, match="a policy that answers, got 2 blank responses and 1 .*look at them in o.jsonl"
    ):
        leave_out(LETTERS, ["q"], sampled[1:], Path("o.jsonl"))


def test_a3_a_prompt_whose_responses_are_all_left_out_has_no_best(model):
    ranked = rank_responses(model, ["p", "q"], [["x"], []], np.ones(2))
    assert ranked[0]["best"] == "x" and ranked[1] == {"rewards": [], "order": [], "best": None}


def test_b4_max_tokens_is_compared_with_what_the_reward_model_reads():
    check_length(5, LETTERS)  # and the end
    with pytest.raises(ValueError, match="--max_tokens needs fewer than the 6 tokens that rm reads, got 6: lower it"):
        check_length(6, LETTERS)


# --- A3: the policy is prompted as the reward model's texts are written ----------------------------------------------

QUESTION = [{"role": "user", "content": "why?"}]


@pytest.fixture
def policy_of(tiny, tmp_path):
    """The folder of a tokenizer with or without a chat template."""

    def policy_of(template):
        tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "policy")
        return str(tmp_path / "policy")

    return policy_of


def prompted(writer, prompt, rewards):
    written(rewards, {"line 3 of p.jsonl": prompt})
    (ids,) = prompt_ids(writer, {"line 3 of p.jsonl": prompt})
    return writer.tokenizer.decode(ids)


def test_a3_a_chat_policy_is_prompted_by_its_template_if_the_reward_model_is_of_that_form(policy_of, reader_of):
    """With plain prompts, 20 of 32 answers were empty."""
    rewards = reader_of(Form(CHAT + "{# another file, the same prompts #}")).writer
    writer = prompt_writer(policy_of(CHAT), rewards, False)
    assert prompted(writer, "why?", rewards) == prompted(writer, QUESTION, rewards) == "<user>why?<a>"


@pytest.mark.parametrize("form", [PLAIN, Form(CHAT.replace("<a>", "<b>")), Form(input_template="Q: {}")])
def test_a3_a_policy_with_another_template_than_the_reward_model_is_refused(policy_of, reader_of, form):
    policy, rewards = policy_of(CHAT), reader_of(form).writer
    with pytest.raises(
        ValueError, match="needs a reward model .* written by the chat template of .*policy, got .*: make"
    ) as e:
        prompt_writer(policy, rewards, False)
    assert f"factorize --chat_template {policy}, or pass --plain_prompts" in str(e.value)
    assert prompted(prompt_writer(policy, rewards, True), "why?", rewards) == "why?"


def test_a3_a_policy_without_a_template_is_prompted_in_the_form_of_the_reward_model(policy_of, reader_of):
    policy, chat = policy_of(None), reader_of(Form(CHAT)).writer
    for form, text in ((PLAIN, "why?"), (Form(input_template="Q: {}\nA: "), "Q: why?\nA: ")):
        rewards = reader_of(form).writer
        assert prompted(prompt_writer(policy, rewards, False), "why?", rewards) == text
    with pytest.raises(ValueError, match="which has no chat template: name a policy with that template, or pass"):
        prompt_writer(policy, chat, False)


def test_a3_a_prompt_that_policy_or_reward_model_cannot_be_given_is_refused_with_its_line(policy_of, reader_of):
    chat, plain = reader_of(Form(CHAT)).writer, reader_of(PLAIN).writer
    for rewards in (chat, plain):
        with pytest.raises(
            ValueError, match="line 3 of p.jsonl: a prompt needs to be a text, .*got a list of messages"
        ):
            prompted(prompt_writer(policy_of(CHAT), rewards, True), QUESTION, rewards)


def test_candidates_that_repeat_their_prompt_are_refused_or_said(jsonl, capsys):
    rows = [{"prompt": f"{n}?", "responses": [f"{n}? so", f"{n}? no"]} for n in range(10)]
    with pytest.raises(ValueError, match="begin after their prompt, got ones that repeat it in 10 lines .1, 2, "):
        read_candidates(jsonl("c.jsonl", rows))
    for some in ([*rows, {"prompt": "who?", "responses": ["you"]}], [{"prompt": "Hello", "responses": ["Hello!"]}]):
        read_candidates(jsonl("c.jsonl", some))
        assert capsys.readouterr().out.startswith("warning: answers begin with the text of their prompt in ")


def test_messages_are_candidates_in_the_form_of_the_model(jsonl, reader_of):
    answer = [{"role": "assistant", "content": "so"}]
    path = jsonl("c.jsonl", [{"prompt": QUESTION, "responses": ["so", answer, "no"]}])
    table = read_candidates(path)
    asked = [QUESTION], [["so", answer, "no"]], table.place
    assert table.rows == [{"prompt": QUESTION, "responses": asked[1][0]}]
    reader = reader_of(Form(CHAT))
    assert check_texts(reader, *asked) == [
        "1 of 1 prompts have responses that are the same to the model: they rank alike"
    ]
    ids = reader.tokens([QUESTION], [answer]).ids[0]
    assert reader.texts.tokenizer.decode(ids) == "<user>why?<a>so<eos>"
    with pytest.raises(ValueError, match=f"line 1 of {path}: a prompt needs to be a text"):
        check_texts(reader_of(PLAIN), *asked)
