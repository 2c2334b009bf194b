"""How preference group and user travel: from a dataset column, on the prompt, to the advantage.

The host drops every dataset column but prompt, label and image. The prompt travels unchanged through rollout, agents,
queues, filtering and splitting, in sync and async alike, and is always a string. So it becomes a `TaggedPrompt`.
Labels, whatever their type, are not touched at all.
"""

import inspect

import wrapt

from openrlhf_pgrpo.host import columns, flags
from openrlhf_pgrpo.host.ppo.estimators import check_pref_groups
from openrlhf_pgrpo.host.tags import TaggedPrompt


def install_check(module) -> None:
    """Makes `blending_datasets` refuse training data in which a prompt lacks its preference group or user."""

    def load(wrapped, _instance, args, kwargs):
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        dataset = wrapped(*args, **kwargs)
        host_args = getattr(call.get("strategy"), "args", None)
        # Evaluation sets pass through here too; their rewards never reach an estimator, so they need no groups.
        if hasattr(host_args, "pgrpo") and call["datasets"] == host_args.data.prompt_dataset:
            _check(dataset, call["datasets"], host_args)
        return dataset

    columns.install(module)
    wrapt.wrap_function_wrapper(module, "blending_datasets", load)


def install_tags(module) -> None:
    """Makes `PromptDataset` keep the preference group and the user of each row on its prompt."""

    def init(wrapped, self, args, kwargs):
        wrapped(*args, **kwargs)
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        dataset, host_args = call["dataset"], getattr(call.get("strategy"), "args", None)
        if not hasattr(host_args, "pgrpo"):
            return
        data = host_args.data
        pref_groups, users = (
            columns.values(dataset, key, data.label_key) for key in (data.pref_group_key, data.user_key)
        )
        if pref_groups is None and users is None:
            return
        nobody = [None] * len(self.prompts)
        rows = zip(self.prompts, pref_groups or nobody, users or nobody, strict=True)
        self.prompts = [TaggedPrompt(prompt, _name(pref_group), _name(user)) for prompt, pref_group, user in rows]

    wrapt.wrap_function_wrapper(module, "PromptDataset.__init__", init)


def _name(value) -> str | None:
    return None if value is None else str(value)


def _check(dataset, source: str, host_args) -> None:
    if len(dataset) == 0:
        raise ValueError(f"training needs at least one prompt, got an empty dataset {source!r}")
    data = host_args.data
    for flag, key in ((flags.PREF_GROUP_KEY, data.pref_group_key), (flags.USER_KEY, data.user_key)):
        if key is not None:
            names = columns.names(dataset, f"--{flag}", key, repr(source), data.label_key)
            if flag == flags.PREF_GROUP_KEY:
                check_pref_groups(host_args, list(dict.fromkeys(names)))
