"""The factorized reward model (arXiv 2503.06358) in the host's reward-model trainer. It runs in every DeepSpeed rank.

A pair has its user u, the difference f = phi(chosen) - phi(rejected) of its base rewards, and the preference y for the
chosen response. The loss of a batch of B pairs is (Eq. 4 and 5)

    1/B  sum  BCE(lambda_u . f, y) + l2/2 (|f|^2 + |lambda_u|^2)

The paper penalises one of the factors, its code the other. Penalising one factor leaves the scale of the other
undetermined, so we penalise both. For the host, the reward of a response is lambda_u . phi. So the rewards that it
logs, and the mean and deviation that it saves, are those of the users.

Axes: B pairs, U users, D base rewards.
"""

import time

import torch
from openrlhf.trainer.rm_trainer import RewardModelTrainer
from torch.nn.functional import binary_cross_entropy_with_logits

from openrlhf_pgrpo import __version__
from openrlhf_pgrpo.host import resume
from openrlhf_pgrpo.host.flags import metrics_path
from openrlhf_pgrpo.host.pairs import Evaluation, WholeEpochs, log_evaluation, with_last_batch
from openrlhf_pgrpo.host.rm import checkpoints
from openrlhf_pgrpo.host.run_log import JSONLines, description


def install(module) -> None:
    """Lets the host's script build a `FactorizedRewardTrainer` if `--reward.factors` is given, or a `PlainTrainer`."""

    def trainer(*, strategy, **kwargs):
        factorized = strategy.args.reward.factors is not None
        return (FactorizedRewardTrainer if factorized else PlainTrainer)(strategy=strategy, **kwargs)

    module.RewardModelTrainer = trainer


class PlainTrainer(WholeEpochs, RewardModelTrainer):
    """The host's own method."""

    def finish_again(self, step):
        """Sets mean and deviation of the rewards, which are in the config of the model."""
        if len(self.eval_dataloader):
            self.evaluate(self.eval_dataloader, step)


class EachBatch:
    """A loader that calls `before(batch)` before the host has the batch."""

    def __init__(self, loader, before):
        self.loader, self.before, self.sampler = loader, before, loader.sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            self.before(batch)
            yield batch


class FactorizedRewardTrainer(WholeEpochs, RewardModelTrainer):
    """`RewardModelTrainer` for D base rewards and a table of users; the loop is the host's.

    Raises:
        ValueError: in training, a loss that is not finite, before the step is taken.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.users, self.l2 = self.strategy.reward_users, self.args.reward.l2
        self.device = next(self.model.parameters()).device
        ranks = self.strategy.ds_device_mesh["dp"].get_group()
        self.evaluation = Evaluation(len(self.users), self.device, ranks)
        self.train_dataloader = EachBatch(self.train_dataloader, self._read_margins)
        whole = with_last_batch(self.strategy, self.eval_dataloader)
        self.eval_dataloader = EachBatch(whole, self._read_margins)
        self.loss_fn = self._loss
        self.file = JSONLines(metrics_path(self.args), description(self.args))
        self.strategy.print(
            f"[pgrpo] {self.args.reward.factors} base rewards and the coefficients of {len(self.users)} users "
            f"(openrlhf_pgrpo {__version__}) replace the one reward of RewardModelTrainer"
        )

    # ---- loss ----

    def _read_margins(self, batch) -> None:
        """Keeps user and preference of each pair, because the host's loop drops the margins that carry them."""
        margins = batch[-1]
        self.rows = torch.tensor([margin.user for margin in margins], device=self.device)
        self.preferences = torch.tensor([margin.preference for margin in margins], device=self.device)

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
        """Replaces the host's `PairWiseLoss`: with the penalty in training, without it in evaluation."""
        logits = chosen - rejected
        losses = binary_cross_entropy_with_logits(logits, self.preferences, reduction="none")
        if self.evaluation.running:
            self.evaluation.add(self.rows, losses, torch.where(self.preferences == 0.5, 0.5, (logits > 0).float()))
            return losses.mean()
        loss = losses.mean() + self.penalty
        if not torch.isfinite(loss):
            pair = int(torch.isfinite(losses).int().argmin())
            raise ValueError(
                f"training needs finite losses, got {losses[pair]} for a pair of user {self.users[self.rows[pair]]!r}"
                ": resume from an earlier checkpoint with a lower --adam.lr, or look for broken texts"
            )
        return loss

    # ---- logs, checkpoints, evaluation: the host calls these in this order ----

    def save_logs_and_checkpoints(self, args, global_step, step_bar, logs_dict=None, client_states=None):
        self.row = {
            "step": global_step,
            "time": time.time(),
            "estimator": "PReF",
            "train": logs_dict,
            "pref_groups": {},
        }
        client_states[resume.KEY] = checkpoints.state(self.strategy, self.model)
        ends_epoch = global_step % self.num_update_steps_per_epoch == 0
        if not len(self.eval_dataloader) or (global_step % args.eval.steps and not ends_epoch):
            self._write_row()  # else `evaluate` does, before a checkpoint is saved
        super().save_logs_and_checkpoints(args, global_step, step_bar, logs_dict, client_states)

    def _write_row(self) -> None:
        if self.strategy.is_rank_0():
            self.file.append(self.row)

    def finish_again(self, step):
        """Sets mean and deviation of the rewards, which are in the config of the model; the metrics have their row."""
        if len(self.eval_dataloader):
            with self.evaluation.over(self.eval_dataloader):
                super().evaluate(self.eval_dataloader, step)
            self.evaluation.sum_and_reset()

    def evaluate(self, eval_dataloader, steps=0):
        """Runs the host's, then logs loss and accuracy: mean over users, and the worst user. A tie is half right.

        Raises:
            ValueError: a loss that is not finite, before the checkpoint of this step is saved.
        """
        with self.evaluation.over(eval_dataloader):
            super().evaluate(eval_dataloader, steps)
        seen, worst = self.evaluation.sum_finite(self.users, "user", steps)
        found = {
            "users": len(seen.rows),
            "mean_user_loss": float(seen.loss.mean()),
            "worst_user_loss": float(seen.loss[worst]),
            "mean_user_accuracy": float(seen.accuracy.mean()),
            "worst_user_accuracy": float(seen.accuracy.min()),
        }
        self.row["evaluation"] = {"worst_user": self.users[seen.rows[worst]], **found}
        self._write_row()
        self.strategy.print(f"[pgrpo] evaluation at step {steps}: {self.row['evaluation']}")
        log_evaluation(self, found, steps)
