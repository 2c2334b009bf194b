"""The host tier: the real OpenRLHF modules, imported in this process through our hooks, without Ray."""

import copy
from functools import partial
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from openrlhf_pgrpo.host.tags import TaggedPrompt


def pytest_collection_modifyitems(items):
    """The host has one of its estimators since 0.11.2 only."""
    if metadata.version("openrlhf") in ("0.11.0", "0.11.1"):
        for item in items:
            if "flash_reinforce" in getattr(item, "callspec", SimpleNamespace(params={})).params.values():
                item.add_marker(pytest.mark.skip(reason="flash_reinforce came with openrlhf 0.11.2"))


class ActorGroup:
    """What a checkpoint sees of the host's RayActorGroup: the last saved client states come back when asked for."""

    def __init__(self, max_steps=None):
        self.saved, self.max_steps = {}, max_steps

    def async_run_method(self, method_name, *args, client_states=None, **kwargs):
        if method_name == "__ray_call__":
            (function,) = args
            return [function(self)]
        if method_name == "save_checkpoint":
            self.saved = client_states
        return [self.saved]


class Tokenizer:
    def decode(self, tokens, skip_special_tokens):
        return f"{len(tokens)} tokens"


@pytest.fixture
def stand_ins():
    """Stand-ins for Ray's actors and a tokenizer, for tests that build a trainer of the host."""
    return SimpleNamespace(ActorGroup=ActorGroup, Tokenizer=Tokenizer)


class Strategy:
    """What trainers on pairs ask of DeepspeedStrategy, for one process and plain SGD."""

    def __init__(self, process_group, args, micro_batches):
        self.args, self.accumulated_gradient = args, micro_batches
        self.ds_device_mesh = {"dp": SimpleNamespace(get_group=lambda: process_group)}
        self.printed, self.saved, self.micro_steps = [], [], 0
        self.print = lambda *words: self.printed.append(" ".join(map(str, words)))
        self.is_rank_0, self.get_grad_norm = lambda: True, lambda model: 0.0
        self.all_reduce = self.all_gather = self._unwrap_model = lambda given: given

    def backward(self, loss, model, optimizer):
        (loss / self.accumulated_gradient).backward()

    def optimizer_step(self, optimizer, model, scheduler):
        self.micro_steps += 1
        if self.micro_steps % self.accumulated_gradient == 0:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    def save_ckpt(self, model, path, tag, max_num, max_mem, client_states, **metric):
        self.saved.append((tag, copy.deepcopy(client_states), metric))


@pytest.fixture
def make_strategy(tmp_path):
    """A strategy of this process alone, for nested arguments and a number of micro batches a step."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield partial(Strategy, torch.distributed.group.WORLD)
    torch.distributed.destroy_process_group()


@pytest.fixture
def make_maker(monkeypatch):
    """An experience maker of the host's class, or of the class that replaces it, for nested arguments."""
    monkeypatch.setattr("ray.get", lambda refs: refs)
    monkeypatch.setattr("ray.put", lambda content: content)

    def make(args, cls=None, kl_coef=0.0):
        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

        kl_controller, strategy = SimpleNamespace(value=kl_coef), SimpleNamespace(args=args)
        maker_class = cls or RemoteExperienceMaker
        return maker_class(ActorGroup(), None, None, None, kl_controller, strategy, Tokenizer())

    return make


@pytest.fixture
def make_experiences():
    """Experiences of `rewards` (P, n) in a shuffled order, two or three samples each, prompts tagged p % groups."""
    from openrlhf.trainer.ppo_utils.experience import Experience

    def make(rewards, pref_groups=("a", "b"), seed=0, kl=0.0, tokens=3):
        generator = torch.Generator().manual_seed(seed)
        rewards = torch.as_tensor(rewards, dtype=torch.float32)
        n = rewards.shape[1]
        order = torch.randperm(rewards.numel(), generator=generator).tolist()
        experiences = []
        while order:
            index = [order.pop() for _ in range(min(len(order), 2 + len(experiences) % 2))]
            mask = torch.ones(len(index), tokens, dtype=torch.bool)
            mask[0, -1] = False
            experiences.append(
                Experience(
                    index=index,
                    rewards=rewards.flatten()[index].clone(),
                    prompts=[TaggedPrompt(f"p{i // n}", pref_groups[i // n % len(pref_groups)], "u") for i in index],
                    labels=[f"label {i // n}" for i in index],
                    sequences=torch.ones(len(index), tokens + 1, dtype=torch.long),
                    action_mask=mask,
                    values=torch.zeros(len(index), tokens),
                    kl=torch.full((len(index), tokens), kl),
                    response_length=mask.sum(-1),
                    truncated=torch.zeros(len(index), dtype=torch.bool),
                    info={"reward": rewards.flatten()[index].clone()},
                )
            )
        return experiences

    return make
