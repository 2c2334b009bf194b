"""Best of n for a user: in which order, and what is refused."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from openrlhf_pgrpo.models.users import coefficients_for
from openrlhf_pgrpo.people.rerank import check_texts, generate, rank_responses, read_candidates

pytestmark = pytest.mark.core

TEXTS = ["Calm and rather long, I would say.", "Loud!", "Loud!!!"]


def test_each_user_gets_their_own_order(model):
    rows = [{"prompt": "p", "responses": TEXTS, "id": 7}, {"prompt": "q", "responses": ["only"]}]
    ann, bob = (rank_responses(model, rows, coefficients_for(model, user, None)) for user in ("ann", "bob"))
    # base rewards (exclamation marks, letters / 10) are (0, 3.4), (1, .5), (3, .7); ann (2, -1), bob (-2, 1)
    assert ann[0]["rewards"] == pytest.approx([-3.4, 1.5, 5.3])
    assert bob[0]["rewards"] == pytest.approx([3.4, -1.5, -5.3])
    assert ann[0]["order"] == [2, 1, 0] and bob[0]["order"] == [0, 1, 2]
    assert ann[0]["best"] == "Loud!!!" and bob[0]["best"] == TEXTS[0]
    assert ann[0]["id"] == 7 and ann[0]["responses"] == TEXTS
    assert ann[1]["order"] == [0] and ann[1]["best"] == "only" and ann[1]["rewards"] == pytest.approx([-0.4])


def test_equal_rewards_keep_their_order(model):
    (row,) = rank_responses(model, [{"prompt": "p", "responses": ["aa", "bb", "cc"]}], np.ones(2))
    assert row["order"] == [0, 1, 2]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "p", "responses": []}, "line 2 of .* at least one text as 'responses', got an empty list"),
        ({"prompt": "p"}, "line 2 of .* needs the column 'responses'"),
        ({"prompt": "p", "responses": ["x", None]}, "line 2 of .* needs a list of texts"),
        ({"prompt": "p", "responses": ["x", " "]}, "line 2 of .* needs texts as 'responses', got ' '"),
        *[
            ({"prompt": "p", "responses": ["x"], taken: 0}, f"line 2 of .* needs new columns .*, got '{taken}'")
            for taken in ("rewards", "order", "best")  # case A16
        ],
    ],
)
def test_bad_candidates_are_refused_by_their_line(jsonl, row, message):
    with pytest.raises(ValueError, match=message):
        read_candidates(jsonl("c.jsonl", [{"prompt": "p", "responses": ["x"]}, row]))


def test_a4_what_the_model_cannot_read_is_said_or_refused():
    class Letters:
        """A tokenizer of letters that reads six, in the shape of `models.texts.Texts`."""

        max_length = 6

        def tokens(self, prompts, responses):
            ids = [list(prompt + response)[-6:] for prompt, response in zip(prompts, responses)]
            cut = np.array([len(prompt + response) > 6 for prompt, response in zip(prompts, responses)])
            sizes = np.array([*map(len, responses)])
            return SimpleNamespace(ids=ids, cut=cut, too_long=sizes > 6, answers=sizes)

    model = SimpleNamespace(texts=Letters())
    rows = [{"prompt": "p", "responses": ["x", "y"]}, {"prompt": "a long one", "responses": ["x", "ex"]}]
    assert check_texts(model, rows[:1]) == []
    assert check_texts(model, [*rows, {"prompt": "ex", "responses": ["xxxxx", "xxxxxx"]}]) == [
        "2 of 3 prompts are longer than the model reads: their beginnings were cut away",
        "1 of 3 prompts have responses that are the same to the model: they rank alike",
    ]
    with pytest.raises(ValueError, match="a response needs at most 6 tokens, got 7 in response 1 to 'p': drop it"):
        check_texts(model, [{"prompt": "p", "responses": ["x", "seven.."]}])


def test_rewards_that_are_not_finite_are_refused(model):
    model.base_rewards = lambda prompts, responses, batch_size: np.array([[1.0, np.nan]] * len(responses))
    with pytest.raises(ValueError, match="finite rewards, got nan or inf for 'x'"):
        rank_responses(model, [{"prompt": "p", "responses": ["x"]}], np.ones(2))


def test_candidates_from_vllm(jsonl, monkeypatch):
    asked = {}

    class LLM:
        def __init__(self, policy, enforce_eager, trust_remote_code):
            asked["policy"] = policy

        def generate(self, prompts, sampling):
            asked["sampling"] = sampling
            texts = [[f"{prompt} {i}" for i in range(sampling["n"])] for prompt in prompts]
            return [SimpleNamespace(outputs=[SimpleNamespace(text=text) for text in of_one]) for of_one in texts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=dict))
    rows = generate(jsonl("p.jsonl", [{"prompt": "p", "id": 1}, {"prompt": "q"}]), "policy", 2, 0.7, 99)
    assert rows == [
        {"prompt": "p", "id": 1, "responses": ["p 0", "p 1"]},
        {"prompt": "q", "responses": ["q 0", "q 1"]},
    ]
    assert asked == {"policy": "policy", "sampling": {"n": 2, "temperature": 0.7, "max_tokens": 99}}
    with pytest.raises(ValueError, match="needs the column 'prompt'"):
        generate(jsonl("p.jsonl", [{"text": "p"}]), "policy", 2, 0.7, 99)
