"""Group-robust preference optimisation (arXiv 2405.20304) in the host's preference trainer: GR-DPO and GR-IPO.

One optimizer step on a batch of B pairs, in the order of Algorithm 1: the losses l_i at the old policy; from their
means, the new weights alpha; then the gradient of

    1/B  sum_i  (N alpha_g(i) / N_g(i)) l_i

The weights move once a step, by sums over all its micro batches and all ranks, so the size and number of these do not
matter. But all losses must be known before the first backward pass. With one micro batch they are. If there are
several, all of them run without gradient first (`--robust.weights exact`), or the step uses the weights of the step
before (`previous`).
With fixed weights (`--robust.chi 0`) no loss has to be known first. This is importance sampling: IS-DPO and IS-IPO.

It runs in every DeepSpeed rank.

Axes: B pairs, G preference groups, N_g pairs of a preference group in the training data, N = sum N_g.
"""

import math
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from openrlhf.trainer.dpo_trainer import DPOTrainer

from openrlhf_pgrpo import __version__
from openrlhf_pgrpo.core.group_weights import GroupWeights
from openrlhf_pgrpo.core.names import listed
from openrlhf_pgrpo.host import resume, text_forms
from openrlhf_pgrpo.host.dpo import flags
from openrlhf_pgrpo.host.flags import PREF_GROUP_KEY, metrics_path
from openrlhf_pgrpo.host.pairs import Evaluation, Tally, WholeEpochs, log_evaluation, with_last_batch
from openrlhf_pgrpo.host.run_log import JSONLines, description

# What the paper's code does on a plateau, and when it ends.
LR_FACTOR, ETA_FACTOR, LEAST_LR = 0.1, 0.5, 1e-8
CONTENT = "group-robust weights"  # of a checkpoint, in words


def install(module) -> None:
    """Lets the host's script build a `GroupRobustTrainer` if `--data.pref_group_key` is given, or a `PlainTrainer`."""

    def trainer(*, strategy, **kwargs):
        robust = strategy.args.data.pref_group_key is not None
        return (GroupRobustTrainer if robust else PlainTrainer)(strategy=strategy, **kwargs)

    module.DPOTrainer = trainer


class PlainTrainer(WholeEpochs, DPOTrainer):
    """The host's own method.

    Raises:
        ValueError: the checkpoint that is resumed is one of group-robust training.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        state = getattr(self.strategy, "client_states", {}).get(resume.KEY)
        resume.refuse_unused(state, CONTENT, PREF_GROUP_KEY)


@dataclass
class Plateau:
    """The lowest loss of the worst preference group, evaluations since, and whether training is over."""

    best: float = math.inf
    waited: int = 0
    ended: bool = False


class GroupRobustTrainer(WholeEpochs, DPOTrainer):
    """`DPOTrainer` whose loss weighs preference groups. Loop, forward passes and the loss of a pair are the host's.

    Attributes: weights, the adversary; plateau, what evaluations have shown so far; settings, what gives the weights
    their meaning. All are in every checkpoint.

    Raises:
        ValueError: a single preference group, one that is only in the evaluation, or a checkpoint that does not fit.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        options = self.args.robust
        form = text_forms.asked_form(self.args.data, self.args.model.model_name_or_path)
        self.settings = flags.settings(self.args) | text_forms.settings(self.args.data, form)
        training = self.train_dataloader.sampler.dataset.pref_groups
        self.weights = GroupWeights(flags.robust_options(self.args), dict(sorted(training.items())))
        self.plateau = Plateau()
        if self.eval_dataloader is not None:
            self.eval_dataloader = with_last_batch(self.strategy, self.eval_dataloader)
            self._check_evaluation()
        self._restore()

        micro_batches = self.strategy.accumulated_gradient
        self.looks_ahead = options.weights == "exact" and micro_batches > 1 and options.chi > 0
        if self.looks_ahead:
            self.train_dataloader.before_step = self._move_weights_ahead
        self.train_dataloader.ended = lambda: self.plateau.ended
        self.host_loss, self.loss_fn = self.loss_fn, self._loss
        self.device = next(self.model.parameters()).device
        ranks = self.strategy.ds_device_mesh["dp"].get_group()
        self.tally = Tally(len(self.weights), self.device, ranks)
        self.evaluation = Evaluation(len(self.weights), self.device, ranks)
        self.micro_batches_seen = 0
        self.file = JSONLines(metrics_path(self.args), description(self.args))
        self.strategy.print(
            f"[pgrpo] {flags.method(self.args)} (openrlhf_pgrpo {__version__}) replaces the loss of "
            f"DPOTrainer; pairs of each preference group: {dict(training)}"
        )
        # At the start the policy is the reference, and IPO's loss is (1 / (2 beta))^2: 2500 at the paper's beta, 0.01.
        if self.args.model.ipo_enable and options.chi and options.eta / (4 * self.beta**2) > 1:
            self.strategy.print(
                f"[pgrpo] warning: IPO's loss starts at {1 / (4 * self.beta**2):.6g}, so with --robust.eta "
                f"{options.eta:g} a step changes ratios of weights by more than a factor of e: lower --robust.eta"
            )

    def _check_evaluation(self) -> None:
        found = self.eval_dataloader.sampler.dataset.pref_groups
        unknown = sorted(found.keys() - set(self.weights.names))
        if unknown or not found:
            raise ValueError(
                f"--eval.dataset needs pairs of the preference groups trained on, {listed(self.weights.names)}, got "
                f"{listed(unknown) or 'no pairs'}: drop their rows, or add such pairs to --data.dataset"
            )

    # ---- loss ----

    def concatenated_forward(self, model, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens):
        """Calls the host's. The preference groups of the pairs are read here, because no later call gets them."""
        rows = self.weights.rows([length.pref_group for length in prompt_id_lens])
        self.batch_rows = torch.as_tensor(rows, device=self.device)
        return super().concatenated_forward(model, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens)

    def _loss(self, *logps):
        """Replaces the host's `DPOLoss`: the weighted mean in training, the plain mean in evaluation."""
        losses, chosen, rejected = self._pair_losses(*logps)
        if self.evaluation.running:
            self.evaluation.add(self.batch_rows, losses, chosen > rejected)
            return losses.mean(), chosen, rejected
        weights = self.weights.group_weights()
        if not self.looks_ahead:
            self._tally(losses, chosen > rejected)
            if self.args.robust.weights == "exact":
                weights = self.weights.group_weights()
        self.weights_used = weights
        weights = torch.as_tensor(weights, dtype=losses.dtype, device=self.device)
        return (losses * weights[self.batch_rows]).mean(), chosen, rejected

    def _pair_losses(self, *logps):
        """Loss and both rewards (B,) of each pair. The host's loss is a mean, so each pair is its own batch."""
        losses, chosen, rejected = torch.vmap(self.host_loss)(*(column.unsqueeze(1) for column in logps))
        return losses, chosen.squeeze(1), rejected.squeeze(1)

    @torch.no_grad()
    def _move_weights_ahead(self, step) -> None:
        """Moves the weights by the losses of all micro batches of a step, before the host trains on the first."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # so that dropout is the same when the host trains on them
            for *tensors, prompt_id_lens in step:
                tensors = [tensor.squeeze(1).to(self.device) for tensor in tensors]
                policy = self.concatenated_forward(self.model, *tensors, prompt_id_lens)
                reference = self.concatenated_forward(self.ref_model, *tensors, prompt_id_lens)
                losses, chosen, rejected = self._pair_losses(*policy[:2], *reference[:2])
                self._tally(losses, chosen > rejected)

    def _tally(self, losses, right) -> None:
        """Adds a micro batch; the last of a step moves the weights.

        Raises:
            ValueError: a loss of the step is not finite, on any rank. Neither weights nor model have moved.
        """
        self.tally.add(self.batch_rows, losses, right)
        self.micro_batches_seen += 1
        if self.micro_batches_seen == self.strategy.accumulated_gradient:
            self.micro_batches_seen = 0
            self.step_seen = self.tally.sum_and_reset()
            try:
                self.weights.update(self.step_seen.rows, self.step_seen.loss, self.step_seen.pairs)
            except ValueError as error:
                raise ValueError(
                    f"{error}; neither weights nor policy have moved in this step: look for broken pairs, or resume "
                    "from a checkpoint with a lower --adam.lr"
                ) from error

    # ---- logs, checkpoints, evaluation: the host calls these three in this order ----

    def save_logs_and_checkpoints(self, args, global_step, step_bar, logs_dict=None, client_states=None):
        groups = self._step_metrics()
        self.row = {
            "step": global_step,
            "time": time.time(),
            "estimator": flags.method(args),
            "train": logs_dict,
            "pref_groups": groups,
        }
        self.client_states = client_states
        client_states[resume.KEY] = self._state()
        if self.eval_dataloader is None or global_step % args.eval.steps:
            self._write_row()  # else `evaluate` does, before a checkpoint is saved
        flat = {f"pref_group/{name}/{key}": value for name, group in groups.items() for key, value in group.items()}
        super().save_logs_and_checkpoints(args, global_step, step_bar, {**logs_dict, **flat}, client_states)

    def _step_metrics(self) -> dict[str, dict[str, float]]:
        """For each preference group in the step: the number of pairs (called samples, as everywhere), their mean loss
        and accuracy, N_g / N, the weight of its losses, and alpha after the step."""
        rows, pairs, loss, accuracy = self.step_seen
        seen = {"samples": pairs, "loss": loss, "accuracy": accuracy}
        columns = {"share": self.weights.share, "weight": self.weights_used, "alpha": self.weights.alpha}
        return self._by_name(rows, **seen, **{key: values[rows] for key, values in columns.items()})

    def _by_name(self, rows, **columns) -> dict[str, dict[str, float]]:
        """Preference group -> its number in each of `columns` (k,), which are in the order of `rows` (k,)."""
        names = self.weights.names
        return {names[row]: {key: float(column[i]) for key, column in columns.items()} for i, row in enumerate(rows)}

    def evaluate(self, eval_dataloader, steps=0):
        """Runs the host's, then logs loss and accuracy per preference group, worst and gap, and acts on them."""
        with self.evaluation.over(eval_dataloader):
            super().evaluate(eval_dataloader, steps)
        seen, worst = self.evaluation.sum_finite(self.weights.names, "preference group", steps)
        rows, pairs, loss, accuracy = seen
        names = [self.weights.names[row] for row in rows]
        found = {
            "worst_group_loss": float(loss[worst]),
            "loss_gap": float(np.ptp(loss)),
            "worst_group_accuracy": float(accuracy.min()),
            "accuracy_gap": float(np.ptp(accuracy)),
        }
        for name, values in self._by_name(rows, eval_pairs=pairs, eval_loss=loss, eval_accuracy=accuracy).items():
            self.row["pref_groups"].setdefault(name, {}).update(values)
        self.row["evaluation"] = {"worst_group": names[worst], **found}
        self._write_row()
        flat = {f"pref_group/{name}/loss": value for name, value in zip(names, loss.tolist())}
        flat |= {f"pref_group/{name}/accuracy": value for name, value in zip(names, accuracy.tolist())}
        log_evaluation(self, {**found, **flat}, steps)
        self._act_on_evaluation(found["worst_group_loss"], steps)

    def _act_on_evaluation(self, worst_loss: float, step: int) -> None:
        """Keeps the best checkpoint; on a plateau, stops or lowers the learning rate, as the flags say."""
        options, plateau = self.args.robust, self.plateau
        best = worst_loss < plateau.best
        plateau.best, plateau.waited = (worst_loss, 0) if best else (plateau.best, plateau.waited + 1)
        if options.patience and plateau.waited >= options.patience:
            self._on_plateau()
        self.client_states[resume.KEY] = self._state()
        if best and options.save_best:
            self._save_best(worst_loss, step)

    def _on_plateau(self) -> None:
        if self.args.robust.plateau == "stop":
            self.plateau.ended = True
        else:
            self.plateau.waited = 0
            # DeepSpeed saves base_lrs with the schedule. The next step already has its rate, so it is lowered too.
            self.scheduler.base_lrs = [LR_FACTOR * lr for lr in self.scheduler.base_lrs]
            for group in self.optimizer.param_groups:
                group["lr"] *= LR_FACTOR
            self.weights.options = replace(self.weights.options, eta=ETA_FACTOR * self.weights.options.eta)
            self.plateau.ended = max(self.scheduler.base_lrs) < LEAST_LR
        done = "training ends" if self.plateau.ended else f"learning rate x {LR_FACTOR}, eta x {ETA_FACTOR}"
        self.strategy.print(
            f"[pgrpo] the worst preference group's loss has not fallen below {self.plateau.best:.6g} in "
            f"{self.args.robust.patience} evaluations: {done}"
        )

    def _plateau_ends(self) -> bool:
        """Whether a plateau that has ended training would end it under these flags."""
        options = self.args.robust
        if options.plateau == "stop":
            return 0 < options.patience <= self.plateau.waited
        return options.patience > 0 and max(self.scheduler.base_lrs) < LEAST_LR

    def _save_best(self, worst_loss: float, step: int) -> None:
        args, tag = self.args, f"best_global_step{step}"
        if not self.disable_ds_ckpt:
            self.strategy.save_ckpt(
                *(self.model.model, args.ckpt.path, tag, args.ckpt.max_num, args.ckpt.max_mem, self.client_states),
                metric_value=-worst_loss,  # for the host higher is better
                metric_key="minus_worst_group_loss",
            )
        if self.save_hf_ckpt:
            self.strategy.save_model(self.model, self.tokenizer, f"{args.ckpt.path}/best_hf")

    def _write_row(self) -> None:
        if self.strategy.is_rank_0():
            self.file.append(self.row)

    # ---- state ----

    def _state(self) -> dict:
        return {
            "schema": resume.SCHEMA,
            "settings": self.settings,
            "weights": self.weights.state_dict(),
            "eta": self.weights.options.eta,
            "plateau": asdict(self.plateau),
        }

    def _restore(self) -> None:
        """Goes on from the state in the checkpoint that this run resumes, if it resumes one."""
        if not hasattr(self.strategy, "client_states"):
            return
        state = self.strategy.client_states.get(resume.KEY)
        resume.check_schema(state, CONTENT, resume.ANEW)
        resume.check_settings(state["settings"], self.settings, resume.ANEW)
        self.weights.load_state_dict(state["weights"])
        self.weights.options = replace(self.weights.options, eta=state["eta"])
        self.plateau = Plateau(**state["plateau"])
        self.plateau.ended = self.plateau.ended and self._plateau_ends()
        if self.plateau.ended:
            self.strategy.print(
                f"[pgrpo] the run is complete: it has ended on a plateau (--robust.patience "
                f"{self.args.robust.patience}). Raise it, or pass 0, to go on"
            )
