"""The forward pass of a factorized reward model without the host."""

import pytest
import torch

from openrlhf_pgrpo.models.network import factorized_reward_model
from openrlhf_pgrpo.models.scoring import load

pytestmark = pytest.mark.core


def test_forward_gives_the_users_of_rows_too(made):
    model = load(made[0])
    batch = model.texts.pad(model.texts.tokens(["", ""], ["a", "bc"]).ids)
    with torch.no_grad():
        base_rewards, coefficients, outputs = model.model(**batch, users=torch.tensor([2, 0]))
        plain = model.model(**batch)
        again, same = model.model(**batch, return_output=True)
    assert torch.equal(base_rewards, plain) and torch.equal(again, plain)
    assert torch.equal(coefficients.double(), torch.tensor(model.coefficients[[2, 0]]))
    assert torch.equal(outputs.last_hidden_state, same.last_hidden_state)


def test_padding_may_be_on_either_side(made):
    model = load(made[0])
    batch = model.texts.pad(model.texts.tokens(["", ""], ["abc", "d"]).ids)
    pad = int(batch["attention_mask"][1].eq(0).sum())
    right = {name: torch.stack([rows[0], rows[1].roll(-pad)]) for name, rows in batch.items()}
    assert not torch.equal(right["input_ids"], batch["input_ids"])
    with torch.no_grad():
        assert torch.allclose(model.model(**batch), model.model(**right), atol=1e-4)


def test_head_and_table_stay_precise_beside_a_bf16_backbone(made):
    folder, head, *_ = made
    model = load(folder, torch.bfloat16).model
    assert next(model.base_model.parameters()).dtype == torch.bfloat16
    assert model.score.weight.dtype == model.coefficients.dtype == torch.float32
    assert torch.equal(model.score.weight, torch.tensor(head, dtype=torch.float32))


def test_packed_samples_are_refused():
    with pytest.raises(ValueError, match="one text in a row, got packed samples: leave --ds.packing_samples out"):
        factorized_reward_model(None, None, "score", True)
