"""One user of a factorized reward model as the host's own reward model."""

import importlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from openrlhf_pgrpo.models.folder import Folder, write
from openrlhf_pgrpo.models.scalar_reward import export_user
from openrlhf_pgrpo.models.scoring import embed, load

pytestmark = pytest.mark.host

PROMPTS = ["once upon ", "a ", "the dog "]
RESPONSES = ["a time", "b" * 50, "ran"]


@pytest.fixture
def as_the_host_scores(hooks, monkeypatch):
    """Loads a folder with the host's factory, which has to take its own class, and scores as the host's server does:
    left padding, no special tokens."""

    def as_the_host_scores(folder, tokenizer):
        monkeypatch.setattr("openrlhf.utils.utils.convert_to_torch_dtype", lambda name: torch.float32)
        host = importlib.import_module("openrlhf.models.model")
        model = host.get_llm_for_sequence_regression(str(folder), "reward", attn_implementation="sdpa")
        assert type(model).__qualname__ == "_get_reward_model.<locals>.RewardModel"
        texts = [f"{prompt}{response}<eos>" for prompt, response in zip(PROMPTS, RESPONSES)]
        tokenizer.padding_side = "left"
        batch = tokenizer(texts, return_tensors="pt", add_special_tokens=False, padding=True)
        with torch.no_grad():
            return model.eval()(batch["input_ids"], batch["attention_mask"])

    return as_the_host_scores


@pytest.mark.parametrize("user", ["ana", "cleo"])
def test_an_exported_user_is_a_plain_reward_model_of_the_host(factorized, tmp_path, as_the_host_scores, user):
    expected = load(factorized)
    coefficients = expected.coefficients[expected.users.index(user)]
    export_user(Folder(factorized), coefficients, tmp_path / "out")
    rewards = expected.base_rewards(PROMPTS, RESPONSES) @ coefficients
    found = as_the_host_scores(tmp_path / "out", expected.texts.tokenizer)
    assert found.shape == (3,) and np.abs(found.double().numpy() - rewards).max() < 1e-4
    assert np.abs(rewards).max() > 1  # or 1e-4 would say little

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["RewardModel"]
    assert [name for name in config if name.startswith("base_rew")] == [
        "base_reward_form"
    ]  # how its texts are written
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["score.weight"].shape == (1, 64) and "coefficients" not in weights
    assert not (tmp_path / "out" / "users.json").exists()


def test_what_cannot_be_exported_is_refused(factorized, tiny, tmp_path):
    (tmp_path / "something").touch()
    with pytest.raises(ValueError, match="--output needs a new or empty folder, got"):
        export_user(Folder(factorized), np.ones(3), tmp_path)
    model = Folder(factorized)
    for coefficients in ([1.0, 2.0], [1.0, 2.0, float("nan")]):
        with pytest.raises(ValueError, match="needs 3 finite coefficients, got"):
            export_user(model, np.array(coefficients), tmp_path / "new")
    states = embed(tiny / "model", PROMPTS, RESPONSES, "mean")
    write(tmp_path / "mean", tiny / "model", states[:2], np.eye(2), ["a", "b"], "mean")
    with pytest.raises(ValueError, match="base rewards of the last token, got a mean over all"):
        export_user(Folder(tmp_path / "mean"), np.ones(2), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("size, found", [(1e25, "inf or nan"), (1e-25, "only zeros")])
def test_weights_that_float32_cannot_hold_are_refused(tiny, tmp_path, size, found):
    """They are a product of two numbers, each of which it holds."""
    write(tmp_path / "rm", tiny / "model", np.full((2, 64), size), np.full((2, 2), size), ["a", "b"])
    model = Folder(tmp_path / "rm")
    with pytest.raises(ValueError, match=f"needs weights that float32 can hold, got {found}"):
        export_user(model, model.coefficients[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mean_and_deviation_of_all_users_are_not_those_of_one(factorized, tmp_path):
    model = Folder(factorized)
    model.config.mean, model.config.std = 5.0, 2.0
    export_user(model, np.ones(3), tmp_path / "out")
    assert not {"mean", "std"} & json.loads((tmp_path / "out" / "config.json").read_text()).keys()
