"""Which prompts a run draws, and in which order. It runs in the process that samples: the trainer's, or in async
training the sampler's.

The host draws prompts in an order that no flag fixes, trains on a last rollout that fills no update, so that its
gradient leaks into the next one, and after a resume begins an episode again if the checkpoint was its last. Here the
order follows `--train.seed`, an episode draws only prompts that make whole updates, and a place in it can be saved
exactly. Remove it once the host seeds its sampler, drops what does not fill an update and saves the end of an episode.
"""

import functools
from collections import Counter

import torch
import wrapt
from torch.utils.data import Sampler

from openrlhf_pgrpo.host import plan
from openrlhf_pgrpo.host.flags import in_our_runs


def install(module) -> None:
    """Replaces `prepare_datasets`. `module` is the host's ppo_trainer."""
    host_prepare_datasets = module.prepare_datasets

    @functools.wraps(host_prepare_datasets)  # Ray finds it in the host's module, and there finds ours
    def prepare_datasets(strategy, tokenizer):
        loader, evaluation, _ = host_prepare_datasets(strategy, tokenizer)
        planned = plan.ppo(strategy.args, len(loader.dataset))
        return PromptLoader(strategy, loader.dataset, planned.drawn), evaluation, planned.schedule

    module.prepare_datasets = prepare_datasets


def install_whole_updates(module) -> None:
    """Makes `SamplesGenerator.generate_samples` hand on whole updates only. `module` is the host's
    samples_generator."""
    wrapt.wrap_function_wrapper(module, "SamplesGenerator.generate_samples", in_our_runs(whole_updates))


def whole_updates(generate, generator, args, kwargs):
    """The host's `generate_samples` without the last samples of a rollout that fill no update.

    Filtering, over-sampling and a resume with other sizes leave such samples at the end of an episode.
    """
    if getattr(generator, "_dataloader_iter", None) is None and getattr(generator, "_sample_buffer", None):
        # Samples wait, and nothing is left to draw. Before 0.11.2 the host would drop them and begin another episode.
        generator._dataloader_iter = iter(())
    samples, *rest = generate(*args, **kwargs)
    generator.prompts_dataloader.keep_waiting(generator._sample_buffer)
    kept = plan.whole_samples(generator.args, len(samples))
    if kept < len(samples):
        print(
            f"[pgrpo] {len(samples) - kept} of {len(samples)} samples of this rollout are left out: they do not fill "
            f"an update of {generator.args.train.batch_size} samples on all ranks",
            flush=True,
        )
    return samples[:kept], *rest


class Order(Sampler):
    """The row numbers of the prompts that are still to be drawn in an episode.

    They are the first `drawn` of a permutation of all rows, which `seed` and the number of the episode fix, without
    the first `begin`. Before them come those in `again`, which an interrupted run drew and did not train on.
    """

    def __init__(self, rows: int, drawn: int, seed: int):
        self.rows, self.drawn, self.seed = rows, drawn, seed
        self.episode = self.begin = 0
        self.again: list[int] = []

    def __len__(self) -> int:
        return len(self.again) + self.drawn - self.begin

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.episode)
        return iter(self.again + torch.randperm(self.rows, generator=generator)[self.begin : self.drawn].tolist())


class PromptLoader:
    """The host's loader of the prompts of a run, one at a time. Each iteration is an episode; the first one after
    `load_state_dict` is the rest of the saved one, and that may be empty.

    Args:
        drawn: the number of prompts of an episode.
    """

    def __init__(self, strategy, dataset, drawn: int):
        self.dataset, self.args = dataset, strategy.args
        self.order = Order(len(dataset), drawn, self.args.train.seed)
        self.loader = strategy.setup_dataloader(
            dataset,
            1,
            True,
            collate_fn=dataset.collate_fn,
            sampler=self.order,
            num_workers=self.args.data.dataloader_num_workers,
        )
        self.position = 0  # how many prompts of this episode were drawn
        self.left: list[int] = []  # rows of `order.again` that are still to be drawn
        self.waiting: list[tuple] = []  # row and content of those that were drawn and not handed on to training yet
        self.continues = True  # whether the next iteration is the rest of this episode

    def __len__(self) -> int:
        return self.order.drawn

    def __iter__(self):
        if not self.continues:
            self.order.episode += 1
            self.order.again, self.position = [], 0
        self.continues = False
        self.order.begin, self.waiting, self.left = self.position, [], list(self.order.again)
        for prompt, row in zip(self.loader, list(self.order)):
            # Before the prompt is used: what is saved after it does not draw it again.
            if self.left:
                self.left.pop(0)
            else:
                self.position += 1
            _, prompts, labels, *_ = prompt
            self.waiting.append((row, _content(prompts[0], labels[0])))
            yield prompt

    def keep_waiting(self, samples) -> None:
        """Of the prompts that were drawn, those of `samples` wait: the host may generate more than a step needs, and
        keeps the rest for the next. An interrupted run draws them again."""
        rows: dict[tuple, list[int]] = {}
        for row, content in self.waiting:
            rows.setdefault(content, []).append(row)
        each = self.args.rollout.n_samples_per_prompt
        found = Counter(_content(sample.prompts[0], sample.labels[0]) for sample in samples)
        self.waiting = [
            (row, content) for content, count in found.items() for row in rows.get(content, [])[: -(-count // each)]
        ]

    def state_dict(self) -> dict:
        order, waiting = self.order, [row for row, _ in self.waiting]
        place = {"rows": order.rows, "seed": order.seed, "episode": order.episode, "position": self.position}
        return {**place, "waiting": waiting + self.left}

    def load_state_dict(self, state: dict) -> None:
        """Goes to the place in the order that a checkpoint holds. Prints a line if nothing is left to draw, or if the
        checkpoint holds no such place.

        Raises:
            ValueError: the checkpoint was made with other prompts, or with sizes that drew more of them.
        """
        if "position" not in state:
            print(
                "[pgrpo] the checkpoint is one of the host alone, or of an older version, and holds no place in this "
                "order of prompts: its last episode begins anew",
                flush=True,
            )
            return
        self._check(state)
        self.order.seed, self.order.episode, self.position = state["seed"], state["episode"], state["position"]
        self.order.again, self.continues = state.get("waiting", []), True
        self.left = list(self.order.again)
        episodes, left = self.args.train.num_episodes, self.order.drawn - self.position + len(self.order.again)
        if state["episode"] + (not left) >= episodes:
            print(
                f"[pgrpo] the run is complete: its checkpoint is the end of episode {state['episode'] + 1}, and "
                f"--train.num_episodes is {episodes}. Raise it to go on",
                flush=True,
            )

    def _check(self, state: dict) -> None:
        rows, drawn = self.order.rows, self.order.drawn
        if state["rows"] != rows:
            raise ValueError(
                f"resuming needs the prompts of the checkpoint, got {state['rows']} there and {rows} now "
                "(--data.prompt_dataset, --data.max_samples): give it the same data, or start anew without "
                "--ckpt.load_enable"
            )
        if state["position"] > drawn:
            raise ValueError(
                f"resuming needs the sizes of the checkpoint, got {state['position']} prompts drawn there of an "
                f"episode, which has {drawn} now: use its --rollout.batch_size, --rollout.n_samples_per_prompt and "
                "--train.batch_size, or start anew without --ckpt.load_enable"
            )


def _content(prompt: str, label) -> tuple:
    """What tells a prompt from others once it has been to an engine and back."""
    return str(prompt), getattr(prompt, "pref_group", None), getattr(prompt, "user", None), repr(label)
