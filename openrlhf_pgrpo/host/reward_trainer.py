"""The factorized reward model (arXiv 2503.06358) in the host's reward-model trainer.

The loss of a batch of B pairs, each with its user u, the difference f = phi(chosen) - phi(rejected) of its base rewards
and the share y of preference that goes to the chosen response, is (Eq. 4 and 5)

    1/B  sum  BCE(lambda_u . f, y) + l2/2 (|f|^2 + |lambda_u|^2)

The paper penalises one of the factors, its code the other; only both together have a size of their own. To the host the
reward of a response is lambda_u . phi: what it logs and saves as mean and deviation are rewards as users give them.

Axes: B pairs, U users, D base rewards.
"""

import time

import numpy as np
import torch
from openrlhf.trainer.rm_trainer import RewardModelTrainer
from torch.nn.functional import binary_cross_entropy_with_logits

from openrlhf_pgrpo import __version__
from openrlhf_pgrpo.host import reward_model, reward_options
from openrlhf_pgrpo.host.checkpoints import KEY, SCHEMA
from openrlhf_pgrpo.host.preference_steps import Tally, WholeSteps, log_evaluation
from openrlhf_pgrpo.host.run_log import JSONLines, description


def install(module) -> None:
    """Lets the host's script build a `FactorizedRewardTrainer` where `--reward.factors` is given, and its own else."""

    def trainer(*, strategy, **kwargs):
        factorized = strategy.args.reward.factors is not None
        return (FactorizedRewardTrainer if factorized else RewardModelTrainer)(strategy=strategy, **kwargs)

    module.RewardModelTrainer = trainer


class Seen:
    """A loader that shows each batch to `see` before the host has it."""

    def __init__(self, loader, see):
        self.loader, self.see, self.sampler = loader, see, loader.sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            self.see(batch)
            yield batch


class FactorizedRewardTrainer(RewardModelTrainer):
    """`RewardModelTrainer` for D base rewards and a table of users; the loop is the host's.

    Raises:
        ValueError: in training, a loss that is not finite, before the step is taken.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.users, self.l2 = reward_model.training.users, self.args.reward.l2
        self.device = next(self.model.parameters()).device
        self.ranks = self.strategy.ds_device_mesh["dp"].get_group()
        self.tally = Tally(len(self.users), self.device)
        steps = WholeSteps(
            self.train_dataloader, self.strategy.accumulated_gradient, lambda step: None, lambda: False
        )
        self.train_dataloader = Seen(steps, self._see)
        self.eval_dataloader = Seen(self.eval_dataloader, self._see)
        self.loss_fn, self.evaluates = self._loss, False
        self.file, self.description = JSONLines(reward_options.metrics_path(self.args)), description(self.args)
        self.strategy.print(
            f"[pgrpo] {self.args.reward.factors} base rewards and the coefficients of {len(self.users)} users "
            f"(openrlhf_pgrpo {__version__}) replace the one reward of RewardModelTrainer"
        )

    # ── Loss ──

    def _see(self, batch) -> None:
        """Whose the pairs are: the host takes no note of their margins."""
        margins = batch[-1]
        self.rows = torch.tensor([margin.user for margin in margins], device=self.device)
        self.shares = torch.tensor([margin.preference for margin in margins], device=self.device)

    def concatenated_forward(self, model, chosen_ids, c_mask, reject_ids, r_mask):
        """Rewards (B,) of both responses, as each pair's user gives them."""
        ids, mask = self.concatenated_inputs(chosen_ids, c_mask, reject_ids, r_mask)
        base_rewards, coefficients, outputs = model(ids, attention_mask=mask, users=self.rows.repeat(2))
        difference = base_rewards[: len(self.rows)] - base_rewards[len(self.rows) :]
        own = coefficients[: len(self.rows)]
        self.penalty = self.l2 / 2 * (difference.square().sum(-1) + own.square().sum(-1)).mean()
        chosen, rejected = (coefficients * base_rewards).sum(-1).chunk(2)
        return chosen, rejected, outputs.aux_loss if "aux_loss" in outputs else []

    def _loss(self, chosen, rejected, margin):
        """Takes the place of the host's `PairWiseLoss`: with the penalty in training, without it in evaluation."""
        logits = chosen - rejected
        losses = binary_cross_entropy_with_logits(logits, self.shares, reduction="none")
        if self.evaluates:
            right = torch.where(self.shares == 0.5, 0.5, (logits > 0).float())
            # At its end the sampler may repeat first pairs, so that all ranks have equally many.
            own = slice(self.pairs_to_evaluate)
            self.tally.add(self.rows[own], losses[own], right[own])
            self.pairs_to_evaluate -= len(losses[own])
            return losses.mean()
        loss = losses.mean() + self.penalty
        if not torch.isfinite(loss):
            pair = int(torch.isfinite(losses).int().argmin())
            raise ValueError(
                f"training needs finite losses, got {losses[pair]} for a pair of user {self.users[self.rows[pair]]!r}: "
                "go on from an earlier checkpoint with a lower --adam.lr, or look for broken texts"
            )
        return loss

    # ── Logs, checkpoints, evaluation: the host calls these in this order ──

    def save_logs_and_checkpoints(self, args, global_step, step_bar, logs_dict=None, client_states=None):
        self.row = {
            "step": global_step,
            "time": time.time(),
            "estimator": "PReF",
            "train": logs_dict,
            "pref_groups": {},
            **({"run": self.description} if self.description else {}),
        }
        self.description = None
        client_states[KEY] = {"schema": SCHEMA, "settings": reward_options.settings(args), "users": self.users}
        ends_epoch = global_step % self.num_update_steps_per_epoch == 0
        if not len(self.eval_dataloader) or (global_step % args.eval.steps and not ends_epoch):
            self._write_row()  # else `evaluate` does, before a checkpoint is saved
        super().save_logs_and_checkpoints(args, global_step, step_bar, logs_dict, client_states)

    def _write_row(self) -> None:
        if self.strategy.is_rank_0():
            self.file.append(self.row)

    def evaluate(self, eval_dataloader, steps=0):
        """The host's, then loss and accuracy of each user: their mean over users, and the worst. A tie is half right.

        Raises:
            ValueError: a loss that is not finite, before the checkpoint of this step is saved.
        """
        sampler = eval_dataloader.sampler
        self.pairs_to_evaluate = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))
        self.evaluates = True  # of eval() a DeepSpeed engine tells its module only
        super().evaluate(eval_dataloader, steps)
        self.evaluates = False
        rows, _, (loss, accuracy) = self.tally.take(self.ranks)
        worst = int(np.argmax(loss))  # the first that is not a number, if there is one
        if not np.isfinite(loss[worst]):
            raise ValueError(
                f"evaluation needs finite losses, got {loss[worst]} for user {self.users[rows[worst]]!r} at step "
                f"{steps}: go on from an earlier checkpoint, with a lower --adam.lr"
            )
        found = {
            "users": len(rows),
            "mean_user_loss": float(loss.mean()),
            "worst_user_loss": float(loss[worst]),
            "mean_user_accuracy": float(accuracy.mean()),
            "worst_user_accuracy": float(accuracy.min()),
        }
        self.row["evaluation"] = {"worst_user": self.users[rows[worst]], **found}
        self._write_row()
        self.strategy.print(f"[pgrpo] evaluation at step {steps}: {self.row['evaluation']}")
        log_evaluation(self, found, steps)
