"""The factorized reward model without the host: texts, forward pass, folders."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, RobertaConfig

from openrlhf_pgrpo.models import factorized_reward as factorized

pytestmark = pytest.mark.core

PROMPTS = ["once upon ", "a ", "the dog ", "a "]
RESPONSES = ["a time", "b" * 50, "ran\n\n", "b\n<eos>"]


@pytest.fixture(scope="module")
def backbone(tiny):
    return tiny / "model"


@pytest.fixture(scope="module", params=["last", "mean"])
def made(request, backbone, tmp_path_factory):
    """A folder with two base rewards of random numbers and three users, and what it was made of."""
    rng = np.random.default_rng(0)
    head, coefficients = rng.normal(size=(2, 64)), rng.normal(size=(3, 2))
    folder = tmp_path_factory.mktemp(request.param)
    factorized.write(folder, backbone, head, coefficients, ["ana", "Łukasz", "3"], request.param)
    return folder, head, coefficients, request.param


# ---- texts ----------------------------------------------------------------------------------------------------------


def test_a_text_ends_once():
    assert factorized.text_of("p ", "yes", "<eos>") == "p yes <eos>"
    assert factorized.text_of("p ", "yes\n\n", "<eos>") == "p yes <eos>"
    assert factorized.text_of("p ", "yes<eos>", "<eos>") == "p yes<eos>"
    assert factorized.text_of("p ", "yes<eos>\n", "<eos>") == "p yes<eos>"
    assert factorized.text_of("", "", "<eos>") == " <eos>"


def test_a_text_that_is_cut_still_ends(backbone):
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    batch = factorized.encode(["abcdef <eos>", "a <eos>"], tokenizer, max_length=4)
    letters = dict(zip("abc", tokenizer.convert_tokens_to_ids(["a", "b", "c"])))
    space = tokenizer.convert_tokens_to_ids("Ġ")
    assert batch["input_ids"].tolist() == [
        [letters["a"], letters["b"], letters["c"], 1],  # <eos> is 1
        [0, letters["a"], space, 1],  # <pad> is 0, on the left
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]


def test_a_tokenizer_without_an_end_is_refused(backbone):
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="need a token that ends them, got neither eos nor sep"):
        factorized.end_of_text(tokenizer)
    tokenizer.sep_token = "<eos>"
    assert factorized.end_of_text(tokenizer) == "<eos>"


# ---- base rewards ---------------------------------------------------------------------------------------------------


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
    assert np.allclose(factorized.embed(backbone, PROMPTS, RESPONSES, pooling, batch_size=3), states, atol=1e-5)
    model = factorized.load(folder)
    for batch_size in (1, 4):  # whatever a text is padded with
        found = model.base_rewards(PROMPTS, RESPONSES, batch_size)
        assert found.shape == (4, 2) and found.dtype == np.float64
        assert np.allclose(found, states @ head.T, atol=1e-4)
    assert model.users == ["ana", "Łukasz", "3"] and np.allclose(model.coefficients, coefficients, atol=1e-6)
    assert np.allclose(model.prior().mean, coefficients.mean(0), atol=1e-6)


def test_forward_gives_the_users_of_rows_too(made):
    model = factorized.load(made[0])
    batch = factorized.encode(["a <eos>", "bc <eos>"], model.tokenizer, 9)
    with torch.no_grad():
        base_rewards, coefficients, outputs = model.model(**batch, users=torch.tensor([2, 0]))
        plain = model.model(**batch)
        again, same = model.model(**batch, return_output=True)
    assert torch.equal(base_rewards, plain) and torch.equal(again, plain)
    assert torch.equal(coefficients.double(), torch.tensor(model.coefficients[[2, 0]]))
    assert torch.equal(outputs.last_hidden_state, same.last_hidden_state)


def test_padding_may_stand_on_either_side(made):
    model = factorized.load(made[0])
    batch = factorized.encode(["abc <eos>", "d <eos>"], model.tokenizer, 9)
    pad = int(batch["attention_mask"][1].eq(0).sum())
    right = {name: torch.stack([rows[0], rows[1].roll(-pad)]) for name, rows in batch.items()}
    assert not torch.equal(right["input_ids"], batch["input_ids"])
    with torch.no_grad():
        assert torch.allclose(model.model(**batch), model.model(**right), atol=1e-4)


def test_head_and_table_stay_precise_beside_a_bf16_backbone(made):
    folder, head, *_ = made
    model = factorized.load(folder, torch.bfloat16).model
    assert next(model.base_model.parameters()).dtype == torch.bfloat16
    assert model.score.weight.dtype == model.coefficients.dtype == torch.float32
    assert torch.equal(model.score.weight, torch.tensor(head, dtype=torch.float32))


def test_packed_samples_are_refused():
    with pytest.raises(ValueError, match="one text in a row, got packed samples: leave --ds.packing_samples out"):
        factorized.factorized_reward_model(None, None, "score", True)


# ---- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_is_plain_files(made):
    folder, head, coefficients, pooling = made
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in ("base_rewards", "base_reward_users", "base_reward_pooling")} == {
        "base_rewards": 2,
        "base_reward_users": 3,
        "base_reward_pooling": pooling,
    }
    weights = load_file(folder / "model.safetensors")
    assert weights["score.weight"].shape == (2, 64) and weights["coefficients"].shape == (3, 2)
    assert {"model.embed_tokens.weight", "model.norm.weight"} < weights.keys()  # the host's names
    assert json.loads((folder / "users.json").read_text()) == ["ana", "Łukasz", "3"]
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl") or path.is_dir()]


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("name", ["users.json", "config.json", "model.safetensors"])
def test_the_fingerprint_is_of_all_that_rewards_depend_on(made, tmp_path, name):
    mine = copied(made[0], tmp_path / "copy")
    assert factorized.Folder(mine).fingerprint == factorized.Folder(made[0]).fingerprint
    if name == "model.safetensors":
        weights = load_file(mine / name)
        weights["score.weight"][0, 0] += 1
        save_file(weights, mine / name, {"format": "pt"})
    else:
        (mine / name).write_text((mine / name).read_text() + "\n")
    assert factorized.Folder(mine).fingerprint != factorized.Folder(made[0]).fingerprint


def test_folders_that_do_not_fit_are_refused(made, backbone, tmp_path):
    with pytest.raises(ValueError, match="to be a factorized reward model, got a config.json without base_rewards"):
        factorized.load(backbone)
    other = copied(made[0], tmp_path / "users")
    (other / "users.json").write_text('["ana"]')
    with pytest.raises(ValueError, match=r"coefficients of shape \(1, 2\), .*, got \(3, 2\): its files are of diff"):
        factorized.load(other)
    lacking = copied(made[0], tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="needs all weights, got none for score.weight"):
        factorized.load(lacking)


GOOD = dict(head=np.ones((2, 64)), coefficients=np.ones((2, 2)), users=["a", "b"], pooling="last")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(head=np.ones((2, 63))), r"a head of shape \(D, 64\) and coefficients \(2, D\), got \(2, 63\)"),
        (dict(coefficients=np.ones((2, 3))), r"got \(2, 64\) and \(2, 3\)"),
        (dict(coefficients=np.ones((3, 2))), r"got \(2, 64\) and \(3, 2\)"),
        (dict(head=np.full((2, 64), np.nan)), "need finite numbers, got nan or inf"),
        (dict(users=["a", "a"]), "an id of their own, .*, got 'a'"),
        (dict(users=["a", ""]), "got ''"),
        (dict(users=["a", 2]), "got 2"),
        (dict(pooling="first"), "pooling needs to be last or mean, got 'first'"),
    ],
)
def test_what_does_not_fit_is_not_written(backbone, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        factorized.write(tmp_path / "new", backbone, **{**GOOD, **change})
    assert not (tmp_path / "new").exists()


def test_writing_that_fails_leaves_the_old_folder(backbone, tmp_path, monkeypatch):
    factorized.write(tmp_path, backbone, **GOOD)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(factorized.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        factorized.write(tmp_path, backbone, **{**GOOD, "users": ["c", "d"]})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---- encoders -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("pooling", factorized.POOLINGS)
def test_an_encoder_sees_a_text_as_it_does_alone(encoder, pooling):
    folder, model, tokenizer = encoder
    texts = ["yes", "a longer answer", "x" * 100]
    found = factorized.embed(folder, [""] * 3, texts, pooling)
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
    factorized.write(tmp_path / "made", folder, head, np.ones((1, 2)), ["ana"], "mean")
    scored = factorized.load(tmp_path / "made").base_rewards(["p ", "p "], ["yes", "no" * 40])
    assert np.allclose(scored, factorized.embed(folder, ["p ", "p "], ["yes", "no" * 40], "mean") @ head.T, atol=1e-5)
