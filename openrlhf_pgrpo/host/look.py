"""One look at flags, files and rows before anything heavy starts: no Ray, no vLLM, no model.

Each door has a function here. It reads the rows as the run will (the host's own reader, whose cache the run uses
again), checks them against the flags, and asks `plan` how many updates the run makes. All arguments are nested host
arguments, as the host's parser has them. What they return are sentences to print; what is wrong is a ValueError.

A driver without the files of its cluster cannot look at them. That is said, and not refused.

With `tokens` they also say what a run says once it has a tokenizer. That takes seconds more, for `doctor --like`.
"""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from openrlhf_pgrpo.core.estimator import advantage_estimators, namespace_of, options_of
from openrlhf_pgrpo.core.pgrpo import PGRPO
from openrlhf_pgrpo.host import columns, device, flags, here, numbers, pair_texts, plan, positions, reader, resume
from openrlhf_pgrpo.models import output_folder


def ppo(args, tokens: bool = False) -> list[str]:
    """What there is to say of a run of PPO.

    Raises:
        ValueError: it cannot run, or would train nothing or something else than was meant.
        OSError: a file cannot be read.
    """
    from openrlhf_pgrpo.host.ppo import assertions, prompts, reward_model, reward_sources

    numbers.check(args)
    assertions.check(args)
    remote = device.cluster() is not None
    if not args.vllm.num_engines or args.vllm.num_engines < 0:
        raise ValueError(
            f"PPO needs engines that generate, got --vllm.num_engines {args.vllm.num_engines}: pass 1 or more"
        )
    said = reward_sources.check(args, remote)
    said += here.model("actor.model_name_or_path", args.actor.model_name_or_path, remote)
    if not said:  # both models are here
        reward_model.check_texts(args)
    if args.critic.model_name_or_path:
        said += here.model("critic.model_name_or_path", args.critic.model_name_or_path, remote)
    said += positions.check(args, "actor", "critic", "reward")
    rewards = reward_model.folder_here(args)

    def check(dataset, args, source: str, training: bool = True) -> list[str]:
        of_histories = _histories(dataset, args, source) if training else []
        if training and rewards is not None:
            reward_model.check_users(rewards, dataset, args, source)
        return [*prompts.check(dataset, args, source, training), *of_histories]

    looked = check
    if tokens and not args.train.agent_func_path:  # an agent writes its prompts itself
        looked = _with_tokens(check, args.actor.model_name_or_path, _prompts_cut)
    rows, of_rows = reader.rows(
        args, "data.prompt_dataset", "data.prompt_split", looked, args.data.prompt_probs, remote=remote
    )
    evaluated = _evaluation(args, looked, remote)
    read = (args.actor, args.critic, args.reward)
    said += _unused_users(args, rewards is not None) + _output(args, *read, part="_actor")
    if args.algo.advantage.estimator == "gae" and args.critic.save_value_network:
        said += _output(args, *read, part="_critic", beside="_critic")
    return [*said, *of_rows, *evaluated, *plan.ppo(args, rows).sentences]


def dpo(args, tokens: bool = False) -> list[str]:
    """What there is to say of preference training. Raises as `ppo`."""
    from openrlhf_pgrpo.host.dpo import data

    return _pairs(args, data.check, tokens)


def rm(args, tokens: bool = False) -> list[str]:
    """What there is to say of the training of a reward model. Raises as `ppo`."""
    from openrlhf_pgrpo.host.rm import data

    return _pairs(args, data.check, tokens)


def serve(args, tokens: bool = False) -> list[str]:
    """What there is to say of a reward server, which has no rows. Raises as `ppo`."""
    from openrlhf_pgrpo.host.user_flags import check_profiles
    from openrlhf_pgrpo.host.user_rewards import check_scale, factorized_folder  # transformers, ten seconds

    name = args.reward.model_name_or_path
    said = here.model("reward.model_name_or_path", name, remote=False)
    check_scale(name, args.reward.normalize_enable)
    if (folder := factorized_folder(name, args.reward.chat_template)) is not None:
        folder.form  # noqa: B018  refused unless it is known
        check_profiles(folder, args.reward.profiles)
    return said


def _pairs(args, check: Callable, tokens: bool) -> list[str]:
    numbers.check(args)
    if tokens:
        check = _with_tokens(check, args.model.model_name_or_path, _pairs_made)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    said = here.model("model.model_name_or_path", args.model.model_name_or_path, remote=False)
    read = [args.model]
    if hasattr(args, "ref") and args.ref.model_name_or_path is not None:
        said += here.model("ref.model_name_or_path", args.ref.model_name_or_path, remote=False)
        read.append(args.ref)
    said += positions.check(args, "model", "ref") + _output(args, *read)
    rows, of_rows = reader.rows(args, "data.dataset", "data.dataset_split", check, args.data.dataset_probs)
    return [*said, *of_rows, *_evaluation(args, check), *plan.pairs(args, rows, ranks).sentences]


# ---- what only tokens show ------------------------------------------------------------------------------------------


def _with_tokens(check: Callable, model_name: str, look_at: Callable) -> Callable:
    """A check of rows that goes on to their tokens, which `look_at(dataset, tokenizer, strategy)` makes. It is called
    with a stand-in for the host's strategy, one for all data of a run, and says something by `strategy.print`.
    """
    strategy = SimpleNamespace(is_rank_0=lambda: False)

    def both(dataset, args, source, training=True):
        said, printed = check(dataset, args, source, training=training), []
        if not Path(model_name).is_dir():
            return [*said, f"tokens of {source} are not counted here: the folder of {model_name} is needed for that"]
        from openrlhf_pgrpo.models import backbone  # transformers, which takes ten seconds

        strategy.args, strategy.print = args, printed.append
        look_at(dataset, backbone.read_tokenizer(model_name), strategy)
        return [*said, *(sentence.removeprefix("[pgrpo] ") for sentence in printed)]

    return both


def _pairs_made(dataset, tokenizer, strategy) -> None:
    """Makes the host's dataset of pairs. Our hooks on it count pairs that are cut, left out or equal."""
    from openrlhf.datasets.reward_dataset import RewardDataset

    data, dpo = strategy.args.data, hasattr(strategy.args, "ref")  # only the preference trainer has a reference model
    processes = min(os.cpu_count() or 1, 8)
    RewardDataset(dataset, tokenizer, data.max_len, strategy, data.input_template, dpo, processes)


def _prompts_cut(dataset, tokenizer, strategy) -> None:
    """Says how many prompts the host's rollouts cut, after it has written them."""
    from openrlhf.datasets.prompts_dataset import PromptDataset

    args = strategy.args
    prompts = [*map(str, PromptDataset(dataset, tokenizer, strategy, args.data.input_template).prompts)]
    room = args.data.max_len - (args.rollout.max_new_tokens or 1)
    counts = pair_texts.counted(tokenizer, (text for text in prompts if pair_texts.may_fill(text, 0, room)))
    if cut := sum(counts.get(text, 0) > room for text in prompts):
        strategy.print(
            f"{cut} of {len(prompts)} prompts are cut from the left to {room} tokens, to leave room for an answer in "
            f"--data.max_len {args.data.max_len}"
        )


# ---- the output, users and histories --------------------------------------------------------------------------------


def _output(args, *read, part: str = "", beside: str = "") -> list[str]:
    """Looks whether a model may be written to `--ckpt.output_dir`: only over one that a run of ours left there.

    Args:
        read: sections of the arguments, each with a model that the run reads.
        part: folder in `--ckpt.path` with the checkpoints of the model.
        beside: what the host adds to the name of the folder for a second model, a critic.
    """
    for name, path in (("output_dir", args.ckpt.output_dir), ("path", args.ckpt.path)):
        if not path.strip() or Path(path).is_file():
            got = f"the file {path!r}" if path.strip() else "none"
            raise ValueError(f"--ckpt.{name} needs a folder, got {got}: name another")
    folder, earlier = args.ckpt.output_dir + beside, _earlier_settings(args)
    resumed = args.ckpt.load_enable and resume.latest(Path(args.ckpt.path) / part) is not None
    ours = earlier is not None and (not beside or earlier.get("critic.save_value_network") is True)
    flag = "--ckpt.output_dir" + f" (with {beside}, for --critic.save_value_network)" * bool(beside)
    inputs = [section.model_name_or_path for section in read]
    output_folder.check_output(folder, flag, inputs, again=resumed or ours)
    if not resumed and (Path(folder) / output_folder.CONFIG).is_file():
        return [f"the model in {folder}, which an earlier run left there, will be replaced at the end of this run"]
    return []


def _earlier_settings(args) -> dict | None:
    """The settings of the run that wrote metrics into `--ckpt.output_dir`; None if there are no metrics of ours."""
    path = Path(flags.metrics_path(args))
    if not path.is_file() or path.resolve().parent != Path(args.ckpt.output_dir).resolve():
        return None
    with open(path, "rb") as file:
        try:
            row = json.loads(file.readline())
            return dict(row.get("run", {}).get("settings", {})) if type(row["step"]) is int else None
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return None


def _unused_users(args, factorized: bool) -> list[str]:
    """A warning if users are named and nobody reads them: no factorized reward model, no estimator of the user's."""
    elsewhere = plan.rewards_are_local(args) and not Path(args.reward.model_name_or_path).is_dir()
    if args.data.user_key is None or args.pgrpo.plugin is not None or factorized or elsewhere:
        return []
    return [
        f"warning: --data.user_key {args.data.user_key} does nothing here: users are for a factorized reward model in "
        "--reward.model_name_or_path, or for an estimator of your own"
    ]


def _histories(dataset, args, source: str) -> list[str]:
    """Sentences on histories of rewards that tell an estimator nothing: too short for it, or one for all."""
    estimator, data = args.algo.advantage.estimator, args.data
    if not len(dataset) or not issubclass(advantage_estimators().get(estimator, object), PGRPO):
        return []
    names = columns.names(dataset, f"--{flags.PREF_GROUP_KEY}", data.pref_group_key, source, data.label_key)
    (largest, rows), said = Counter(names).most_common(1)[0], []
    if rows == len(names):
        said.append(
            f"all prompts are of one preference group, {largest!r}: {estimator} has one history for all rewards"
        )
    space = namespace_of(options_of(estimator))
    least, most = getattr(args, space).min_count, rows * args.rollout.n_samples_per_prompt * args.train.num_episodes
    if most < least:
        said.append(
            f"warning: --{space}.min_count {least:g} is never reached, because the largest preference group, "
            f"{largest!r}, gets {most} rewards in the whole run: every advantage will come of its prompt group alone; "
            "lower it or train on more"
        )
    return said


def _evaluation(args, check: Callable, remote: bool = False) -> list[str]:
    if not args.eval.dataset:
        return []
    return reader.rows(args, "eval.dataset", "eval.split", check, training=False, remote=remote)[1]
