"""A resumed run has the learning rates of its flags, on the schedule where it was."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers.trainer import get_scheduler

from openrlhf_pgrpo.host import learning_rates

pytestmark = pytest.mark.host

SHAPE = {"num_warmup_steps": 2, "num_training_steps": 20, "scheduler_specific_kwargs": {"min_lr_rate": 0.1}}


def new_engine(*rates):
    """What the host gives DeepSpeed: an optimizer with a group of parameters for each rate, and their schedule."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    return SimpleNamespace(optimizer=optimizer, lr_scheduler=get_scheduler("cosine_with_min_lr", optimizer, **SHAPE))


def train(engine, steps: int) -> list[list[float]]:
    """The rates of so many steps."""
    used = []
    for _ in range(steps):
        used.append([group["lr"] for group in engine.optimizer.param_groups])
        engine.optimizer.step()
        engine.lr_scheduler.step()
    return used


def resumed(saved, *rates):
    """An engine with these flags that goes on from a saved one, and what is said."""
    engine, printed = new_engine(*rates), []
    kept = learning_rates.of_flags(engine)
    for part in ("optimizer", "lr_scheduler"):
        getattr(engine, part).load_state_dict(copy.deepcopy(getattr(saved, part).state_dict()))
    learning_rates.keep(SimpleNamespace(print=printed.append), engine, kept)
    return engine, printed


def test_the_same_flags_go_on_to_the_bit_and_nothing_is_said():
    whole, first = new_engine(1e-3, 1e-2), new_engine(1e-3, 1e-2)
    train(first, 5)
    engine, printed = resumed(first, 1e-3, 1e-2)
    assert train(engine, 6) == train(whole, 11)[5:] and printed == []


def test_other_flags_count_at_once_on_the_same_schedule():
    first = new_engine(1e-3, 1e-2)
    train(first, 5)
    engine, (said,) = resumed(first, 1e-6, 1e-2)
    expected = train(new_engine(1e-6, 1e-2), 11)[5:]
    assert train(engine, 6) == [pytest.approx(rates, rel=1e-12) for rates in expected]
    assert said == "[pgrpo] the learning rate is 1e-06, 0.01 from here on; the checkpoint was made with 0.001, 0.01"
    train(engine, 1)
    assert resumed(engine, 1e-6, 1e-2)[1] == []  # the next checkpoint has them


def test_what_a_plateau_took_off_stays_off():
    first = new_engine(1e-3)
    train(first, 5)
    first.lr_scheduler.base_lrs = [1e-4]  # as `GroupRobustTrainer` does
    first.optimizer.param_groups[0]["lr"] *= 0.1
    engine, _ = resumed(first, 1e-5)
    expected = [[0.1 * rate for rate in rates] for rates in train(new_engine(1e-5), 11)[5:]]
    assert train(engine, 6) == [pytest.approx(rates, rel=1e-12) for rates in expected]


@pytest.mark.parametrize("engine", [None, SimpleNamespace(optimizer=None, lr_scheduler=None)])
def test_a_model_that_does_not_train_has_none(engine):
    assert learning_rates.of_flags(engine) == []
    learning_rates.keep(None, engine, [])
