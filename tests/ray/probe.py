"""Starts the host's trainers as Ray actors, in one of two ways, and writes what they really hold to a file.

probe.py FILE openrlhf_pgrpo.cli.train_ppo_ray ARGUMENTS...     our own module
probe.py FILE openrlhf.cli.train_ppo_ray ARGUMENTS...           the host's, patched

Not to the standard output: Ray writes what its workers say into the middle of our lines.
"""

import importlib
import json
import re
import runpy
import sys
from pathlib import Path

from openrlhf_pgrpo.host.door import Door


class ActorGroup:
    """Takes the place of a group of model actors. The trainers only keep it."""

    def async_run_method(self, method_name, **kwargs):
        return []


def held_by_trainer(trainer):
    maker = trainer.experience_maker
    return {
        "maker": f"{type(maker).__module__}.{type(maker).__qualname__}",
        "estimator": type(maker.estimator).__name__,
        "logs through": trainer.save_logs_and_checkpoints.func.__qualname__,
        "checkpoints through": maker.actor_model_group.async_run_method.__module__,
    }


def held_by_loader(actor):
    prompts = actor.prompts_dataloader.dataset.prompts
    return {"prompt": type(prompts[0]).__name__, "pref_groups": sorted({prompt.pref_group for prompt in prompts})}


def probe(args):
    """Starts the host's trainers as its `train` does, but without models and vLLM."""
    import ray
    from openrlhf.trainer.ppo_trainer import PPOTrainer
    from openrlhf.trainer.ppo_trainer_async import PPOTrainerAsync
    from openrlhf.utils import get_strategy

    ray.init()
    arguments = (args.actor.model_name_or_path, get_strategy(args), ActorGroup(), None, None, None, None)
    sync, asynchronous = PPOTrainer.remote(*arguments), PPOTrainerAsync.remote(*arguments)

    def ask(actor, question):
        return ray.get(actor.__ray_call__.remote(question))

    trainer, generator = ask(asynchronous, lambda a: (a.trainer_actor, a.generator_actor))
    return {
        "sync": ask(sync, held_by_trainer) | ask(sync, held_by_loader),
        "async": ask(trainer, held_by_trainer) | ask(generator, held_by_loader),
    }


def described(parser):
    """All actions of a parser, in words."""
    return sorted(
        [action.option_strings, action.dest, action.nargs, default(action), repr(action.type), action.choices]
        + [action.required, action.help, type(action).__name__]
        for action in parser._actions
    )


def default(action):
    return re.sub(r"\d+T\d+:\d+", "NOW", repr(action.default))  # the host names a run after the minute of its start


def parse_and_probe(door, parser, *args, **kwargs):
    from openrlhf.utils.config import hierarchize

    parsed = parse_args(door, parser, *args, **kwargs)
    door.prepare(parsed)
    found = probe(hierarchize(parsed))
    FILE.write_text(json.dumps({**found, "parser": described(parser)}, default=str))
    sys.exit()


if __name__ == "__main__":
    FILE, module = Path(sys.argv.pop(1)), sys.argv.pop(1)
    parse_args, Door.parse_args = Door.parse_args, parse_and_probe
    importlib.import_module(module.rpartition(".")[0])  # as `python -m` does
    runpy.run_module(module, run_name="__main__")
