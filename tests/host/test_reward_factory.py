"""The factorized reward model in the host's own factory."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from openrlhf_pgrpo.host.reward_factory import NewModel, install
from openrlhf_pgrpo.models.form import PLAIN
from openrlhf_pgrpo.models.scoring import load

pytestmark = pytest.mark.host

PROMPTS = ["once upon ", "a ", "the dog "]
RESPONSES = ["a time", "b" * 50, "ran"]


def build(folder, monkeypatch, dtype=torch.float32, **options):
    """What the host builds for that folder; its command line offers bf16 only."""
    monkeypatch.setattr("openrlhf.utils.utils.convert_to_torch_dtype", lambda name: dtype)
    host = importlib.import_module("openrlhf.models.model")
    return host.get_llm_for_sequence_regression(str(folder), "reward", attn_implementation="sdpa", **options)


def scores(model, tokenizer) -> torch.Tensor:
    """As the host's own server scores: left padding, no special tokens."""
    texts = [f"{prompt}{response}<eos>" for prompt, response in zip(PROMPTS, RESPONSES)]
    tokenizer.padding_side = "left"
    batch = tokenizer(texts, return_tensors="pt", add_special_tokens=False, padding=True)
    with torch.no_grad():
        return model.eval()(batch["input_ids"], batch["attention_mask"])


def test_the_factory_builds_a_factorized_model_of_a_factorized_folder(factorized, monkeypatch):
    expected = load(factorized)
    model = build(factorized, monkeypatch)
    assert type(model).__name__ == "FactorizedRewardModel"
    found = scores(model, expected.texts.tokenizer)
    assert np.allclose(found.double(), expected.base_rewards(PROMPTS, RESPONSES), atol=1e-5)
    assert build(factorized, monkeypatch, dtype=torch.bfloat16).coefficients.dtype == torch.float32


def test_a_plain_folder_stays_the_hosts(tiny, monkeypatch):
    """Built by the host's own factory: the same class, weights and rewards, to the bit."""
    ours = build(tiny / "model", monkeypatch, init_value_head=False)
    assert type(ours).__qualname__ == "_get_reward_model.<locals>.RewardModel"
    host_factory = importlib.import_module("openrlhf.models.model")._get_reward_model.__wrapped__
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
    with pytest.raises(ValueError, match=r"needs all weights, got none for score.weight"):
        build(tmp_path, monkeypatch)


def test_a_later_training_replaces_an_earlier_one():
    def host_factory(base_pretrained_model, base_llm_model, value_head_prefix="score", packing_samples=False):
        pass

    module = SimpleNamespace(_get_reward_model=host_factory)
    for new in (NewModel(2, "last", PLAIN), NewModel(3, "mean", PLAIN), None):
        install(module, new)
        factory = module._get_reward_model("base", "llm")
        assert (factory.host_factory, factory.new) == (host_factory, new)
        assert factory.classes == ("base", "llm", "score", False)
