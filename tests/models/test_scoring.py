"""Base rewards are the head times the state of each text alone, whatever it is batched with."""

import io
from functools import partial
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, RobertaConfig

from openrlhf_pgrpo.models import scoring
from openrlhf_pgrpo.models.folder import write
from openrlhf_pgrpo.models.network import POOLINGS
from openrlhf_pgrpo.models.scoring import embed, load, texts_of

pytestmark = pytest.mark.core

PROMPTS = ["once upon ", "a ", "the dog ", "a "]
RESPONSES = ["a time", "b" * 50, "ran\n\n", "b\n<eos>"]


def by_hand(backbone, pooling):
    """States (N, H), one text at a time, so without padding."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = AutoModel.from_pretrained(backbone, dtype=torch.float32).eval()
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES):
        text = prompt + response.removesuffix("<eos>") + "<eos>"
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).last_hidden_state[0]
        rows.append(hidden[-1] if pooling == "last" else hidden.mean(0))
    return torch.stack(rows).double().numpy()


def test_base_rewards_are_head_times_state(made, backbone):
    folder, head, coefficients, pooling = made
    states = by_hand(backbone, pooling)
    assert np.allclose(embed(backbone, PROMPTS, RESPONSES, pooling, batch_size=3), states, atol=1e-5)
    model = load(folder)
    for batch_size in (1, 4):  # whatever a text is padded with
        found = model.base_rewards(PROMPTS, RESPONSES, batch_size)
        assert found.shape == (4, 2) and found.dtype == np.float64
        assert np.allclose(found, states @ head.T, atol=1e-4)
    assert model.users == ["ana", "Łukasz", "3"] and np.allclose(model.coefficients, coefficients, atol=1e-6)


@pytest.fixture(params=[(BertConfig, {}), (RobertaConfig, {"pad_token_id": 5})], ids=["bert", "roberta"])
def encoder(request, tiny, tmp_path):
    """A tiny encoder of 32 positions (RoBERTa's pad takes 6 of them), whose texts end with a separator."""
    config, more = request.param
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.sep_token, tokenizer.eos_token = "<eos>", None
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(more.get("pad_token_id", 0))
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    more = {"max_position_embeddings": 32, "vocab_size": len(tokenizer), "initializer_range": 0.5, **more}
    model = AutoModel.from_config(config(**shape, **more)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path, model, tokenizer


@pytest.mark.parametrize("pooling", POOLINGS)
def test_d10_an_encoder_reads_the_end_of_a_long_text_within_its_positions(encoder, pooling):
    """A query of more tokens than positions was an IndexError, for the short texts of the same request too."""
    folder, model, tokenizer = encoder
    prompts, texts = ["", "", "x" * 100], ["yes", "a longer answer", "the answer"]
    found = embed(folder, prompts, texts, pooling)
    room = 32 - (6 if model.config.model_type == "roberta" else 0)
    for prompt, text, state in zip(prompts, texts, found):
        ids = tokenizer(f"{prompt}{text}<eos>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            hidden = model(torch.tensor([ids[-room:]])).last_hidden_state[0].double()
        expected = hidden[-1] if pooling == "last" else hidden.mean(0)
        assert np.allclose(state, expected, atol=1e-5)


def test_a_model_on_an_encoder_scores_what_it_was_fitted_on(encoder, tmp_path):
    folder, _, _ = encoder
    head = np.random.default_rng(0).normal(size=(2, 16))
    write(tmp_path / "made", folder, head, np.ones((1, 2)), ["ana"], "mean")
    prompts = ["p ", "p " * 40]
    scored = load(tmp_path / "made").base_rewards(prompts, ["yes", "no"])
    assert np.allclose(scored, embed(folder, prompts, ["yes", "no"], "mean") @ head.T, atol=1e-5)


def test_a4_prompts_beyond_the_context_leave_answers_apart(made):
    """The answers were cut away, so all candidates had one reward. The caller can ask which prompts were cut."""
    model = load(made[0])
    prompts, responses = ["once upon a time " * 40] * 2, ["yes", "no"]
    one, other = model.base_rewards(prompts, responses)
    assert np.abs(one - other).max() > 0.01
    found = model.texts.tokens([*prompts, "a"], [*responses, "b"])
    assert found.cut.tolist() == [True, True, False] and model.texts.max_length == model.max_length == 256


def test_a4_an_answer_that_does_not_fit_is_refused_with_its_number(made, backbone):
    message = (
        "fit into the 256 tokens that the model reads, got 301 with its end in text 1: shorten it, or leave it out"
    )
    for read in (load(made[0]).base_rewards, partial(embed, backbone)):
        with pytest.raises(ValueError, match=message):
            read(["", ""], ["yes", "x" * 300])


def test_e3_a_batch_has_few_tokens_however_many_texts_there_are(monkeypatch):
    """One text of 2,500 words padded two hundred short ones to its length: 20.9 GB."""
    monkeypatch.setattr(scoring, "MOST_TOKENS", 100)
    ids = [[7] * length for length in [300, *[2] * 200, 30, 31]]
    for forward in (40, 10**6):
        found = scoring.batches(ids, 64, forward)
        assert found[:2] == [[0], [202, 201]] and sorted(sum(found, [])) == list(range(len(ids)))
        assert max(len(batch) for batch in found) == 50  # of 2 tokens each
        sizes = [len(batch) for batch in scoring.batches(ids[1:201], 7, forward)]
        assert sum(sizes) == 200 and len(sizes) == 29 and max(sizes) == 7
    assert scoring.batches([], 7, 40) == []


def test_no_other_batches_cost_less():
    """Of texts in the order of their lengths, all ways to cut; the cheapest is found."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = [[7] * length for length in rng.integers(1, 60, rng.integers(1, 9))]
        lengths = sorted(map(len, ids), reverse=True)

        def cost(cuts, lengths=lengths):
            parts = np.split(lengths, cuts)
            return sum(20 + part[0] * len(part) for part in parts) if max(map(len, parts)) <= 4 else np.inf

        places = range(1, len(ids))
        cuts = [some for count in range(len(ids)) for some in combinations(places, count)]
        found = scoring.batches(ids, 4, 20)
        assert cost(np.cumsum([len(batch) for batch in found])[:-1]) == min(map(cost, cuts))
        assert [len(ids[number]) for number in sum(found, [])] == lengths


def test_short_texts_are_not_padded_to_a_long_one(made):
    model = load(made[0])
    read, forward = [], model.model.forward
    model.model.forward = lambda **batch: read.append(batch["input_ids"].shape) or forward(**batch)
    model.base_rewards([""] * 9, [*"abcdefgh", "a long one " * 20], batch_size=16)
    assert [texts for texts, _ in read] == [1, 8] and read[0][1] > 100 and read[1][1] < 5


def test_tokens_are_made_of_some_texts_at_a_time(made, monkeypatch):
    """A million rows took 60 GB of tokens before the first text was read. Batches and numbers are the same."""
    model, texts = load(made[0]), [*"abcdefgh", "a long one " * 9, "a"]
    prompts = [f"{number} says " for number in range(10)]
    whole = model.base_rewards(prompts, texts)
    at_once, tokens = [], model.texts.tokens
    monkeypatch.setattr(scoring, "AT_ONCE", 4)
    monkeypatch.setattr(
        model.texts, "tokens", lambda before, after, **of: at_once.append(len(before)) or tokens(before, after, **of)
    )
    np.testing.assert_array_equal(model.base_rewards(prompts, texts), whole)
    assert at_once == [4, 4, 2]
    with pytest.raises(ValueError, match="got 301 with its end in text 9: shorten it"):
        model.base_rewards(prompts, [*texts[:9], "x" * 300])
    with pytest.raises(ValueError, match="half of one, .*, in text 5: correct or drop it"):
        model.base_rewards(prompts, [*texts[:5], "\ud83d", *texts[:4]])


def test_equal_texts_have_equal_rewards_and_are_read_once(made):
    """So two equal candidates tie, whatever they are batched with."""
    model = load(made[0])
    read, forward = [], model.model.forward
    model.model.forward = lambda **batch: read.append(len(batch["input_ids"])) or forward(**batch)
    found = model.base_rewards(["a "] * 4, ["yes", "no", "yes", "yes<eos>"], batch_size=2)
    assert (found[0] == found[2]).all() and (found[0] == found[3]).all() and sum(read) == 2


def test_a_text_is_a_prompt_with_an_answer():
    texts, numbers = texts_of([("p", "a", "b"), ("p", "c", "b"), ("q", "a", "b")])
    assert texts == [("p", "a"), ("p", "b"), ("p", "c"), ("q", "a"), ("q", "b")]
    assert numbers.tolist() == [[0, 1], [2, 1], [3, 4]]


def test_a_token_that_the_weights_lack_is_refused(made):
    """A tokenizer of another model was an IndexError on a CPU; on a GPU such an assert takes the process down."""
    model = load(made[0])
    model.texts.tokenizer.add_tokens(["new"])
    message = "one of the 258 that the model knows, got 258 in text 1: tokenizer and weights are of different models"
    with pytest.raises(ValueError, match=message):
        model.base_rewards(["a", "b"], ["c", "new"])


def test_c3_a_long_job_says_how_far_it_is(made, monkeypatch):
    """Nothing was said in the ten minutes that the texts of a large file take."""
    model = load(made[0])
    monkeypatch.setattr("sys.stderr", terminal := io.StringIO())
    terminal.isatty = lambda: True
    model.base_rewards([""] * 4, list("abcd"))
    assert terminal.getvalue() == ""  # it was quick
    monkeypatch.setattr("openrlhf_pgrpo.progress.DELAY", 0.0)
    model.base_rewards([""] * 4, list("abcd"), batch_size=1)
    assert "reading texts: " in terminal.getvalue() and "4/4" in terminal.getvalue()
