"""What all trainers on pairs share: epochs of whole updates, and a resume on the same pairs."""

from types import SimpleNamespace as Space

import pytest
from torch.utils.data import DataLoader

pytestmark = pytest.mark.host


class Loader(list):
    sampler = Space(dataset=range(34))


class HostTrainer:
    """The host's loop: an update after every second micro batch, across epochs."""

    def __init__(self, strategy, epochs):
        self.strategy, self.epochs, self.train_dataloader = strategy, epochs, Loader(range(9))
        self.seen, self.saved = [], []

    def fit(self, args, consumed_samples=0, num_update_steps_per_epoch=None):
        done = consumed_samples // args.train.batch_size
        for _ in range(done // num_update_steps_per_epoch, self.epochs):
            for batch in self.train_dataloader:
                self.seen.append(batch)
                if len(self.seen) % 2 == 0:
                    done += 1
                    self.save_logs_and_checkpoints(args, done, None, {}, {"consumed_samples": 8 * done})

    def save_logs_and_checkpoints(self, args, global_step, step_bar, logs_dict=None, client_states=None):
        self.saved.append(client_states)


@pytest.fixture
def new_trainer():
    from openrlhf_pgrpo.host.pairs import WholeEpochs

    class Trainer(WholeEpochs, HostTrainer):
        pass

    def new_trainer(resumed=None, epochs=2):
        states = {} if resumed is None else {"client_states": resumed}
        return Trainer(Space(accumulated_gradient=2, print=print, **states), epochs)

    return new_trainer


ARGS = Space(train=Space(batch_size=8, seed=1))


def test_a9_an_epoch_leaves_out_what_fills_no_update(new_trainer):
    """The host carries the ninth micro batch into the next epoch."""
    trainer = new_trainer()
    trainer.fit(ARGS, 0, 4)
    assert trainer.seen == [*range(8)] * 2 and len(trainer.saved) == 8


def test_a10_a_complete_run_says_so(new_trainer, capsys):
    trainer = new_trainer()
    trainer.fit(ARGS, 0, 4)
    assert "complete" not in capsys.readouterr().out
    again = new_trainer(trainer.saved[-1])
    again.fit(ARGS, trainer.saved[-1]["consumed_samples"], 4)
    assert again.seen == [] and "[pgrpo] the run is complete: its checkpoint is the end" in capsys.readouterr().out
    longer = new_trainer(trainer.saved[-1], epochs=3)
    longer.fit(ARGS, trainer.saved[-1]["consumed_samples"], 4)
    assert longer.seen == [*range(8)]


def test_d7_a_resume_with_other_pairs_names_both_numbers(new_trainer, monkeypatch):
    trainer = new_trainer()
    trainer.fit(ARGS, 0, 4)
    monkeypatch.setattr(Loader, "sampler", Space(dataset=range(20)))
    with pytest.raises(
        ValueError, match="got --data.dataset, rows .*, 34 in the checkpoint, 20 now: use those, or start anew"
    ):
        new_trainer(trainer.saved[0]).fit(ARGS, 8, 2)


@pytest.mark.parametrize("flag, there, here", [("seed", 1, 2), ("batch_size", 8, 4)])
def test_a_resume_needs_the_order_of_the_pairs(flag, there, here, new_trainer):
    """In the middle of an epoch, another order trains on some pairs twice, and never on others."""
    trainer = new_trainer()
    trainer.fit(ARGS, 0, 4)
    other = Space(train=Space(**{**vars(ARGS.train), flag: here}))
    with pytest.raises(
        ValueError, match=f"got --train.{flag} {there} in the checkpoint, {here} now: use those, or start anew"
    ):
        new_trainer(trainer.saved[0]).fit(other, 8, 4)


def test_an_evaluation_has_all_pairs_where_the_host_drops_the_last_batch():
    """As the scripts do before 0.11.2."""
    from openrlhf.utils.deepspeed.deepspeed import DeepspeedStrategy

    from openrlhf_pgrpo.host.pairs import with_last_batch

    strategy = Space(
        setup_dataloader=lambda *args, **kwargs: DeepspeedStrategy.setup_dataloader(None, *args, **kwargs)
    )
    pairs = range(11)
    dropped = strategy.setup_dataloader(pairs, 4, False, False, list, num_workers=0)
    assert sum(map(len, dropped)) == 8
    assert [*with_last_batch(strategy, dropped)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    whole = DataLoader(pairs, 4)
    assert with_last_batch(strategy, whole) is whole
