"""How a pair's preference group travels: from a dataset column, on the length of its prompt, to the loss.

The host drops every dataset column but prompt, chosen and rejected, and gives each pair one more number, `extra`: the
length of its prompt in tokens. That number travels unchanged through collating to `concatenated_forward`, so it
becomes a `TaggedLength`.
"""

import inspect
from collections import Counter

import wrapt

from openrlhf_pgrpo.core.names import listed
from openrlhf_pgrpo.host import columns, flags
from openrlhf_pgrpo.host.tags import TaggedLength


def install(module) -> None:
    """Makes `RewardDataset` keep the preference group of each pair, and count the pairs of each in `pref_groups`."""
    host_process_data = module.RewardDataset.process_data

    def process_data(self, data):
        # A plain function: `datasets` pickles it for its worker processes, which no wrapper of wrapt survives.
        row = host_process_data(self, data)
        if (key := self.strategy.args.data.pref_group_key) is not None:
            row["extra"] = {"prompt_tokens": row["extra"], "pref_group": str(data[key])}
        return row

    def init(wrapped, self, args, kwargs):
        call = inspect.signature(wrapped).bind(*args, **kwargs).arguments
        key = call["strategy"].args.data.pref_group_key
        if key is None:
            return wrapped(*args, **kwargs)
        names = columns.names(call["dataset"], f"--{flags.PREF_GROUP_KEY}", key, "the pairs")
        wrapped(*args, **kwargs)
        self.extras = [TaggedLength(extra["prompt_tokens"], extra["pref_group"]) for extra in self.extras]
        self.pref_groups = Counter(extra.pref_group for extra in self.extras)
        _check_left(self, names)

    module.RewardDataset.process_data = process_data
    wrapt.wrap_function_wrapper(module, "RewardDataset.__init__", init)


def _check_left(dataset, names: list[str]) -> None:
    """The host drops pairs whose prompt leaves no room for an answer; no preference group may vanish with them."""
    lost = [name for name in dict.fromkeys(names) if name not in dataset.pref_groups]
    if lost:
        raise ValueError(
            f"every preference group needs a pair that fits --data.max_len {dataset.max_length}, got none of "
            f"{listed(lost)}: raise it, shorten their prompts or drop their rows"
        )
