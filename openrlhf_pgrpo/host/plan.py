"""How many updates a run makes: its sizes against each other, before anything heavy starts.

The host computes these numbers in many places and late. Sizes that do not fit train nothing, let a gradient leak into
the next update, or give the ranks different numbers of micro batches, on which they wait for each other for ever. Here
they are refused. What is left out is said.

Pure arithmetic on nested host arguments. A *rank* here is one replica of a model: with ring attention or tensor
parallelism it has several GPUs.

The host's arithmetic, which `tests/host/test_plan.py` simulates (0.11.2): samples of a rollout go to the forward
passes in batches of `--rollout.micro_batch_size`, and these in contiguous chunks to the ranks
(`RayActorGroup.async_run_method_batch`). Each rank trains on its samples in micro batches, an incomplete one is left
out, and DeepSpeed makes an update after every `--train.batch_size // --train.micro_batch_size // ranks` of them,
across rollouts and epochs.
"""

import math
from typing import NamedTuple

from openrlhf_pgrpo.host.flags import value

# Schedules of transformers that know no warm-up. With one, the first update has the learning rate 0.
NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
LEAST_PAIRS = 100


class Plan(NamedTuple):
    """What a run will do.

    Attributes:
        updates: of the policy or the reward model, in the whole run. With dynamic filtering, at most so many.
        schedule: updates for which the learning rates are scheduled: with those in which the policy is frozen.
        drawn: prompts or pairs that an episode or epoch uses.
        sentences: what a user should know, one line each.

    All numbers are None if the number of rows is unknown.
    """

    updates: int | None
    schedule: int | None
    drawn: int | None
    sentences: list[str]


# ---- PPO ----


def ppo(args, rows: int | None) -> Plan:
    """The plan of `train_ppo_ray`; `rows` is the number of prompts in the data, None if it is unknown.

    Raises:
        ValueError: with these sizes the run trains nothing, leaks gradients, or hangs.
    """
    _check_numbers(args, "train.num_episodes", "rollout.batch_size", "rollout.n_samples_per_prompt")
    _check_numbers(args, "rollout.micro_batch_size", "data.max_samples")
    _check_every(args)
    _check_lengths(args)
    _check_rate(args.actor, "actor.")
    _check_freezing(args)
    _check_generated(args.rollout)
    _check_clip(args.reward.clip_range)
    if args.train.async_enable:
        _check_numbers(args, "train.async_queue_size")
    if args.eval.dataset:
        _check_numbers(args, "eval.n_samples_per_prompt")
    sizes = Sizes(args)
    _check_colocated(args, roles(args))
    prompts, n, batch = args.rollout.batch_size, args.rollout.n_samples_per_prompt, args.train.batch_size
    if rows is not None:
        rows = min(rows, args.data.max_samples)
        _check_rows(
            rows, rows * n, batch, f"samples ({rows} prompts x {n})", min(rows, prompts) * n, "data.prompt_dataset"
        )
    if rows is None or rows >= prompts:
        sizes.check(prompts * n, f"a rollout of {prompts} prompts x {n}", "--rollout.batch_size")
    if rows is None:
        return Plan(None, None, None, [])

    used = rows // prompts * prompts + sizes.whole(rows % prompts * n) // n
    if not used:
        sizes.check(rows * n, f"a rollout of all {rows} prompts x {n}", "the number of prompts")
    rollouts, episodes, epochs = -(-used // prompts), args.train.num_episodes, args.train.max_epochs
    steps = rollouts * episodes
    frozen = min(steps, max(0, args.critic.freezing_steps + 1))
    whole_episodes, rest = divmod(frozen, rollouts)
    schedule = used * n // batch * episodes * epochs
    updates = schedule - (whole_episodes * used + rest * prompts) * n // batch * epochs
    if not updates:
        raise ValueError(
            f"the policy needs a step after --critic.freezing_steps {args.critic.freezing_steps}, got a run of "
            f"{_count(steps, 'step')}: lower it, or raise --train.num_episodes"
        )
    _check_warmup(args.actor, "actor.", updates, schedule)
    # A filtered prompt is replaced by another one, so all may be needed.
    drawn = rows if args.algo.dynamic_filtering_enable else used
    return Plan(updates, schedule, drawn, _ppo_sentences(args, rows, drawn, updates, steps, frozen))


def whole_samples(args, samples: int) -> int:
    """How many of the `samples` of one rollout make whole updates on all ranks: whole prompts, the first ones."""
    return Sizes(args).whole(samples)


class Sizes:
    """Into what the samples of a rollout are cut: updates, and equal shares of the ranks.

    Raises:
        ValueError: an update cannot be cut into micro batches of all ranks.
    """

    def __init__(self, args):
        _check_numbers(args, "train.batch_size", "train.micro_batch_size", "train.max_epochs")
        self.batch, self.n = args.train.batch_size, args.rollout.n_samples_per_prompt
        self.rollout_micro, self.dynamic = args.rollout.micro_batch_size, args.train.dynamic_batch_enable
        self.zero_3 = args.ds.zero_stage == 3
        # Ranks of every model, and of those that train.
        self.ranks = {role: _ranks(args, role) for role in roles(args)}
        self.trained = {role: ranks for role, ranks in self.ranks.items() if role in ("actor", "critic")}
        for role, ranks in self.trained.items():
            micro = 1 if self.dynamic else args.train.micro_batch_size
            _check_update(self.batch, micro, ranks, f"--{role}.num_nodes x --{role}.num_gpus_per_node")
        if self.dynamic:
            self._check_dynamic()

    def _check_dynamic(self) -> None:
        """With a dynamic batch size the host makes as many experiences as suit the ranks of the policy, for all."""
        actor = self.ranks["actor"]
        for role, ranks in self.ranks.items():
            equal = self.zero_3 or role in self.trained
            if actor % ranks if equal else actor < ranks:
                raise ValueError(
                    f"--train.dynamic_batch_enable needs {'a divisor of' if equal else 'at most'} the actor's "
                    f"{actor} ranks for the {role}, got {ranks}: change --{role}.num_gpus_per_node"
                )

    def _unit(self) -> int:
        """Samples have to be a multiple of it: whole prompts, whole updates, as many for every rank that trains."""
        shares = [] if self.dynamic else [self.rollout_micro * ranks for ranks in self.trained.values() if ranks > 1]
        return math.lcm(self.n, self.batch, *shares)

    def _too_few_batches(self, samples: int) -> list[str]:
        """Models that cannot share the forward passes of so many samples among their ranks."""
        if self.dynamic:
            return []  # checked once for all numbers of samples
        batches = -(-samples // self.rollout_micro)
        return [role for role, ranks in self.ranks.items() if batches < ranks or (self.zero_3 and batches % ranks)]

    def whole(self, samples: int) -> int:
        """The largest part of `samples` that fits."""
        unit = self._unit()
        for part in range(samples // unit * unit, 0, -unit):
            if not self._too_few_batches(part):
                return part
        return 0

    def check(self, samples: int, of: str, flag: str) -> None:
        """Refuses `samples` that do not fit; `of` says whose they are, `flag` what changes their number."""
        if samples < self.batch:
            raise ValueError(
                f"one update needs {self.batch} samples (--train.batch_size), {of} gives {samples}: lower "
                f"--train.batch_size to at most {samples}, or raise {flag}, because an incomplete gradient would leak "
                "into the next rollout"
            )
        if samples % self.batch:
            raise ValueError(
                f"{of} needs a multiple of --train.batch_size {self.batch} samples, got {samples}: change one of "
                f"them, because the last {samples % self.batch} would make no update, and their gradient would leak "
                "into the next"
            )
        for role, ranks in self.trained.items():
            if not self.dynamic and ranks > 1 and samples % (self.rollout_micro * ranks):
                raise ValueError(
                    f"{of} needs as many samples for each of the {ranks} ranks of the {role}, in batches of "
                    f"--rollout.micro_batch_size {self.rollout_micro}: got {samples}, not a multiple of "
                    f"{self.rollout_micro * ranks}: change --rollout.micro_batch_size or {flag}, because the ranks "
                    "would wait for each other for ever"
                )
        batches = -(-samples // self.rollout_micro)
        for role in self._too_few_batches(samples):
            need = "a multiple of" if self.zero_3 else "at least"
            raise ValueError(
                f"{of} needs {need} {self.ranks[role]} batches of --rollout.micro_batch_size {self.rollout_micro}, as "
                f"many as ranks of the {role}, got {batches}: lower --rollout.micro_batch_size or "
                f"--{role}.num_gpus_per_node"
            )


def roles(args) -> list[str]:
    """The models of a run, by their section of the flags."""
    found = ["actor"]
    if args.algo.kl.init_coef > 0:
        found.append("ref")
    if args.algo.advantage.estimator == "gae":
        found.append("critic")
    if rewards_are_local(args):
        found.append("reward")
    return found


def rewards_are_local(args) -> bool:
    """Whether rewards come of a model that the run holds itself, and of no server, function or agent."""
    return not (args.reward.remote_url or args.train.agent_func_path)


def _ranks(args, role: str) -> int:
    _check_numbers(args, f"{role}.num_nodes", f"{role}.num_gpus_per_node")
    _check_numbers(args, "ds.ring_attn_size", "ds.tensor_parallel_size")
    return _divided(_gpus(args, role), args.ds.ring_attn_size * args.ds.tensor_parallel_size, f"the {role}")


def _gpus(args, role: str) -> int:
    section = getattr(args, role)
    return section.num_nodes * section.num_gpus_per_node


def _divided(gpus: int, gpus_of_a_rank: int, of: str) -> int:
    if gpus % gpus_of_a_rank:
        raise ValueError(
            f"{of} needs a multiple of --ds.ring_attn_size x --ds.tensor_parallel_size = {gpus_of_a_rank} GPUs, got "
            f"{gpus}: change one of them"
        )
    return gpus // gpus_of_a_rank


def _check_lengths(args) -> None:
    length, new = args.data.max_len, args.rollout.max_new_tokens
    if length < 2:
        raise ValueError(f"--data.max_len needs at least 2 tokens, one of a prompt and one of an answer, got {length}")
    if new is not None and not 0 < new < length:
        raise ValueError(
            f"--rollout.max_new_tokens needs to be from 1 to {length - 1}, below --data.max_len {length}, got {new}: "
            "lower it or raise --data.max_len, because a prompt without room for its answer trains on no token while "
            "its reward counts"
        )


def _check_colocated(args, roles: list[str]) -> None:
    """Models that share GPUs need equally many. The host says so only when it has waited for the GPUs."""
    train, of = args.train, {role: _gpus(args, role) for role in roles}
    if train.colocate_actor_ref or train.colocate_all:
        _check_equal("--train.colocate_actor_ref" if train.colocate_actor_ref else "--train.colocate_all", of, "ref")
    if train.colocate_critic_reward:
        _check_equal("--train.colocate_critic_reward", of, "reward", "critic")
    if train.colocate_all and not train.async_enable:
        engines = args.vllm.num_engines * args.vllm.tensor_parallel_size
        _check_equal("--train.colocate_all", {**of, "vllm engines": engines}, "vllm engines")


def _check_equal(flag: str, gpus: dict[str, int], role: str, like: str = "actor") -> None:
    if role in gpus and like in gpus and gpus[role] != gpus[like]:
        raise ValueError(
            f"{flag} needs as many GPUs for the {role} as for the {like}, got {gpus[role]} and {gpus[like]}: make "
            "them equal or leave the flag out"
        )


def _check_freezing(args) -> None:
    steps, name = args.critic.freezing_steps, args.algo.advantage.estimator
    if steps >= 0 and name != "gae":
        raise ValueError(
            f"--critic.freezing_steps needs a critic (--advantage_estimator gae), got {steps} with {name}: leave it "
            f"out, because the policy would not train in the first {steps + 1} steps"
        )


def _check_clip(bounds) -> None:
    low, high = bounds
    if not low < high:  # nor is nan
        raise ValueError(
            f"--reward.clip_range needs a lower and a higher number, got {low} {high}: correct it, because every "
            "reward would become one number, or none"
        )


def _check_generated(rollout) -> None:
    generated = getattr(rollout, "vllm_generate_batch_size", None) or rollout.batch_size
    if generated < rollout.batch_size:
        raise ValueError(
            f"--rollout.vllm_generate_batch_size needs at least --rollout.batch_size {rollout.batch_size}, got "
            f"{generated}: raise it or leave it out, because every step would train on so few prompts"
        )


def _ppo_sentences(args, rows: int, drawn: int, updates: int, steps: int, frozen: int) -> list[str]:
    rollout, epochs, filtering = args.rollout, args.train.max_epochs, args.algo.dynamic_filtering_enable
    sentences = [
        f"this run makes {'at most ' * filtering}{_count(updates, 'update')} of {args.train.batch_size} samples in "
        f"{_count(steps, 'step')}: {_count(args.train.num_episodes, 'episode')} of {drawn} prompts, "
        f"{rollout.batch_size} a step, {_count(rollout.n_samples_per_prompt, 'sample')} each"
        + f", trained on {epochs} times"
        * (epochs > 1),
        *_left_out("episode", rows - drawn, rows, "prompts"),
    ]
    if filtering:
        sentences.append("of what dynamic filtering leaves, samples that do not fill an update are left out")
    if frozen:
        sentences.append(f"the policy is frozen in the first {_count(frozen, 'step')} (--critic.freezing_steps)")
    if args.eval.dataset and args.eval.steps == -1:  # the default; trainers on pairs then evaluate once an epoch
        sentences.append("there will be no evaluation on --eval.dataset: --eval.steps says after how many steps")
    return sentences + _never(args, steps, ("eval.steps",))


# ---- pairs: DPO and reward models ----


def pairs(args, rows: int | None, ranks: int) -> Plan:
    """The plan of `train_dpo` and `train_rm`, whose epochs make whole updates only (`host.pairs.WholeSteps`).

    Args:
        rows: pairs in the data, None if their number is unknown. ranks: processes that train.

    Raises:
        ValueError: with these sizes the run trains nothing, or its evaluation has no pairs.
    """
    _check_numbers(args, "train.batch_size", "train.micro_batch_size", "train.max_epochs", "data.max_samples")
    _check_numbers(args, "ds.ring_attn_size", "ds.tensor_parallel_size")
    _check_every(args)
    trains_rewards = not hasattr(args, "ref")  # only the preference trainer has a reference model
    if not trains_rewards or args.reward.factors is None:  # users have a learning rate of their own
        _check_rate(args, "")
    batch, epochs = args.train.batch_size, args.train.max_epochs
    replicas = _divided(ranks, args.ds.ring_attn_size * args.ds.tensor_parallel_size, "training")
    _check_update(batch, args.train.micro_batch_size, replicas, "the number of processes")
    if rows is None:
        return Plan(None, None, None, [])
    rows = min(rows, args.data.max_samples)
    _check_rows(rows, rows, batch, "pairs", rows, "data.dataset")
    if trains_rewards and not args.eval.dataset and rows < LEAST_PAIRS:
        raise ValueError(
            f"train_rm needs --eval.dataset, or at least {LEAST_PAIRS} pairs, of which it takes 1 % to evaluate, got "
            f"{rows}: name pairs to evaluate on, for example those of --data.dataset"
        )
    updates, left = rows // batch * epochs, rows % batch
    _check_warmup(args, "", updates, updates)
    sentences = [
        f"this run makes {_count(updates, 'update')} of {batch} pairs: "
        f"{_count(epochs, 'epoch')} of {rows - left} pairs",
        *_left_out("epoch", left, rows, "pairs"),
        *_never(args, updates, () if trains_rewards else ("eval.steps",)),
    ]
    return Plan(updates, updates, rows - left, sentences)


# ---- both ----


def _left_out(epoch: str, left: int, rows: int, what: str) -> list[str]:
    if not left:
        return []
    return [f"each {epoch} leaves out {left} of {rows} {what}, others each time, because they do not fill an update"]


def _never(args, steps: int, evaluation: tuple[str, ...]) -> list[str]:
    """Says which checkpoints and evaluations are due only after the last step."""
    flags = {"ckpt.save_steps": "checkpoint"}
    flags |= dict.fromkeys(evaluation, "evaluation") if args.eval.dataset else {}
    found = {flag: (value(args, flag), what) for flag, what in flags.items()}
    return [
        f"there will be no {what}: --{flag} is {every}, and the run has {_count(steps, 'step')}"
        for flag, (every, what) in found.items()
        if steps < every < math.inf
    ]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _check_numbers(args, *flags: str) -> None:
    for flag in flags:
        if value(args, flag) < 1:
            raise ValueError(f"--{flag} needs a number of at least 1, got {value(args, flag)}: raise it")


def _check_every(args) -> None:
    """The host takes the number of the step modulo these."""
    _check_numbers(args, "logger.logging_steps")
    for flag in ("ckpt.save_steps", "eval.steps"):
        if (every := value(args, flag)) < 1 and every != -1:
            raise ValueError(f"--{flag} needs a number of steps of at least 1, or -1 for none, got {every}: change it")


def _check_rows(rows: int, samples: int, batch: int, what: str, most: int, data: str) -> None:
    """Refuses rows whose `samples`, which `what` names, do not fill one update. `most` would; `data` is their flag."""
    if not rows:
        raise ValueError(f"training needs rows in --{data}, got none: name data that has some")
    if samples < batch:
        raise ValueError(
            f"one update needs {batch} {what.split()[0]} (--train.batch_size), the run draws {samples} {what}: lower "
            f"--train.batch_size to at most {most}, or give more rows in --{data}"
        )


def _check_update(batch: int, micro: int, ranks: int, how_many: str) -> None:
    if batch % (micro * ranks):
        of_all = micro * ranks
        flags = f"--train.micro_batch_size {micro} x {ranks} ranks" if micro > 1 else f"{ranks} ranks"
        nearest = max(of_all, batch // of_all * of_all)
        raise ValueError(
            f"--train.batch_size needs a multiple of {of_all} ({flags}), got {batch}: change it, for example to "
            f"{nearest}, or --train.micro_batch_size, or {how_many}"
        )


def _check_rate(section, prefix: str) -> None:
    """`section` holds the optimizer's flags, which begin with `prefix`."""
    used = {"adam.lr": section.adam.lr} | ({"muon.lr": section.muon.lr} if section.optim == "muon" else {})
    for flag, rate in used.items():
        if not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"--{prefix}{flag} needs a finite number > 0, got {rate}: correct it")
    if not any(used.values()):
        names = f" and --{prefix}".join(used)
        raise ValueError(f"--{prefix}{names} needs a number > 0, got 0: raise it, because nothing would be trained")


def _check_warmup(section, prefix: str, updates: int, schedule: int) -> None:
    """Refuses a run whose only update has the learning rate 0, because it is the first of the warm-up."""
    warm = section.lr_scheduler not in NO_WARMUP and math.ceil(schedule * section.lr_warmup_ratio) > 0
    if updates == 1 and warm:
        raise ValueError(
            f"the run needs a second update, got one, and the warm-up gives it the learning rate 0: pass "
            f"--{prefix}lr_warmup_ratio 0, or train on more"
        )
