"""What the trainers on pairs share: whole optimizer steps, and sums over all pairs of a step or an evaluation.

It runs in every DeepSpeed rank.

Axes: B pairs, G preference groups or users, k those of them that were seen.
"""

from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed

from openrlhf_pgrpo.host import resume

ORDER = "openrlhf_pgrpo_order"  # what fixes the order of pairs, in the client states of a checkpoint


class Seen(NamedTuple):
    """Rows (k,) of the preference groups that were seen, their number of pairs (k,), mean loss and accuracy (k,)."""

    rows: np.ndarray
    pairs: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray


class Tally:
    """Pairs, losses and right preferences (3, G) float64, summed per preference group, or per user.

    Args:
        ranks: the process group whose ranks are summed over.
    """

    def __init__(self, size: int, device, ranks):
        self.sums = torch.zeros(3, size, dtype=torch.float64, device=device)
        self.ranks = ranks

    def add(self, rows, losses, right) -> None:
        """Adds pairs of the preference groups `rows` (B,)."""
        columns = torch.stack([torch.ones_like(losses), losses, right.to(losses.dtype)])
        self.sums.index_add_(1, rows, columns.detach().double())

    def sum_and_reset(self) -> Seen:
        """Sums over all ranks, then starts from zero. Every rank calls it and gets the same."""
        distributed.all_reduce(self.sums, group=self.ranks)
        pairs, *sums = self.sums.cpu().numpy().copy()
        self.sums.zero_()
        rows = np.flatnonzero(pairs)
        return Seen(rows, pairs[rows], *(np.array(sums)[:, rows] / pairs[rows]))


class Evaluation(Tally):
    """The tally of an evaluation. A pair counts once.

    Attributes:
        running: whether an evaluation is running in this process.
    """

    running = False

    @contextmanager
    def over(self, loader):
        """Runs an evaluation on the pairs of `loader`."""
        sampler = loader.sampler
        # Only the pairs of this rank. The sampler repeats the first pairs, to give all ranks equally many.
        self.left = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))
        self.running = True
        try:
            yield
        finally:
            self.running = False

    def add(self, rows, losses, right) -> None:
        own = slice(self.left)
        super().add(rows[own], losses[own], right[own])
        self.left -= len(losses[own])

    def sum_finite(self, names, what: str, step: int) -> tuple[Seen, int]:
        """What was seen, and which of the k has the highest loss.

        Args:
            names: (G,) by row. what: the kind of thing that they name, for the error.

        Raises:
            ValueError: a loss is not finite.
        """
        seen = self.sum_and_reset()
        worst = int(np.argmax(seen.loss))  # the first that is not a number, if there is one
        if not np.isfinite(seen.loss[worst]):
            raise ValueError(
                f"evaluation needs finite losses, got {seen.loss[worst]} for {what} {names[seen.rows[worst]]!r} at "
                f"step {step}: resume from an earlier checkpoint with a lower --adam.lr"
            )
        return seen, worst


def with_last_batch(strategy, loader):
    """The loader of an evaluation, with its incomplete last batch: before 0.11.2 the host's scripts drop that."""
    if not loader.drop_last:
        return loader
    return strategy.setup_dataloader(
        loader.dataset,
        loader.batch_size,
        loader.pin_memory,
        False,
        loader.collate_fn,
        drop_last=False,
        num_workers=loader.num_workers,
    )


class WholeSteps:
    """A loader of the host that yields the micro batches of whole optimizer steps only, and ends when `ended()`.

    The host would carry the rest of an epoch over to the next epoch. Its resume does not find that rest, and the size
    of the rest depends on the size of a micro batch.

    Args:
        before_step: called with all micro batches of a step before the first of them is yielded.
    """

    def __init__(self, loader, micro_batches: int, before_step=lambda step: None, ended=lambda: False):
        self.loader, self.micro_batches, self.before_step, self.ended = loader, micro_batches, before_step, ended
        self.sampler = loader.sampler

    def __len__(self) -> int:
        return len(self.loader) // self.micro_batches * self.micro_batches

    def __iter__(self):
        batches = iter(self.loader)
        for _ in range(len(self) // self.micro_batches):
            if self.ended():
                return
            step = list(islice(batches, self.micro_batches))
            self.before_step(step)
            yield from step


class WholeEpochs:
    """Comes before a trainer of the host among the bases of a class.

    Every epoch makes whole updates, a resume needs the pairs in their order, and a run that is complete says so.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.train_dataloader = WholeSteps(self.train_dataloader, self.strategy.accumulated_gradient)

    def fit(self, args, consumed_samples=0, num_update_steps_per_epoch=None):
        """The host's loop over all epochs.

        Raises:
            ValueError: the checkpoint that is resumed was made on pairs in another order, or of another number.
        """
        states = getattr(self.strategy, "client_states", {})  # of the checkpoint, if one was loaded
        if ORDER in states:
            resume.check_settings(states[ORDER], self._order(args), resume.ANEW)
        steps = self.epochs * num_update_steps_per_epoch
        complete = consumed_samples >= steps * args.train.batch_size
        if complete:
            self.strategy.print(
                f"[pgrpo] the run is complete: its checkpoint is the end of epoch {self.epochs}, and "
                f"--train.max_epochs is {self.epochs}. Raise it to go on"
            )
            self.finish_again(steps)
        super().fit(args, consumed_samples, num_update_steps_per_epoch)  # it ends the run at W&B

    def finish_again(self, step: int) -> None:
        """What the last step leaves in the model besides its weights. It is called instead of that step in a run whose
        last checkpoint is there: an earlier process ended before it saved the model."""

    def save_logs_and_checkpoints(self, args, global_step, step_bar, logs_dict=None, client_states=None):
        client_states[ORDER] = self._order(args)
        super().save_logs_and_checkpoints(args, global_step, step_bar, logs_dict, client_states)

    def _order(self, args) -> dict[str, int]:
        """The host counts the place in an epoch in updates, and draws the order of pairs by the seed."""
        return {
            "data.dataset, rows that --data.max_samples leaves,": len(self.train_dataloader.sampler.dataset),
            "train.seed": args.train.seed,
            "train.batch_size": args.train.batch_size,
        }


def log_evaluation(trainer, values: dict[str, float], step: int) -> None:
    """Writes numbers of an evaluation where the host's trainer writes its own: to W&B, or else to TensorBoard."""
    if trainer._wandb is not None:
        trainer._wandb.log({f"eval/{name}": value for name, value in {**values, "global_step": step}.items()})
    elif trainer._tensorboard is not None:
        for name, value in values.items():
            trainer._tensorboard.add_scalar(f"eval/{name}", value, step)
