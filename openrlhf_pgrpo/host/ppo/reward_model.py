"""What PPO asks of a reward model that it holds itself: it reads the policy's tokens, in the policy's form.

A reward model behind a server reads text, so it may have another tokenizer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from openrlhf_pgrpo.core.names import listed
from openrlhf_pgrpo.host import columns, device, flags, here, plan
from openrlhf_pgrpo.host.rows import TEMPLATE
from openrlhf_pgrpo.host.user_flags import CHAT_TEMPLATE, check_profiles, set_user_flags
from openrlhf_pgrpo.models.users import ERROR, MEAN

if TYPE_CHECKING:  # importing it takes seconds, and flags import this file
    from openrlhf_pgrpo.models.folder import Folder

NAME = "reward.model_name_or_path"
SERVE = "serve it with python -m openrlhf_pgrpo.cli.serve_rm, which reads text, and give its address by"
SERVE += " --reward.remote_url"
# Flags of the host that put several texts into one row, each with the values that do.
PACKING = {"ds.packing_samples": bool, "train.dynamic_batch_enable": bool, "ds.ring_attn_size": lambda size: size > 1}


def check(flat: Mapping) -> None:
    """Refuses flags that do not fit the reward model; flat host arguments.

    Raises:
        ValueError: flags for users without a factorized model, or users, lengths or packed texts that it cannot take.
        OSError: its files cannot be read.
    """
    name, folder = flat[NAME], None
    if name and not (flat["reward.remote_url"] or flat["train.agent_func_path"]):
        if here.model(NAME, name, remote=device.cluster() is not None):
            return  # the trainer actor, on the cluster, checks the rest
        from openrlhf_pgrpo.host.user_rewards import check_scale, factorized_folder  # transformers, ten seconds

        check_scale(name, flat["reward.normalize_enable"])
        folder = factorized_folder(name, flat[CHAT_TEMPLATE])
    if folder is not None:
        _check_factorized(flat, folder)
    elif given := set_user_flags(flat):
        raise ValueError(
            f"--{', --'.join(given)} needs a factorized reward model in --{NAME}, got none: name one, or give the "
            "flags to the server that has it"
        )


def _check_factorized(flat: Mapping, folder: "Folder") -> None:
    for name, packs in PACKING.items():
        if packs(flat[name]):
            raise ValueError(
                f"the reward model {folder.name} needs one text in a row, got --{name} {flat[name]}, which packs "
                f"several into it: leave that out, or {SERVE}"
            )
    check_profiles(folder, flat["reward.profiles"])
    if flat[flags.USER_KEY] is None and flat["reward.unknown_user"] == ERROR:
        raise ValueError(
            f"the reward model {folder.name} needs --{flags.USER_KEY}, got none: name the dataset column of users, or "
            f"pass --reward.unknown_user {MEAN} for the average user"
        )
    if flat["algo.advantage.estimator"] == "gae" and flat["critic.model_name_or_path"] is None:
        raise ValueError(
            f"a critic cannot start from the base rewards of {folder.name}: name another model with "
            "--critic.model_name_or_path, or use an estimator without critic"
        )
    if flat["data.max_len"] > folder.max_length:
        raise ValueError(
            f"--data.max_len needs at most {folder.max_length} tokens, the longest text of the reward model "
            f"{folder.name}, got {flat['data.max_len']}: lower it, or train the reward model on longer texts"
        )


def folder_here(args) -> "Folder | None":
    """The factorized reward model that gives a run its rewards; None if another source does, or it is not in a folder
    here. Nested host arguments."""
    name = args.reward.model_name_or_path
    if not (name and plan.rewards_are_local(args) and Path(name).is_dir()):
        return None
    from openrlhf_pgrpo.host.user_rewards import factorized_folder  # transformers, ten seconds

    return factorized_folder(name, args.reward.chat_template)


def check_users(folder: "Folder", dataset, args, source: str) -> None:
    """Refuses prompts of users whom the factorized reward model in `folder` does not know; nested host arguments. Else
    training ends in the step that draws one.

    Raises:
        ValueError: there is one, and it is not to get the average user's reward.
    """
    reward, data = args.reward, args.data
    if data.user_key is None or reward.unknown_user == MEAN:
        return
    from openrlhf_pgrpo.host.user_rewards import UserRewards

    names = columns.names(dataset, f"--{flags.USER_KEY}", data.user_key, source, data.label_key)
    if new := set(names) - set(folder.users):  # reading profiles takes its time
        users = UserRewards(folder, reward).users
        if rows := [row for row, user in enumerate(names) if user in new and user not in users]:
            where = columns.at(rows, source)
            users.check([names[rows[0]]], f"every prompt of --data.prompt_dataset ({where})")


def check_texts(args) -> None:
    """Refuses a reward model of other tokens than the policy's, or of prompts that are written in another form; nested
    host arguments. Call it where both models are.

    Raises:
        ValueError: the two do not fit, or the reward model does not say how its texts are written.
        OSError: their files cannot be read.
    """
    from openrlhf_pgrpo.host.text_forms import asked_form
    from openrlhf_pgrpo.models import backbone
    from openrlhf_pgrpo.models.folder import is_factorized
    from openrlhf_pgrpo.models.form import Form, Writer, recorded
    from openrlhf_pgrpo.models.texts import end_of_text

    policy, name = args.actor.model_name_or_path, args.reward.model_name_or_path
    if not name or not plan.rewards_are_local(args):
        return
    theirs, ours = backbone.read_tokenizer(policy), backbone.read_tokenizer(name)
    if theirs.get_vocab() != ours.get_vocab():
        raise ValueError(
            f"--{NAME} needs the tokenizer of the policy {policy}, whose tokens it is sent, got another one in "
            f"{name}: {SERVE}"
        )
    if end_of_text(theirs) != end_of_text(ours):
        raise ValueError(
            f"--{NAME} needs texts that end as those of the policy {policy}, with {end_of_text(theirs)!r}, got "
            f"{end_of_text(ours)!r} in {name}: make it of a model that ends them alike, or {SERVE}"
        )
    config = backbone.read_config(name)
    if not (is_factorized(config) or recorded(config)):
        return  # a reward model of the host, which does not say how its texts were written
    form = Form.of_model(config, name, args.reward.chat_template)
    asked = asked_form(args.data, policy)
    writer = Writer(asked, theirs)
    closers = {*writer.ends} & {*backbone.read_stops(policy, theirs)}
    if others := closers - {end_of_text(ours)}:
        raise ValueError(
            f"--{NAME} needs texts that end as the answers of the policy {policy}, which closes them with "
            f"{listed(sorted(others))}, got {end_of_text(ours)!r} in {name}: {SERVE}"
        )
    if not writer.same_prompts(Writer(form, ours)):
        got = f"{asked}, which is another one" if asked.chat_template and form.chat_template else asked
        do = "leave" if asked.chat_template else "pass"
        raise ValueError(
            f"--{NAME} needs prompts written as those of {name}, {form}, got prompts written {got}: {do} "
            f"{TEMPLATE}{' out' if asked.chat_template else ''}, or make the reward model with texts of {policy}"
        )
