"""The factorized reward model in the host's own factory, and one user of it as the host's own reward model."""

import importlib
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from openrlhf_pgrpo.cli.main import main
from openrlhf_pgrpo.core.elicitation import Profile
from openrlhf_pgrpo.host import reward_model
from openrlhf_pgrpo.models.factorized_reward import Folder, embed, load, write
from openrlhf_pgrpo.models.scalar_reward import export_user

pytestmark = pytest.mark.host

PROMPTS = ["once upon ", "a ", "the dog "]
RESPONSES = ["a time", "b" * 50, "ran"]


def build(folder, monkeypatch, module="openrlhf.models.model", dtype=torch.float32, **options):
    """What the host builds for that folder; its command line offers bf16 only."""
    monkeypatch.setattr("openrlhf.utils.utils.convert_to_torch_dtype", lambda name: dtype)
    host = importlib.import_module(module) if isinstance(module, str) else module
    return host.get_llm_for_sequence_regression(str(folder), "reward", attn_implementation="sdpa", **options)


@pytest.fixture
def trainer_module(hooks, monkeypatch):
    """The host's module as the reward-model trainer sees it."""
    name = "openrlhf.models.model"
    importlib.import_module(name)
    module = importlib.util.module_from_spec(importlib.util.find_spec(name))
    module.__spec__.loader.exec_module(module)
    reward_model.install_training(module)
    return module


def scores(model, tokenizer) -> torch.Tensor:
    """As the host's own server scores: left padding, no special tokens."""
    texts = [f"{prompt}{response} <eos>" for prompt, response in zip(PROMPTS, RESPONSES)]
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, return_tensors="pt", add_special_tokens=False, padding=True)
    with torch.no_grad():
        return model.eval()(batch["input_ids"], batch["attention_mask"])


# ---- the factory ----------------------------------------------------------------------------------------------------


def test_the_factory_builds_a_factorized_model_of_a_factorized_folder(factorized, monkeypatch):
    expected = load(factorized)
    model = build(factorized, monkeypatch)
    assert type(model).__name__ == "FactorizedRewardModel"
    found = scores(model, expected.tokenizer)
    assert np.allclose(found.double(), expected.base_rewards(PROMPTS, RESPONSES), atol=1e-5)
    assert build(factorized, monkeypatch, dtype=torch.bfloat16).coefficients.dtype == torch.float32


def test_a_plain_folder_stays_the_hosts(tiny, monkeypatch):
    """Built by the host's own factory: the same class, weights and rewards, to the bit."""
    ours = build(tiny / "model", monkeypatch, init_value_head=False)
    assert type(ours).__qualname__ == "_get_reward_model.<locals>.RewardModel"
    host = importlib.import_module("openrlhf.models.model")._get_reward_model.__closure__
    (host_factory,) = [cell.cell_contents for cell in host]
    monkeypatch.setattr("openrlhf.models.model._get_reward_model", host_factory)
    plain = build(tiny / "model", monkeypatch, init_value_head=False)
    for name, weight in plain.state_dict().items():
        if not name.startswith("score"):  # what no file has is drawn anew
            assert torch.equal(weight, ours.state_dict()[name])


def test_a_folder_without_its_head_is_refused(factorized, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    for path in factorized.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(factorized / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"needs the weights of its base rewards and users, got none for .'score"):
        build(tmp_path, monkeypatch)


ZERO_2 = {"zero_optimization": {"stage": 2}}


def test_training_starts_with_a_random_head_and_short_coefficients(trainer_module, tiny, monkeypatch):
    monkeypatch.setattr(reward_model, "training", reward_model.Training(3, "mean", [f"u{i}" for i in range(400)]))
    model = build(tiny / "model", monkeypatch, trainer_module, ds_config=ZERO_2, init_value_head=True)
    assert (model.config.base_rewards, model.config.base_reward_users) == (3, 400)
    assert model.config.base_reward_pooling == "mean"
    assert float(model.score.weight.detach().std()) == pytest.approx(1 / 65, rel=0.2)
    assert float(model.coefficients.detach().std()) == pytest.approx(0.1 / 3**0.5, rel=0.1)


def test_training_goes_on_from_a_factorized_model(trainer_module, factorized, monkeypatch):
    folder = Folder(factorized)
    monkeypatch.setattr(reward_model, "training", reward_model.Training(3, "last", folder.users))
    model = build(factorized, monkeypatch, trainer_module, ds_config=ZERO_2, init_value_head=True)
    assert np.array_equal(model.score.weight.detach(), folder.tensor("score.weight"))
    assert np.array_equal(model.coefficients.detach(), folder.coefficients)


def test_head_and_table_train_beside_adapters(trainer_module, tiny, monkeypatch):
    monkeypatch.setattr(reward_model, "training", reward_model.Training(2, "last", ["a", "b"]))
    lora = dict(lora_rank=2, target_modules="all-linear")
    model = build(tiny / "model", monkeypatch, trainer_module, ds_config=ZERO_2, **lora)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"base_model.model.score.weight", "base_model.model.coefficients"} < trained
    assert all("lora_" in name for name in trained if not name.endswith(("score.weight", "coefficients")))
    assert not any("score" in name and "lora_" in name for name in trained)


# ---- one user -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["ana", "cleo"])
def test_an_exported_user_is_a_plain_reward_model_of_the_host(factorized, tmp_path, monkeypatch, user, capsys):
    with pytest.raises(SystemExit) as done:
        main(["export-user", "--model", str(factorized), "--user", user, "--output", str(tmp_path / "out")])
    assert done.value.code == 0 and capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    model = build(tmp_path / "out", monkeypatch)
    assert type(model).__qualname__ == "_get_reward_model.<locals>.RewardModel"
    expected = load(factorized)
    rewards = expected.base_rewards(PROMPTS, RESPONSES) @ expected.coefficients[expected.users.index(user)]
    found = scores(model, expected.tokenizer)
    assert found.shape == (3,) and np.abs(found.double().numpy() - rewards).max() < 1e-4
    assert np.abs(rewards).max() > 1  # or 1e-4 would say little

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["RewardModel"] and not [name for name in config if name.startswith("base_rew")]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["score.weight"].shape == (1, 64) and "coefficients" not in weights
    assert not (tmp_path / "out" / "users.json").exists()


def test_a_new_user_is_exported_from_a_profile(factorized, tmp_path, monkeypatch):
    model = load(factorized)
    mine = Profile("eve", model.fingerprint, np.array([1.0, -2.0, 0.5]), np.eye(3), ())
    mine.save(tmp_path / "eve.json")
    with pytest.raises(SystemExit) as done:
        main(["export-user", "--model", str(factorized), "--profile", str(tmp_path / "eve.json"),
              "--output", str(tmp_path / "out")])  # fmt: skip
    assert done.value.code == 0
    rewards = model.base_rewards(PROMPTS, RESPONSES) @ [1.0, -2.0, 0.5]
    found = scores(build(tmp_path / "out", monkeypatch), model.tokenizer)
    assert np.abs(found.double().numpy() - rewards).max() < 1e-4


def test_what_cannot_be_exported_is_refused(factorized, tiny, tmp_path, capsys):
    for user, output, message in (
        ("eve", "out", "--user needs one of the 3 users of .*, got 'eve': name another, or the profile"),
        ("ana", ".", "the export needs a new or empty folder, got"),
    ):
        (tmp_path / "something").touch()
        with pytest.raises(SystemExit) as done:
            main(["export-user", "--model", str(factorized), "--user", user, "--output", str(tmp_path / output)])
        assert re.search(message, done.value.code)
    model = Folder(factorized)
    for coefficients in ([1.0, 2.0], [1.0, 2.0, float("nan")]):
        with pytest.raises(ValueError, match="needs 3 finite coefficients, got"):
            export_user(model, np.array(coefficients), tmp_path / "new")
    states = embed(tiny / "model", PROMPTS, RESPONSES, "mean")
    write(tmp_path / "mean", tiny / "model", states[:2], np.eye(2), ["a", "b"], "mean")
    with pytest.raises(ValueError, match="base rewards of the last token, got a mean over all"):
        export_user(Folder(tmp_path / "mean"), np.ones(2), tmp_path / "new")
    assert not (tmp_path / "new").exists()
