"""How preference group and user travel: from a dataset column, on the prompt, to the advantage.

The host drops every dataset column but prompt, label and image. The prompt travels unchanged through rollout, agents,
queues, filtering and splitting, in sync and async alike, and is always a string. So it becomes a `TaggedPrompt`.
Labels, whatever their type, are not touched at all.
"""

import inspect

import wrapt

from openrlhf_pgrpo.core.names import name_of
from openrlhf_pgrpo.host import columns, flags, rows
from openrlhf_pgrpo.host.ppo.estimators import check_pref_groups
from openrlhf_pgrpo.host.tags import TaggedPrompt


def check(dataset, args, source: str, training: bool = True) -> list[str]:
    """Checks the rows of prompts, without a tokenizer, so before anything heavy; `args` are nested host arguments.

    Returns:
        What is worth a sentence, though nothing is wrong.

    Raises:
        ValueError: a row that cannot be used or would be used wrongly, or, in training data, one without its
            preference group or user.
    """
    data = args.data
    if not len(dataset):
        what = "training" if training else "an evaluation"
        raise ValueError(f"{what} needs at least one prompt, got an empty dataset {source}: add rows")
    said = rows.check_prompts(dataset, data, source)
    # The rewards of an evaluation never reach an estimator, so its rows need no groups.
    for flag, key in ((flags.PREF_GROUP_KEY, data.pref_group_key), (flags.USER_KEY, data.user_key)):
        if training and key is not None:
            names = columns.names(dataset, f"--{flag}", key, source, data.label_key)
            said += columns.spellings(names, f"--{flag}", source)
            if flag == flags.PREF_GROUP_KEY:
                check_pref_groups(args, list(dict.fromkeys(names)))
    return said


def install_check(module) -> None:
    """Makes `blending_datasets` refuse prompts that cannot be used, for training and for evaluation."""

    def load(wrapped, _instance, args, kwargs):
        bound = inspect.signature(wrapped).bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        dataset, files = wrapped(*args, **kwargs), call["datasets"]
        host_args = getattr(call.get("strategy"), "args", None)
        if flags.are_ours(host_args):
            data = host_args.data
            training = (files, call["dataset_split"]) == (data.prompt_dataset, data.prompt_split)
            check(dataset, host_args, repr(files), training)
        return dataset

    wrapt.wrap_function_wrapper(module, "blending_datasets", load)


def install_tags(module) -> None:
    """Makes `PromptDataset` keep the preference group and the user of each row on its prompt."""

    def init(wrapped, self, args, kwargs):
        wrapped(*args, **kwargs)
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        dataset, host_args = call["dataset"], getattr(call.get("strategy"), "args", None)
        if not flags.are_ours(host_args):
            return
        data = host_args.data
        pref_groups, users = (
            columns.values(dataset, key, data.label_key) for key in (data.pref_group_key, data.user_key)
        )
        if pref_groups is None and users is None:
            return
        nobody = [None] * len(self.prompts)
        tags = zip(self.prompts, pref_groups or nobody, users or nobody, strict=True)
        self.prompts = [TaggedPrompt(prompt, _name(pref_group), _name(user)) for prompt, pref_group, user in tags]

    wrapt.wrap_function_wrapper(module, "PromptDataset.__init__", init)


def _name(value) -> str | None:
    """The name in a row; None in an evaluation whose row has none. `check` has refused such a row in training."""
    try:
        return name_of(value)
    except ValueError:
        return None
