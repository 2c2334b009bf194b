"""Training with base rewards and users: the host's trainer and strategy, on a model of a table of numbers."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from openrlhf_pgrpo.core.names import Names
from openrlhf_pgrpo.host.tags import TaggedMargin
from openrlhf_pgrpo.models.form import PLAIN

pytestmark = pytest.mark.host

L2 = 0.3
USERS = ["ana", "bob", "cleo"]
ROWS = [0, 1, 0, 2, 1, 0]  # of the users of six pairs
SHARES = [1.0, 1.0, 0.75, 1.0, 0.5, 1.0]
KEYS = dict(prompt_key="prompt", chosen_key="chosen", rejected_key="rejected")


class Table(torch.nn.Module):
    """A model that knows each text by its number: base rewards (2P, 2) of the chosen, then of the rejected ones."""

    def __init__(self, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.phi = torch.nn.Parameter(torch.randn(2 * len(ROWS), 2, generator=generator))
        self.coefficients = torch.nn.Parameter(torch.randn(len(USERS), 2, generator=generator))
        self.config = SimpleNamespace(base_reward_pooling="last", base_reward_form=PLAIN.record())

    def forward(self, input_ids, attention_mask, users):
        return self.phi[input_ids[:, 0]], self.coefficients[users], {}


class Pairs(torch.utils.data.Dataset):
    """Pair i: texts i and P + i, and its user."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        i = self.pairs[index]
        return i, len(ROWS) + i, TaggedMargin(0.0, ROWS[i], SHARES[i])

    @staticmethod
    def collate(batch):
        chosen, rejected, margins = zip(*batch)
        ids = [torch.tensor(side)[:, None].expand(-1, 2) for side in (chosen, rejected)]  # two tokens a text
        return ids[0], torch.ones_like(ids[0]), ids[1], torch.ones_like(ids[1]), list(margins)


def loader(pairs, size, replicas=1):
    from openrlhf.utils.distributed_sampler import DistributedSampler

    dataset = Pairs(list(pairs))
    sampler = DistributedSampler(dataset, replicas, 0, shuffle=False, drop_last=False)
    return torch.utils.data.DataLoader(dataset, batch_size=size, sampler=sampler, collate_fn=Pairs.collate)


@pytest.fixture
def make(hooks, make_strategy, tmp_path):
    """The trainer of the host's script, with users, and a learning rate of 1."""
    from openrlhf_pgrpo.host.rm.trainer import FactorizedRewardTrainer

    def make(micro_batches=1, evaluation=range(6), seed=0, replicas=1):
        wandb = SimpleNamespace(key=None)
        logger = SimpleNamespace(wandb=wandb, tensorboard_dir=None, logging_steps=1, metrics_path=None)
        args = SimpleNamespace(
            reward=SimpleNamespace(factors=2, l2=L2, coefficients_lr=1.0),
            model=SimpleNamespace(aux_loss_coef=0, margin_loss_enable=False, compute_fp32_loss_enable=False),
            ds=SimpleNamespace(packing_samples=False),
            data=SimpleNamespace(user_key="user", preference_key=None, max_len=64, **KEYS),
            ckpt=SimpleNamespace(output_dir=str(tmp_path), path=str(tmp_path), save_steps=1, max_num=1, max_mem=1),
            eval=SimpleNamespace(steps=1),
            train=SimpleNamespace(batch_size=len(ROWS), seed=seed),
            logger=logger,
        )
        strategy, model = make_strategy(args, micro_batches), Table(seed)
        strategy.reward_users = Names(USERS)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        trainer = FactorizedRewardTrainer(
            model=model,
            strategy=strategy,
            optim=optimizer,
            train_dataloader=loader(range(len(ROWS)), len(ROWS) // micro_batches),
            eval_dataloader=loader(evaluation, 4, replicas),
            scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
            tokenizer=SimpleNamespace(pad_token_id=0),
            max_epochs=1,
        )
        trainer.path = tmp_path / "metrics.jsonl"
        return trainer

    return make


def parts(model):
    """Differences f (P, 2), own coefficients (P, 2) and logits (P,) of all pairs."""
    difference = model.phi[: len(ROWS)] - model.phi[len(ROWS) :]
    own = model.coefficients[ROWS]
    return difference, own, (difference * own).sum(1)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_step_is_that_of_the_formula(make, micro_batches):
    """BCE(lambda . f, y) + l2/2 (|f|^2 + |lambda|^2), averaged over pairs, by SGD with a rate of 1."""
    trainer = make(micro_batches)
    before = copy.deepcopy(trainer.model)
    difference, own, logits = parts(before)
    y = torch.tensor(SHARES)
    losses = -(y * torch.log(torch.sigmoid(logits)) + (1 - y) * torch.log(1 - torch.sigmoid(logits)))
    (losses + L2 / 2 * ((difference**2).sum(1) + (own**2).sum(1))).mean().backward()
    trainer.fit(trainer.args, 0, 1)
    for name, value in before.named_parameters():
        assert torch.allclose(dict(trainer.model.named_parameters())[name], value - value.grad, atol=1e-5), name
    assert before.coefficients.grad.abs().min() > 0.01  # every user has moved


def test_swapped_responses_turn_the_sign_of_the_logit(make):
    trainer = make()
    ids = torch.arange(2 * len(ROWS))[:, None]
    chosen, rejected, mask = ids[: len(ROWS)], ids[len(ROWS) :], torch.ones(len(ROWS), 1)
    trainer._read_margins([[TaggedMargin(0.0, row, 1.0) for row in ROWS]])
    one, two, _ = trainer.concatenated_forward(trainer.model, chosen, mask, rejected, mask)
    swapped_one, swapped_two, _ = trainer.concatenated_forward(trainer.model, rejected, mask, chosen, mask)
    assert torch.equal(one - two, -(swapped_one - swapped_two)) and (one - two).abs().min() > 0
    assert torch.allclose(one - two, parts(trainer.model)[2])


def test_evaluation_per_user(make):
    trainer = make()
    trainer.fit(trainer.args, 0, 1)
    logits = parts(trainer.model)[2].detach()
    y, rows = torch.tensor(SHARES), torch.tensor(ROWS)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none")
    right = torch.where(y == 0.5, torch.tensor(0.5), (logits > 0).float())
    loss = [float(losses[rows == row].mean()) for row in range(3)]
    accuracy = [float(right[rows == row].mean()) for row in range(3)]
    assert len({*accuracy}) > 1
    (row,) = [json.loads(line) for line in trainer.path.read_text().splitlines()]
    assert row["evaluation"] == {
        "worst_user": USERS[int(np.argmax(loss))],
        "users": 3,
        "mean_user_loss": pytest.approx(np.mean(loss)),
        "worst_user_loss": pytest.approx(max(loss)),
        "mean_user_accuracy": pytest.approx(np.mean(accuracy)),
        "worst_user_accuracy": pytest.approx(min(accuracy)),
    }
    # For the host these are the users' rewards, by which it would normalise.
    phi, own = trainer.model.phi.detach(), trainer.model.coefficients.detach()[ROWS * 2]
    rewards = (phi * own).sum(1)
    assert trainer.model.config.mean == pytest.approx(float(rewards.mean()), abs=1e-6)
    assert trainer.model.config.std == pytest.approx(float(rewards.std()))


def test_a_complete_run_that_was_killed_before_it_saved_its_model_gets_mean_and_deviation(make):
    """They come of the last step's evaluation, and the checkpoint does not hold them."""
    trainer = make()
    trainer.fit(trainer.args, 0, 1)
    found, rows = vars(trainer.model.config).copy(), trainer.path.read_text()
    assert {"mean", "std"} <= found.keys()
    del trainer.model.config.mean, trainer.model.config.std
    trainer.fit(trainer.args, len(ROWS), 1)
    assert vars(trainer.model.config) == found and trainer.path.read_text() == rows


def test_a_complete_run_evaluates_before_the_host_ends_it_at_wandb(make):
    """W&B takes nothing more once it is told that the run has ended."""
    trainer = make()
    trainer.fit(trainer.args, 0, 1)
    told = []
    trainer._wandb = SimpleNamespace(log=told.append, finish=lambda: told.append("the end"))
    trainer.fit(trainer.args, len(ROWS), 1)
    assert told[0].keys() >= {"eval/reward_mean", "eval/reward_std"} and told[1:] == ["the end"]


def test_a_complete_plain_run_evaluates_again():
    from openrlhf_pgrpo.host.rm.trainer import PlainTrainer

    seen = []
    for pairs in ([1, 2], []):
        trainer = SimpleNamespace(eval_dataloader=pairs, evaluate=lambda *given: seen.append(given))
        PlainTrainer.finish_again(trainer, 7)
    assert seen == [([1, 2], 7)]


def test_a_pair_that_fills_the_last_round_of_ranks_does_not_count(make):
    """Five pairs for four ranks: the last rank has its own pair 3, then a repeated one."""
    trainer = make(evaluation=range(5), replicas=4)
    trainer.eval_dataloader.sampler.rank = 3
    trainer.fit(trainer.args, 0, 1)
    (row,) = [json.loads(line) for line in trainer.path.read_text().splitlines()]
    assert row["evaluation"]["users"] == 1 and row["evaluation"]["worst_user"] == "cleo"


def test_numbers_that_are_not_finite_stop_training(make):
    trainer = make()
    with torch.no_grad():
        trainer.model.phi[1] = float("nan")
    before = trainer.model.coefficients.detach().clone()
    with pytest.raises(ValueError, match="finite losses, got nan for a pair of user 'bob'"):
        trainer.fit(trainer.args, 0, 1)
    assert torch.equal(trainer.model.coefficients, before)
    trainer = make()
    trainer.row = {}
    with torch.no_grad():
        trainer.model.phi[3] = float("inf")
    with pytest.raises(ValueError, match="evaluation needs finite losses, got (nan|inf) for user 'cleo' at step 7"):
        trainer.evaluate(trainer.eval_dataloader, 7)


def test_a_checkpoint_holds_users_and_settings(make):
    trainer = make()
    trainer.fit(trainer.args, 0, 1)
    ((tag, states, _),) = trainer.strategy.saved
    assert (tag, states["consumed_samples"]) == ("global_step1", len(ROWS))
    assert states["openrlhf_pgrpo"] == {
        "schema": 2,
        "users": USERS,
        "settings": {
            "reward.factors": 2,
            "reward.pooling": "last",
            "reward.l2": L2,
            "data.user_key": "user",
            "data.preference_key": None,
            **{f"data.{key}": name for key, name in KEYS.items()},
            "data.max_len": 64,
            "data.input_template": None,
            "data.apply_chat_template, the digest of the template,": None,
        },
    }
