"""Starts the host's trainers as Ray actors, through our door, and prints what they really hold."""

import json
import sys

from openrlhf_pgrpo.host import doors


class ActorGroup:
    """Stands where the host has a group of model actors; the trainers only keep it."""

    def async_run_method(self, method_name, **kwargs):
        return []


def held_by_trainer(trainer):
    maker = trainer.experience_maker
    return {
        "maker": f"{type(maker).__module__}.{type(maker).__qualname__}",
        "estimator": type(maker.estimator).__name__,
        "logs through": trainer.save_logs_and_checkpoints.func.__name__,
        "checkpoints through": maker.actor_model_group.async_run_method.__module__,
    }


def held_by_loader(actor):
    prompts = actor.prompts_dataloader.dataset.prompts
    return {"prompt": type(prompts[0]).__name__, "pref_groups": sorted({prompt.pref_group for prompt in prompts})}


def probe(args):
    """The host's trainers as its `train` starts them, but without models and vLLM."""
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
    found = {
        "sync": ask(sync, held_by_trainer) | ask(sync, held_by_loader),
        "async": ask(trainer, held_by_trainer) | ask(generator, held_by_loader),
    }
    print("FOUND " + json.dumps(found))


def parse_and_probe(*args, **kwargs):
    from openrlhf.utils.config import hierarchize

    probe(hierarchize(parse_args(*args, **kwargs)))
    sys.exit()


if __name__ == "__main__":
    parse_args, doors.parse_args = doors.parse_args, parse_and_probe
    doors.run("openrlhf.cli.train_ppo_ray")
