"""The road of a pair's preference group: from a dataset column, on the length of its prompt, to the loss.

The host drops every dataset column but prompt, chosen and rejected, and gives each pair one number more, `extra`: how
many tokens its prompt has. That number travels unchanged through collating to `concatenated_forward`, so it is
replaced by a number that also says whose pair it is.
"""

import inspect
from collections import Counter

import wrapt


class TaggedLength(int):
    """A number of prompt tokens that knows its pair's preference group; equal, hashed and used as the plain number."""

    pref_group: str

    def __new__(cls, length: int, pref_group: str):
        self = super().__new__(cls, length)
        self.pref_group = pref_group
        return self

    def __reduce__(self):
        return TaggedLength, (int(self), self.pref_group)


def install(module) -> None:
    """Makes `RewardDataset` keep the preference group of each pair, and count the pairs of each in `pref_groups`."""
    host_process_data = module.RewardDataset.process_data

    def process_data(self, data):
        # A plain function: `datasets` pickles it for its worker processes, which no wrapper of wrapt survives.
        row = host_process_data(self, data)
        if (key := self.strategy.args.robust.group_key) is not None:
            row["extra"] = {"prompt_tokens": row["extra"], "pref_group": str(data[key])}
        return row

    def init(wrapped, self, args, kwargs):
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        key = call["strategy"].args.robust.group_key
        if key is not None:
            _check(call["dataset"], key)
        wrapped(*args, **kwargs)
        if key is not None:
            self.extras = [TaggedLength(extra["prompt_tokens"], extra["pref_group"]) for extra in self.extras]
            self.pref_groups = Counter(extra.pref_group for extra in self.extras)
            _check_left(self, map(str, call["dataset"][key]))

    module.RewardDataset.process_data = process_data
    wrapt.wrap_function_wrapper(module, "RewardDataset.__init__", init)


def _check(dataset, key: str) -> None:
    if key not in dataset.column_names:
        raise ValueError(
            f"--robust.group_key needs a column of the dataset, got {key!r}; columns are "
            f"{sorted(dataset.column_names)}: correct the flag or add the column"
        )
    for row, value in enumerate(dataset[key]):
        if value is None or value == "":
            raise ValueError(
                f"every pair needs a value in {key!r} (--robust.group_key), got {value!r} in row {row}: fill it in or "
                "drop the row"
            )


def _check_left(dataset, names) -> None:
    """The host drops pairs whose prompt leaves no room for an answer; a preference group may not vanish with them."""
    lost = [name for name in dict.fromkeys(names) if name not in dataset.pref_groups]
    if lost:
        raise ValueError(
            f"every preference group needs a pair that fits --data.max_len {dataset.max_length}, got none of "
            f"{', '.join(map(repr, lost))}: raise it, shorten their prompts or drop their rows"
        )
