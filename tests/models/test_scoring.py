"""Base rewards are the head times the state of each text alone, whatever it is batched with."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, RobertaConfig

from openrlhf_pgrpo.models.folder import write
from openrlhf_pgrpo.models.network import POOLINGS
from openrlhf_pgrpo.models.scoring import embed, load

pytestmark = pytest.mark.core

PROMPTS = ["once upon ", "a ", "the dog ", "a "]
RESPONSES = ["a time", "b" * 50, "ran\n\n", "b\n<eos>"]


def by_hand(backbone, pooling):
    """States (N, H), one text at a time, so without padding."""
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    model = AutoModel.from_pretrained(backbone, dtype=torch.float32).eval()
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES):
        text = (prompt + response).rstrip("\n")
        text = text if text.endswith("<eos>") else text + " <eos>"
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
def test_an_encoder_sees_a_text_as_it_does_alone(encoder, pooling):
    folder, model, tokenizer = encoder
    texts = ["yes", "a longer answer", "x" * 100]
    found = embed(folder, [""] * 3, texts, pooling)
    room = 32 - (6 if model.config.model_type == "roberta" else 0)
    for text, state in zip(texts, found):
        ids = tokenizer(f"{text} <eos>", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([ids if len(ids) <= room else [*ids[: room - 1], 1]])  # <eos> is 1
        with torch.no_grad():
            hidden = model(ids).last_hidden_state[0].double()
        expected = hidden[-1] if pooling == "last" else hidden.mean(0)
        assert np.allclose(state, expected, atol=1e-5)


def test_a_model_on_an_encoder_scores_what_it_was_fitted_on(encoder, tmp_path):
    folder, _, _ = encoder
    head = np.random.default_rng(0).normal(size=(2, 16))
    write(tmp_path / "made", folder, head, np.ones((1, 2)), ["ana"], "mean")
    scored = load(tmp_path / "made").base_rewards(["p ", "p "], ["yes", "no" * 40])
    assert np.allclose(scored, embed(folder, ["p ", "p "], ["yes", "no" * 40], "mean") @ head.T, atol=1e-5)
