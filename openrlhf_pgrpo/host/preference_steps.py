"""What trainers on pairs share: whole optimizer steps, and sums over all that a step or an evaluation has seen."""

from itertools import islice

import numpy as np
import torch
from torch import distributed


class Tally:
    """Pairs, losses and right preferences (3, G) float64, summed per preference group, or per user."""

    def __init__(self, size: int, device):
        self.sums = torch.zeros(3, size, dtype=torch.float64, device=device)

    def add(self, rows, losses, right) -> None:
        """Adds pairs of the preference groups `rows` (B,)."""
        columns = torch.stack([torch.ones_like(losses), losses, right.to(losses.dtype)])
        self.sums.index_add_(1, rows, columns.detach().double())

    def take(self, ranks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows (k,) of the preference groups that were seen, their pairs (k,), and mean loss and accuracy (2, k), over
        all `ranks`; then starts from zero. Every rank calls it and gets the same."""
        distributed.all_reduce(self.sums, group=ranks)
        pairs, *sums = self.sums.cpu().numpy().copy()
        self.sums.zero_()
        rows = np.flatnonzero(pairs)
        return rows, pairs[rows], np.array(sums)[:, rows] / pairs[rows]


class WholeSteps:
    """A loader of the host that yields the micro batches of whole optimizer steps only, and ends when `ended()`.

    The host would carry what is left at the end of an epoch over to the next, where its resume does not find it, and
    how much is left depends on the size of a micro batch.

    Args:
        look: called with all micro batches of a step before the first of them is yielded.
    """

    def __init__(self, loader, micro_batches: int, look, ended):
        self.loader, self.micro_batches, self.look, self.ended = loader, micro_batches, look, ended
        self.sampler = loader.sampler

    def __len__(self) -> int:
        return len(self.loader) // self.micro_batches * self.micro_batches

    def __iter__(self):
        batches = iter(self.loader)
        for _ in range(len(self) // self.micro_batches):
            if self.ended():
                return
            step = list(islice(batches, self.micro_batches))
            self.look(step)
            yield from step


def log_evaluation(trainer, values: dict[str, float], step: int) -> None:
    """Writes numbers of an evaluation where the host's trainer writes its own: to W&B, or else to TensorBoard."""
    if trainer._wandb is not None:
        trainer._wandb.log({f"eval/{name}": value for name, value in {**values, "global_step": step}.items()})
    elif trainer._tensorboard is not None:
        for name, value in values.items():
            trainer._tensorboard.add_scalar(f"eval/{name}", value, step)
