"""The road of preference group and user: from a dataset column, on the prompt, to the advantage.

The host drops every dataset column but prompt, label and image. The prompt travels unchanged through rollout, agents,
queues, filtering and splitting, in sync and async alike, and is always a string: so it is replaced by a string that
also carries the preference group and the user. Labels, whatever their type, are not touched at all.
"""

import inspect

import wrapt

from openrlhf_pgrpo.host.options import check_pref_groups


class TaggedPrompt(str):
    """A prompt that knows whose it is; equal, hashed, encoded and printed as the plain string."""

    pref_group: str
    user: str | None

    def __new__(cls, prompt: str, pref_group: str, user: str | None = None):
        self = super().__new__(cls, prompt)
        self.pref_group, self.user = pref_group, user
        return self

    def __reduce__(self):
        return TaggedPrompt, (str(self), self.pref_group, self.user)


def install_check(module) -> None:
    """Makes `blending_datasets` refuse training data that does not say whose each prompt is."""

    def load(wrapped, _instance, args, kwargs):
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        try:
            dataset = wrapped(*args, **kwargs)
        except StopIteration as error:  # all that `datasets` has to say of a file without rows
            raise ValueError(f"a dataset needs at least one row, got an empty file {call['datasets']!r}") from error
        host_args = call["strategy"].args
        # Evaluation sets pass through here too; their rewards never reach an estimator, so they need no groups.
        if hasattr(host_args, "pgrpo") and call["datasets"] == host_args.data.prompt_dataset:
            _check(dataset, call["datasets"], host_args)
        return dataset

    wrapt.wrap_function_wrapper(module, "blending_datasets", load)


def install_tags(module) -> None:
    """Makes `PromptDataset` keep the preference group and the user of each row on its prompt."""

    def init(wrapped, self, args, kwargs):
        wrapped(*args, **kwargs)
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        dataset, host_args = call["dataset"], call["strategy"].args
        if not hasattr(host_args, "pgrpo"):
            return
        options, label_key = host_args.pgrpo, host_args.data.label_key
        pref_groups = _column(dataset, options.group_key, label_key)
        if pref_groups is None:
            return
        users = _column(dataset, options.user_key, label_key) or [None] * len(pref_groups)
        self.prompts = [
            TaggedPrompt(prompt, str(pref_group), None if user is None else str(user))
            for prompt, pref_group, user in zip(self.prompts, pref_groups, users, strict=True)
        ]

    wrapt.wrap_function_wrapper(module, "PromptDataset.__init__", init)


def _check(dataset, source: str, host_args) -> None:
    if len(dataset) == 0:
        raise ValueError(f"training needs at least one prompt, got an empty dataset {source!r}")
    for flag in ("group_key", "user_key"):
        key = getattr(host_args.pgrpo, flag)
        if key is None:
            continue
        values = _column(dataset, key, host_args.data.label_key)
        if values is None:
            raise ValueError(
                f"--pgrpo.{flag} needs a column of {source!r} or a key of its struct label, got {key!r}; "
                f"columns are {sorted(dataset.column_names)}: correct the flag or add the column"
            )
        for row, value in enumerate(values):
            if value is None or value == "":
                raise ValueError(
                    f"every row needs a value in {key!r} (--pgrpo.{flag}), got {value!r} in row {row} of {source!r}: "
                    "fill it in or drop the row"
                )
        if flag == "group_key":
            check_pref_groups(host_args, list(dict.fromkeys(map(str, values))))


def _column(dataset, key: str | None, label_key: str | None) -> list | None:
    """Values of a column, or of that key in a struct label; None if there is no such thing."""
    if key is None:
        return None
    if key in dataset.column_names:
        return dataset[key][:]  # at once: row by row it takes 80 times as long
    if label_key not in dataset.column_names:
        return None
    labels = dataset[label_key][:]
    if not any(isinstance(label, dict) and key in label for label in labels):
        return None
    return [label.get(key) if isinstance(label, dict) else None for label in labels]
